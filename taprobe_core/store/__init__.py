"""Immutable, fingerprinted, hash-checked artifacts: the only way that results reach the disk.

fingerprint     ArtifactKey, and the hash of everything that decides an artifact
manifest        what an artifact holds and was made from; strict, self-checking
files           Parquet, safetensors, JSON
integrity       sha256 of files, once per process
reader          find, open, verify, lineage, usage
artifacts       Store: commit, adopt, prune, discard
batch, workers  many commits of one file each, in step or ahead by child processes (worker)
pins, pin_file  what goes in: hashed at first use, compared afterwards
backend         what a store needs from the place that keeps it
local, disk     that place as folders; what survives a crash, full disks, locks
"""

from taprobe_core.store.artifacts import Store
from taprobe_core.store.backend import Backend
from taprobe_core.store.batch import Committer, commit_files
from taprobe_core.store.disk import write_bytes
from taprobe_core.store.files import (
    read_json,
    read_table,
    read_tensors,
    tensor_parts,
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
from taprobe_core.store.workers import CommitWorkers, FileCommit, workers_for

__all__ = [
    "UNPINNED",
    "Acceptance",
    "Artifact",
    "ArtifactKey",
    "Backend",
    "CommitWorkers",
    "Committer",
    "FileCommit",
    "FileRecord",
    "Lineage",
    "LocalBackend",
    "Manifest",
    "PinVerdict",
    "PinnedSource",
    "Pins",
    "Store",
    "Verdict",
    "commit_files",
    "fingerprint",
    "library_versions",
    "parse_key",
    "read_json",
    "read_table",
    "read_tensors",
    "tensor_parts",
    "workers_for",
    "write_bytes",
    "write_json",
    "write_table",
    "write_tensors",
]
