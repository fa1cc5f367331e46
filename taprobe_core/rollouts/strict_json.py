"""From the bytes of one dataset file to a JSON value, or to one error that names the cause.

JSON as Python reads it is lax: it takes NaN and infinity, and of two equal keys silently the last.
Neither may reach the tables unnoticed, and neither is worth a file where nobody reads the value: so
an `Unusable` stands in its place, which no reader of a field takes for a value. What is not JSON at
all (a web page, a Git LFS pointer, a cut download) is refused. Which fields a file must have
belongs in `parse`.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from taprobe_core.errors import DataError

MAX_BYTES = 64 * 2**20
"""The largest of the three files in the published dataset is below 1 MB."""

_FETCH_AGAIN = "fetch the file again, or leave its problem out with rollouts.exclude_ids"


@dataclass(frozen=True)
class Unusable:
    """Stands where a file has something that is not one JSON value.

    It is true, equal to no JSON value and of no JSON type, so that whoever reads the field notices.

    Attributes:
        found: what stands there, in words.
        is_nan: whether it is the token NaN, by which some writers mean null.
    """

    found: str
    is_nan: bool = False


def load_json(path: Path, max_bytes: int = MAX_BYTES) -> Any:
    """Read one JSON file strictly.

    A byte order mark is accepted. Refused are: files over `max_bytes`, other encodings than UTF-8,
    and nesting beyond the interpreter's recursion limit. An `Unusable` becomes of NaN, of infinity
    and numbers that overflow to it, of whole numbers longer than Python converts, and of the value
    of a key that an object repeats.

    Args:
        path: file to read.
        max_bytes: size cap, bytes.

    Returns:
        The value: objects as dict, arrays as list, every float finite.

    Raises:
        DataError: the file cannot be read or is not such JSON; `where` is the file.
    """
    text = _decode(_read(path, max_bytes), path)
    try:
        return json.loads(
            text,
            object_pairs_hook=_unique_keys,
            parse_constant=_constant,
            parse_float=_finite,
            parse_int=_whole,
        )
    except json.JSONDecodeError as error:
        raise _syntax_error(error, text, path) from None
    except RecursionError:
        raise DataError("JSON is nested too deeply to read", str(path), _FETCH_AGAIN) from None


def _read(path: Path, max_bytes: int) -> bytes:
    try:
        if not path.is_file():
            kind = "a folder or special file" if path.exists() else "no file"
            raise DataError(f"{kind} where a JSON file should be", str(path), _FETCH_AGAIN)
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)
    except OSError as error:
        raise DataError(
            f"the file cannot be read ({error.strerror or error})",
            str(path),
            "make the file readable for this user",
        ) from error
    if len(data) > max_bytes:
        raise DataError(
            f"the file is larger than {max_bytes:,} bytes", str(path), "check what wrote the file"
        )
    return data


def _decode(data: bytes, path: Path) -> str:
    head = data[:200].lstrip().lower()
    if not data.strip():
        raise DataError("the file is empty", str(path), _FETCH_AGAIN)
    if head.startswith(b"version https://git-lfs"):
        raise DataError(
            "a Git LFS pointer stands where the JSON should be",
            str(path),
            "run `git lfs pull` in the mirror's repository",
        )
    if head.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise DataError(
            "a web page stands where the JSON should be (a login or error page was saved)",
            str(path),
            "fetch the file again with `hf download`",
        )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"the file is not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start}",
            str(path),
            "convert the file to UTF-8, or fetch it again",
        ) from None


def _syntax_error(error: json.JSONDecodeError, text: str, path: Path) -> DataError:
    at = f"{path}, line {error.lineno}, column {error.colno}"
    is_cut = error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated string")
    what = "the file breaks off in the middle of its JSON" if is_cut else f"not JSON: {error.msg}"
    return DataError(what, at, _FETCH_AGAIN)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        for key, n in Counter(key for key, _ in pairs).items():
            if n > 1:
                row[key] = Unusable(f"the key {key!a} {'twice' if n == 2 else f'{n} times'}")
    return row


def _constant(text: str) -> Unusable:
    return Unusable(f"the token {text}, which is not a number", is_nan=text == "NaN")


def _finite(token: str) -> float | Unusable:
    value = float(token)
    if math.isfinite(value):
        return value
    return Unusable(f"the number {token[:40]}, which overflows to infinity")


def _whole(token: str) -> int | Unusable:
    try:
        return int(token)
    except ValueError:
        return Unusable(f"a whole number of {len(token):,} characters")
