"""The manifest: what an artifact holds, what it was made from, by whom and when.

Turns a `Manifest` into the bytes of `manifest.json` and back. Comparing a manifest with the files
beside it belongs in `integrity`. Invariant: the bytes carry their own sha256, so a change of any
byte is seen.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from platform import python_version
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from taprobe_core.errors import ArtifactError, ConfigError, CorruptArtifactError, StaleArtifactError
from taprobe_core.store.fingerprint import ArtifactKey, parse_key

FORMAT = "taprobe-artifact"
SCHEMA_VERSION = 1
MANIFEST_NAME = "manifest.json"
DISCARD = "run `taprobe verify --discard`, then run the stage again"


def _check_key_text(text: str) -> str:
    try:
        return str(parse_key(text))
    except ConfigError as error:
        raise ValueError(error.what) from None


_encode = json.JSONEncoder(allow_nan=False).encode
_quote = json.encoder.encode_basestring_ascii
_ZEROS = "0" * 64
# Text values hold no raw newline and nested fields stand further right, so only the manifest's own
# field can look like this.
_OWN_SHA256 = re.compile(rb'\n "sha256": "([0-9a-f]{64})"')

_Count = Annotated[int, Field(ge=0)]
_Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]

_Key = Annotated[str, AfterValidator(_check_key_text)]


class ManifestPart(BaseModel):
    """Base of every part: frozen, unknown keys refused, no coercion, no NaN or infinity."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class TensorInfo(ManifestPart):
    """Type (as safetensors names it, for example F16), shape, and the sha256 of its bytes.

    The hash is null in manifests of a time when only files had one.
    """

    dtype: str
    shape: tuple[_Count, ...]
    sha256: _Sha256 | None = None


class TensorsContent(ManifestPart):
    """A safetensors file: its tensors and its own metadata."""

    kind: Literal["tensors"] = "tensors"
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]


class TableContent(ManifestPart):
    """A Parquet file: its rows and the type of each column, as polars names it."""

    kind: Literal["table"] = "table"
    n_rows: _Count
    columns: dict[str, str]


class PlainContent(ManifestPart):
    """A JSON file, or bytes that the store does not look into."""

    kind: Literal["json", "bytes"]


class FileRecord(ManifestPart):
    """One file: its size, the sha256 of its bytes, what it holds."""

    size_bytes: _Count
    sha256: _Sha256
    content: Annotated[TensorsContent | TableContent | PlainContent, Field(discriminator="kind")]


class Writer(ManifestPart):
    """The process that wrote the artifact; `run_id` is TAPROBE_RUN_ID, where set."""

    host: str
    pid: _Count
    run_id: str | None


class Manifest(ManifestPart):
    """Everything known about one artifact.

    `sequence` counts the versions of a partition from 1 in the order of their commits and, unlike
    `created_at` (UTC), never goes back. `config` is the slice of the study, `provenance` is free.
    `files` is keyed by path relative to the artifact, with `/`; the manifest itself is not in it.
    `sha256` covers the manifest's own bytes, see `render_manifest`; zeros until then.
    """

    format: Literal["taprobe-artifact"] = "taprobe-artifact"
    schema_version: Literal[1] = 1
    stage: str
    partition: tuple[str, ...]
    fingerprint: str
    sequence: Annotated[int, Field(ge=1)]
    created_at: AwareDatetime
    code_version: str
    config: dict[str, Any]
    upstream: tuple[_Key, ...]
    provenance: dict[str, Any]
    versions: dict[str, str]
    writer: Writer
    files: dict[str, FileRecord]
    sha256: _Sha256 = _ZEROS

    @property
    def key(self) -> ArtifactKey:
        """The artifact's own key."""
        return ArtifactKey(self.stage, self.partition, self.fingerprint)

    @property
    def upstream_keys(self) -> tuple[ArtifactKey, ...]:
        """Keys of the artifacts that this one was made from."""
        return tuple(map(parse_key, self.upstream))

    @property
    def size_bytes(self) -> int:
        """Bytes of all files, without the manifest."""
        return sum(record.size_bytes for record in self.files.values())


@cache
def library_versions() -> dict[str, str]:
    """Versions of Python and of the libraries that decide a result; absent ones are left out."""
    found = {"python": python_version()}
    for name in (
        "taprobe",
        "torch",
        "transformers",
        "tokenizers",
        "polars",
        "safetensors",
        "numpy",
    ):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def render_manifest(body: Mapping[str, Any]) -> bytes:
    """Spell a manifest: sorted keys, one value per line, one space of indent per level.

    Args:
        body: the fields of a `Manifest`, JSON values only; `sha256` need not be among them.

    Returns:
        ASCII JSON. `sha256` is the hash of these bytes with 64 zeros in its own place.
    """
    blank = (_spell({**body, "sha256": _ZEROS}, "\n") + "\n").encode()
    return blank.replace(_own_field(_ZEROS), _own_field(hashlib.sha256(blank).hexdigest()))


def _spell(value: Any, gap: str) -> str:
    # The text of json.dumps(value, sort_keys=True, indent=1), which has no fast path for an indent.
    kind = type(value)
    if kind is str:
        return _quote(value)
    if kind is int:
        return str(value)
    if not value or not isinstance(value, dict | list):
        return _encode(value)
    inner = gap + " "
    if kind is list:
        items = [inner + _spell(item, inner) for item in value]
        return "[" + ",".join(items) + gap + "]"
    items = [f"{inner}{_quote(key)}: {_spell(value[key], inner)}" for key in sorted(value)]
    return "{" + ",".join(items) + gap + "}"


def parse_manifest(raw: bytes, where: str) -> Manifest:
    """Read a manifest and check that no byte of it was changed.

    Args:
        raw: bytes of `manifest.json`.
        where: its place, for the message.

    Raises:
        StaleArtifactError: of another schema version; names both.
        CorruptArtifactError: not JSON, a missing or unknown field, or bytes that differ from those
            that were written.
    """
    named = [match.decode() for match in _OWN_SHA256.findall(raw)]
    found = hashlib.sha256(_OWN_SHA256.sub(_own_field(_ZEROS), raw)).hexdigest()
    try:
        manifest = Manifest.model_validate_json(raw)
    except ValidationError as error:
        raise _refusal(raw, where, error) from None
    if named != [found]:
        raise CorruptArtifactError(
            f"manifest was changed (expected sha256 {' '.join(named) or None}, found {found})",
            where,
            DISCARD,
        )
    return manifest


def _own_field(digest: str) -> bytes:
    return f'\n "sha256": "{digest}"'.encode()


def _refusal(raw: bytes, where: str, error: ValidationError) -> ArtifactError:
    try:
        content = json.loads(raw)
    except (ValueError, RecursionError):
        return CorruptArtifactError(
            f"manifest is not JSON (starts with {raw[:40]!r})", where, DISCARD
        )
    found = content.get("schema_version") if isinstance(content, dict) else None
    if type(found) is int and found != SCHEMA_VERSION:
        return StaleArtifactError(
            f"manifest has schema version {found}, this program reads {SCHEMA_VERSION}",
            where,
            "use the version of taprobe that wrote it, or " + DISCARD,
        )
    shown = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()[:5]]
    return CorruptArtifactError(f"manifest breaks its format ({'; '.join(shown)})", where, DISCARD)
