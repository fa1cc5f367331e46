from __future__ import annotations

import hashlib
import math
import os
import struct
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from polars.testing import assert_frame_equal

from taprobe_core.errors import (
    ArtifactError,
    CorruptArtifactError,
    MissingArtifactError,
    NonFiniteError,
)
from taprobe_core.store import (
    ArtifactKey,
    Store,
    fingerprint,
    read_json,
    read_table,
    read_tensors,
    write_json,
    write_table,
    write_tensors,
)
from taprobe_core.store.files import tensor_header

IN_ONE_FOLDER = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)


@st.composite
def tables(draw: st.DrawFn) -> pl.DataFrame:
    n_rows = draw(st.integers(0, 5))

    def column(values: st.SearchStrategy[Any], dtype: Any) -> pl.Series:
        cells = draw(st.lists(st.none() | values, min_size=n_rows, max_size=n_rows))
        return pl.Series(cells, dtype=dtype)

    return pl.DataFrame(
        {
            "n": column(st.integers(-(2**63), 2**63 - 1), pl.Int64),
            "ids": column(st.lists(st.integers(0, 2**31 - 1), max_size=3), pl.List(pl.Int32)),
            "x": column(st.floats(), pl.Float64),
            "y": column(st.floats(width=32), pl.Float32),
            "text": column(TEXT, pl.String),
            "is_on": column(st.booleans(), pl.Boolean),
            "tag": column(st.sampled_from(["a", "b"]), pl.Enum(["a", "b", "c"])),
        }
    )


@IN_ONE_FOLDER
@given(frame=tables())
def test_table_write_then_read_is_identity(tmp_path: Path, frame: pl.DataFrame) -> None:
    path = tmp_path / "t.parquet"
    write_table(path, frame)
    assert_frame_equal(read_table(path), frame)


def test_table_in_a_folder_that_looks_like_a_pattern(tmp_path: Path) -> None:
    folder = tmp_path / "layer=[1]*"
    folder.mkdir()
    frame = pl.DataFrame({"a": [1]})
    write_table(folder / "t.parquet", frame)
    assert_frame_equal(read_table(folder / "t.parquet"), frame)


DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.bool]


@IN_ONE_FOLDER
@given(
    dtype=st.sampled_from(DTYPES),
    shapes=st.dictionaries(
        st.text("abcxyz_0", min_size=1, max_size=5),
        st.lists(st.integers(0, 4), max_size=3),
        max_size=3,
    ),
    metadata=st.none() | st.dictionaries(TEXT, TEXT, max_size=4),
    seed=st.integers(0, 10**6),
)
def test_tensors_write_then_read_is_identity(
    tmp_path: Path,
    dtype: torch.dtype,
    shapes: dict[str, list[int]],
    metadata: dict[str, str] | None,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: torch.randint(0, 2, shape, generator=generator).to(dtype)
        for name, shape in shapes.items()
    }
    path = tmp_path / "t.safetensors"
    write_tensors(path, tensors, metadata)
    found = read_tensors(path)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == dtype
        assert torch.equal(found[name], tensor)
    header, about = tensor_header(path)
    assert about == (metadata or {})
    assert {name: info["shape"] for name, info in header.items()} == shapes


def test_same_tensors_give_same_bytes_whatever_the_order_of_metadata(tmp_path: Path) -> None:
    tensors = {"mean": torch.arange(6.0).reshape(2, 3)}
    metadata = {f"k{i}": "ü" * i for i in range(8)}
    written = set()
    for turn in range(6):
        path = tmp_path / f"{turn}.safetensors"
        order = dict(reversed(metadata.items())) if turn % 2 else metadata
        write_tensors(path, tensors, order)
        written.add(path.read_bytes())
        assert torch.equal(read_tensors(path)["mean"], tensors["mean"])
    assert len(written) == 1


def test_views_and_shared_memory_are_written_whole(tmp_path: Path) -> None:
    base = torch.arange(12.0, requires_grad=True).reshape(3, 4)
    tensors = {"all": base, "rows": base[1:], "turned": base.T, "again": base}
    write_tensors(tmp_path / "t.safetensors", tensors)
    found = read_tensors(tmp_path / "t.safetensors")
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor.detach())


def sha256_of(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.numpy().tobytes()).hexdigest()


def test_bfloat16_comes_back_bit_for_bit_and_the_manifest_says_so(tmp_path: Path) -> None:
    # Every bit pattern, so also infinities, NaN with their payloads and subnormal numbers.
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).reshape(256, 256)
    tensors = {"tokens": patterns.view(torch.bfloat16), "offsets": torch.tensor([0, 256])}
    key = ArtifactKey("activation_shards", ("m@L07",), fingerprint("a", "1", {}, []))

    def write(folder: Path) -> None:
        write_tensors(folder / "a.safetensors", tensors, {"dtype": "bfloat16"})

    Store(tmp_path).commit(key, write, provenance={})
    artifact = Store(tmp_path).open(key)
    found = artifact.read_tensors("a.safetensors")
    assert found["tokens"].dtype == torch.bfloat16
    assert torch.equal(found["tokens"].view(torch.int16), patterns)
    assert torch.equal(found["offsets"], tensors["offsets"])
    assert artifact.manifest.files["a.safetensors"].content.model_dump() == {
        "kind": "tensors",
        "tensors": {
            "offsets": {"dtype": "I64", "shape": (2,), "sha256": sha256_of(tensors["offsets"])},
            "tokens": {"dtype": "BF16", "shape": (256, 256), "sha256": sha256_of(patterns)},
        },
        "metadata": {"dtype": "bfloat16"},
    }


def test_data_is_aligned_to_its_type_whatever_the_order_of_the_tensors(tmp_path: Path) -> None:
    tensors = {
        "flags": torch.tensor([True, False, True]),
        "mean": torch.ones(1, 3, dtype=torch.float16),
        "mass": torch.ones(3),
        "ids": torch.arange(3),
    }
    for name, order in (("a", tensors), ("b", dict(reversed(tensors.items())))):
        write_tensors(tmp_path / f"{name}.safetensors", order)
    raw = (tmp_path / "a.safetensors").read_bytes()
    assert raw == (tmp_path / "b.safetensors").read_bytes()
    assert struct.unpack("<Q", raw[:8])[0] % 8 == 0
    for name, info in tensor_header(tmp_path / "a.safetensors")[0].items():
        assert info["range"][0] % tensors[name].element_size() == 0


def test_a_type_that_the_format_does_not_know_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"complex64.*phase") as caught:
        write_tensors(tmp_path / "t.safetensors", {"phase": torch.ones(1, dtype=torch.complex64)})
    assert "bfloat16" in str(caught.value)
    assert not (tmp_path / "t.safetensors").exists()


def test_tensor_files_have_the_mode_of_every_other_file(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", 1)
    write_tensors(tmp_path / "a.safetensors", {"x": torch.ones(1)})
    modes = {os.stat(tmp_path / name).st_mode for name in ("a.json", "a.safetensors")}  # noqa: PTH116
    assert len(modes) == 1


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | TEXT
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


@IN_ONE_FOLDER
@given(value=JSON)
def test_json_write_then_read_is_identity(tmp_path: Path, value: object) -> None:
    write_json(tmp_path / "v.json", value)
    assert read_json(tmp_path / "v.json") == value


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_json_has_no_nan(tmp_path: Path, number: float) -> None:
    with pytest.raises(NonFiniteError, match=r"v\.json, \$\.auc\[1\]"):
        write_json(tmp_path / "v.json", {"auc": [0.5, number]})
    assert not (tmp_path / "v.json").exists()


def test_json_refuses_what_it_cannot_hold(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"type Path|type PosixPath"):
        write_json(tmp_path / "v.json", {"path": tmp_path})


@pytest.mark.parametrize("text", ["", "{", "[NaN]", "[1e999]", "[Infinity]", "\xff", "[" * 10**5])
def test_a_file_that_is_not_json_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "v.json").write_text(text, encoding="latin-1")
    with pytest.raises(CorruptArtifactError, match="not JSON") as caught:
        read_json(tmp_path / "v.json")
    assert "Fix:" in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"PAR1", b"<html>not found</html>" * 9])
def test_a_file_that_is_not_parquet_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "t.parquet").write_bytes(content)
    with pytest.raises(CorruptArtifactError, match="not Parquet"):
        read_table(tmp_path / "t.parquet")


def header(text: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text


GOOD_HEADER = b'{"x":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}'


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x01",
        b"<html>not found</html>",
        header(GOOD_HEADER),
        header(GOOD_HEADER) + b"123",
        header(GOOD_HEADER, 2**63) + b"12",
        header(b"[]"),
        header(b'{"x":1}'),
        header(b'{"x":{"data_offsets":[0,"2"]}}') + b"12",
        header(GOOD_HEADER.replace(b"[0,", b"[1,")) + b"12",
        header(GOOD_HEADER.replace(b"[0,", b"[0.0,")) + b"12",
    ],
)
def test_a_lying_tensor_header_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "t.safetensors"
    path.write_bytes(content)
    with pytest.raises(CorruptArtifactError, match="bad header"):
        tensor_header(path)
    with pytest.raises(CorruptArtifactError, match="not safetensors"):
        read_tensors(path)


def test_a_wrong_suffix_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"\.parquet"):
        write_table(tmp_path / "t.csv", pl.DataFrame())
    with pytest.raises(ArtifactError, match=r"\.safetensors"):
        write_tensors(tmp_path / "t.pt", {})
    with pytest.raises(ArtifactError, match=r"\.json"):
        write_json(tmp_path / "t.txt", {})
    assert not list(tmp_path.iterdir())


def test_an_artifact_reads_all_three_forms(tmp_path: Path) -> None:
    frame, tensor = pl.DataFrame({"a": [1]}), torch.ones(2, 3)

    def write(folder: Path) -> None:
        write_table(folder / "t.parquet", frame)
        write_tensors(folder / "a.safetensors", {"mean": tensor}, {"dims": "span d_model"})
        write_json(folder / "v.json", [1, None])

    key = ArtifactKey("activations", (), fingerprint("activations", "1", {}, []))
    Store(tmp_path).commit(key, write, provenance={})
    artifact = Store(tmp_path).open(key)
    assert_frame_equal(artifact.read_table("t.parquet"), frame)
    assert torch.equal(artifact.read_tensors("a.safetensors")["mean"], tensor)
    assert artifact.read_some_tensors("a.safetensors", ["mean"])["mean"].equal(tensor)
    with pytest.raises(MissingArtifactError, match=r"no tensor last, only mean"):
        artifact.read_some_tensors("a.safetensors", ["last"])
    assert artifact.read_json("v.json") == [1, None]
