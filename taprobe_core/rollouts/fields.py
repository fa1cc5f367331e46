"""From the bytes of one dataset file to typed fields: every fault is noted, none stops the reading.

JSON as Python reads it is lax: it takes NaN and infinity, and of two equal keys silently the last.
Neither may reach the tables unnoticed, and neither is worth a file where nobody reads the value: so
an `Unusable` stands in its place, which no reader of a field takes for a value. What is not JSON at
all (a web page, a Git LFS pointer, a cut download) is refused by one error that names the cause.

A null counts as absent. A value of the wrong type or out of range is a fault: it is neither
repaired nor dropped. Only what rounding did to a number is undone: one that is beyond its range by
`ROUNDING` at most is taken for the bound. Which fields a file has belongs in `parse`.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from taprobe_core.errors import DataError, SchemaError

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


ABSENT = object()
"""Stands for a key that an object lacks, as opposed to null."""

ROUNDING = 1e-6
"""How far beyond its range a number may be by rounding, even if it was computed in float32.

A share of at most a thousand rollouts that is wrong by a rollout is wrong by 1e-3 or more."""

_LISTED = 20
_INDEX = re.compile(r"[0-9]{1,9}")


class Fields:
    """One JSON object, read field by field.

    Every reader returns a value that keeps its promise; where there is none it notes a fault and
    returns an empty one, so that reading goes on to the next fault.

    Args:
        row: the object.
        at: its JSON path, for example `$[3]`.
        faults: list that faults are added to, each as `path: found X, want Y`.
    """

    def __init__(self, row: Mapping[str, Any], at: str, faults: list[str]) -> None:
        self.row = row
        self.at = at
        self.faults = faults

    def fault(self, key: str, found: Any, want: str) -> None:
        """Note that `key` holds `found` where `want` is wanted."""
        self.faults.append(f"{self.at}.{key}: found {shown(found)}, want {want}")

    def text(self, key: str) -> str | None:
        """Return an optional text."""
        value = self.row.get(key)
        if value is None:
            return None
        if not isinstance(value, str):
            self.fault(key, value, "a text or null")
            return None
        return value if self._is_unicode(key, value) else None

    def required_text(self, key: str) -> str:
        """Return a text that is not blank."""
        value = self.row.get(key, ABSENT)
        if not isinstance(value, str) or not value.strip():
            self.fault(key, value, "a text that is not blank")
            return ""
        return value if self._is_unicode(key, value) else ""

    def texts(self, key: str) -> list[str]:
        """Return an optional list of texts."""
        value = self.row.get(key)
        if value is None:
            return []
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            self.fault(key, value, "a list of texts or null")
            return []
        return [item for item in value if self._is_unicode(key, item)]

    def flag(self, key: str) -> bool | None:
        """Return an optional truth value."""
        value = self.row.get(key)
        if value is None or isinstance(value, bool):
            return value
        self.fault(key, value, "true, false or null")
        return None

    def number(self, key: str, low: float, high: float) -> float | None:
        """Return an optional number in [low, high]; beyond by rounding alone it is the bound."""
        value = self.row.get(key)
        if value is None:
            return None
        if _is_number(value) and low - ROUNDING <= value <= high + ROUNDING:
            return min(max(float(value), low), high)
        bounds = f"in [{low:g}, {high:g}]" if high < sys.float_info.max else f"of at least {low:g}"
        self.fault(key, value, f"a number {bounds} or null")
        return None

    def indices(self, key: str) -> list[int]:
        """Return an optional list of indices, each a whole number or the text of one."""
        value = self.row.get(key)
        if value is None:
            return []
        if isinstance(value, list) and all(map(_is_index, value)):
            return [int(item) for item in value]
        self.fault(key, value, "a list of sentence indices or null")
        return []

    def _is_unicode(self, key: str, value: str) -> bool:
        try:
            value.encode()
        except UnicodeEncodeError as error:
            self.fault(key, value, f"whole characters (half of a pair at char {error.start})")
            return False
        return True


def read_object(value: Any, at: str, faults: list[str]) -> Fields:
    """Return the fields of `value`; noting a fault where it is no object."""
    if isinstance(value, dict):
        return Fields(value, at, faults)
    faults.append(f"{at}: found {shown(value)}, want an object")
    # The absent fields of what is no object are not faults of their own.
    return Fields({}, at, [])


def shown(value: Any) -> str:
    """Return `value` for a message: short, on one line, in ASCII."""
    if value is ABSENT:
        return "nothing"
    if value is None:
        return "null"
    if isinstance(value, Unusable):
        return value.found
    if isinstance(value, dict):
        return "an object"
    try:
        text = ascii(value)
    except RecursionError:  # what can just be read may nest too deeply to be shown
        return "a list"
    return text if len(text) <= 60 else f"{text[:57]}..."


def raise_faults(faults: Sequence[str], path: Path) -> None:
    """Raise one error for all faults of one file; do nothing where there is none."""
    if not faults:
        return
    more = len(faults) - _LISTED
    raise SchemaError(
        f"{len(faults)} field(s) break the dataset's layout",
        str(path),
        "correct the file or fetch it again, or leave its problem out with rollouts.exclude_ids",
        [*faults[:_LISTED], *([f"... and {more} more"] if more > 0 else [])],
    )


def _is_number(value: Any) -> bool:
    # A bool is an int to Python.
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_index(value: Any) -> bool:
    is_whole = isinstance(value, int | str) and not isinstance(value, bool)
    return is_whole and _INDEX.fullmatch(str(value)) is not None
