from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from taprobe_core.errors import DataError
from taprobe_core.rollouts.fields import Unusable, load_json

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(value=VALUES, indent=st.sampled_from([None, 2]), has_mark=st.booleans())
def test_reads_back_whatever_json_writes(
    value: Any, indent: int | None, has_mark: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "value.json"
    path.write_bytes(
        (b"\xef\xbb\xbf" if has_mark else b"") + json.dumps(value, indent=indent).encode()
    )

    assert load_json(path) == value


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b"", "the file is empty"),
        (b" \n\t", "the file is empty"),
        (b'{"a": 1', "breaks off"),
        (b'{"a": "tex', "breaks off"),
        (b'[{"a": 1}, ', "breaks off"),
        (b'{"a": 1}}', "not JSON: Extra data"),
        (b"{'a': 1}", "not JSON: Expecting property name"),
        (b'{"a": "\xff"}', "not UTF-8: byte 0xff at offset 7"),
        ('{"a": 1}'.encode("utf-16"), "not UTF-8"),
        (b"[" * 200_000, "nested too deeply"),
        (b"<!DOCTYPE html><html>Sign in</html>", "a web page"),
        (b"\n<html>502</html>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git LFS pointer"),
    ],
)
def test_refuses_what_is_not_strict_json(tmp_path: Path, data: bytes, found: str) -> None:
    path = tmp_path / "chunks_labeled.json"
    path.write_bytes(data)

    with pytest.raises(DataError) as caught:
        load_json(path)

    assert found in caught.value.what
    assert str(path) in str(caught.value.where)
    assert caught.value.fix


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("NaN", "the token NaN, which is not a number"),
        ("-Infinity", "the token -Infinity, which is not a number"),
        ("-1e999", "the number -1e999, which overflows to infinity"),
        ("9" * 5000, "a whole number of 5,000 characters"),
        ('{"c": 1, "c": 2, "d": 3}', "the key 'c' twice"),
        ('{"c": 1, "c": 1, "c": 1}', "the key 'c' 3 times"),
    ],
)
def test_what_is_not_one_value_is_passed_for_none(tmp_path: Path, text: str, found: str) -> None:
    path = tmp_path / "value.json"
    path.write_text(f'{{"a": [{text}], "b": 1}}')

    value = load_json(path)

    (item,) = value["a"]
    if isinstance(item, dict):
        assert item.get("d", 3) == 3
        item = item["c"]
    assert isinstance(item, Unusable)
    assert item.found == found
    assert item.is_nan == (text == "NaN")
    assert item
    assert value["b"] == 1


def test_a_syntax_error_has_line_and_column(tmp_path: Path) -> None:
    path = tmp_path / "problem.json"
    path.write_text('{\n  "problem": oops\n}')

    with pytest.raises(DataError, match=r"problem\.json, line 2, column 14"):
        load_json(path)


def test_refuses_more_bytes_than_the_cap(tmp_path: Path) -> None:
    path = tmp_path / "problem.json"
    path.write_text("[1,2,3]")

    assert load_json(path, max_bytes=7) == [1, 2, 3]
    with pytest.raises(DataError, match="larger than 6 bytes"):
        load_json(path, max_bytes=6)


def test_refuses_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no file where"):
        load_json(tmp_path / "absent.json")
    with pytest.raises(DataError, match="a folder or special file"):
        load_json(tmp_path)
    with pytest.raises(DataError, match=r"cannot be read \(File name too long\)"):
        load_json(tmp_path / ("x" * 300))


def test_numbers_keep_their_value(tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    path.write_text("[0.1, -0.0, 1e-320]")

    tenth, zero, small = load_json(path)

    assert (tenth, small) == (0.1, 1e-320)
    assert math.copysign(1, zero) == -1
