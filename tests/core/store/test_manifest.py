from __future__ import annotations

import hashlib
import json
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from taprobe_core.errors import CorruptArtifactError
from taprobe_core.store import FileRecord, Manifest, library_versions
from taprobe_core.store import manifest as manifest_module
from taprobe_core.store.manifest import (
    PlainContent,
    TableContent,
    Writer,
    parse_manifest,
    render_manifest,
)

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | TEXT
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


GOLDEN = "8f48ff4a8972f5db38acf001f5571f38af91ca694ee27007ee803c0f1883e338"


def example(**changes: Any) -> Manifest:
    fields: dict[str, Any] = {
        "stage": "labels",
        "partition": ("m@L16", "7"),
        "fingerprint": "b4a91e20650013dd194e",
        "sequence": 3,
        "created_at": datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
        "code_version": "1",
        "config": {"k": [1, 2.5]},
        "upstream": ("rollouts/m/0123456789abcdef0123",),
        "provenance": {"ü": None},
        "versions": {"python": "3.11"},
        "writer": Writer(host="h", pid=1, run_id=None),
        "files": {
            "t.parquet": FileRecord(
                size_bytes=5,
                sha256="a" * 64,
                content=TableContent(n_rows=1, columns={"x": "Int64"}),
            ),
            "v.json": FileRecord(size_bytes=2, sha256="b" * 64, content=PlainContent(kind="json")),
        },
    }
    return Manifest(**fields | changes)


def rendered(manifest: Manifest) -> bytes:
    return render_manifest(manifest.model_dump(mode="json"))


def test_the_spelling_is_part_of_the_format() -> None:
    # Another spelling needs another schema version: old manifests would be refused as changed.
    raw = rendered(example())
    assert raw.splitlines()[0:8] == [
        b"{",
        b' "code_version": "1",',
        b' "config": {',
        b'  "k": [',
        b"   1,",
        b"   2.5",
        b"  ]",
        b" },",
    ]
    assert hashlib.sha256(raw).hexdigest() == GOLDEN


def test_the_hash_covers_every_byte_but_its_own() -> None:
    raw = rendered(example())
    own = parse_manifest(raw, "here").sha256.encode()
    assert raw.count(own) == 1
    assert hashlib.sha256(raw.replace(own, b"0" * 64)).hexdigest().encode() == own


@settings(max_examples=60, deadline=None)
@given(config=st.dictionaries(TEXT, JSON, max_size=4), provenance=st.dictionaries(TEXT, JSON))
def test_render_then_parse_is_identity(
    config: dict[str, object], provenance: dict[str, object]
) -> None:
    manifest = example(config=config, provenance=provenance)
    raw = rendered(manifest)
    parsed = parse_manifest(raw, "here")
    assert parsed.model_copy(update={"sha256": manifest.sha256}) == manifest
    assert rendered(parsed) == raw
    body = json.dumps(parsed.model_dump(mode="json"), indent=1, sort_keys=True)
    assert raw == (body + "\n").encode()


def test_a_hash_hidden_in_the_content_is_not_taken_for_its_own() -> None:
    trap = 'x\n "sha256": "' + "f" * 64 + '"'
    raw = rendered(example(provenance={"sha256": "e" * 64, trap: {"sha256": "d" * 64}}))
    assert parse_manifest(raw, "here").provenance["sha256"] == "e" * 64


def test_two_own_hashes_are_refused() -> None:
    raw = rendered(example())
    line = next(each for each in raw.splitlines(keepends=True) if each.startswith(b' "sha256"'))
    with pytest.raises(CorruptArtifactError):
        parse_manifest(raw.replace(line, line + line), "here")


def test_libraries_that_are_absent_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name == "torch":
            raise PackageNotFoundError(name)
        return "1"

    monkeypatch.setattr(manifest_module, "version", version)
    found = library_versions.__wrapped__()
    assert "torch" not in found
    assert found["polars"] == "1"
