"""Immutable, fingerprinted, hash-checked artifacts: the only way that results reach the disk.

fingerprint     ArtifactKey, and the hash of everything that decides an artifact
manifest        what an artifact holds and was made from; strict, self-checking
files           Parquet, safetensors, JSON
integrity       sha256 of files, once per process
reader          find, open, verify, lineage, usage
artifacts       Store: commit, adopt, prune, discard
pins, pin_file  what goes in: hashed at first use, compared afterwards
backend         what a store needs from the place that keeps it
local, disk     that place as folders; what survives a crash, full disks, locks
"""

from taprobe_core.store.artifacts import Store
from taprobe_core.store.backend import Backend
from taprobe_core.store.disk import write_bytes
from taprobe_core.store.files import (
    DTYPE_NAMES,
    read_json,
    read_table,
    read_tensors,
    write_json,
    write_table,
    write_tensors,
)
from taprobe_core.store.fingerprint import ArtifactKey, fingerprint, parse_key
from taprobe_core.store.local import LocalBackend
from taprobe_core.store.manifest import FileRecord, Manifest, library_versions
from taprobe_core.store.pin_file import Acceptance, PinnedSource
from taprobe_core.store.pins import UNPINNED, Pins, PinVerdict
from taprobe_core.store.reader import Artifact, Lineage, Verdict

__all__ = [
    "DTYPE_NAMES",
    "UNPINNED",
    "Acceptance",
    "Artifact",
    "ArtifactKey",
    "Backend",
    "FileRecord",
    "Lineage",
    "LocalBackend",
    "Manifest",
    "PinVerdict",
    "PinnedSource",
    "Pins",
    "Store",
    "Verdict",
    "fingerprint",
    "library_versions",
    "parse_key",
    "read_json",
    "read_table",
    "read_tensors",
    "write_bytes",
    "write_json",
    "write_table",
    "write_tensors",
]
