"""One spelling of a JSON value: the same value always gives the same characters.

Turns mappings, sequences, strings, numbers, booleans and None into JSON text with sorted keys.
What a value means, and which error a user sees, belongs to the caller. Invariant: equal values give
equal text, different values give different text, and every reader of JSON can read it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

MAX_NESTING = 100
MAX_INTEGER = 2**63


class NotJsonError(ValueError):
    """A value that JSON cannot hold; callers turn it into an error of the project's tree.

    Args:
        found: what stands there.
        at: path to it, for example `$.layers[2]`.
        is_nonfinite: it is a number, but NaN or infinite.
    """

    def __init__(self, found: str, at: str, *, is_nonfinite: bool = False) -> None:
        self.found = found
        self.at = at
        self.is_nonfinite = is_nonfinite
        super().__init__(f"{found} at {at}")


def plain(value: Any, at: str = "$", nesting: int = 0) -> Any:
    """Return `value` made of dict, list, str, int, float, bool and None only.

    A tuple becomes a list. Nothing is rounded, sorted or coerced otherwise.

    Args:
        value: candidate.
        at: path to `value`, for the message.
        nesting: how many mappings and lists are around `value`.

    Raises:
        NotJsonError: another type, a key that is not a string, NaN or infinity, an integer beyond
            64 bits, half a surrogate pair, over 100 levels; names the path.
    """
    if isinstance(value, str):
        return _text(value, at)
    if value is None or isinstance(value, int):
        if value is not None and not -MAX_INTEGER <= value < MAX_INTEGER:
            raise NotJsonError("an integer beyond 64 bits", at)
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise NotJsonError(repr(value), at, is_nonfinite=True)
        return value
    if nesting == MAX_NESTING:
        raise NotJsonError(f"over {MAX_NESTING} levels", at[:80])
    if isinstance(value, Mapping):
        return {
            _key(key, at): plain(item, f"{at}.{key}", nesting + 1) for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [plain(item, f"{at}[{i}]", nesting + 1) for i, item in enumerate(value)]
    raise NotJsonError(f"a value of type {type(value).__name__}", at)


def canonical_json(value: Any, *, indent: int | None = None) -> str:
    """Spell `value` as JSON: sorted keys, ASCII, no NaN; without spaces unless `indent` is given.

    Raises:
        NotJsonError: as `plain`.

    Example:
        >>> canonical_json({"b": (1, 2.0), "a": None})
        '{"a":null,"b":[1,2.0]}'
    """
    separators = (",", ":") if indent is None else (",", ": ")
    return json.dumps(plain(value), sort_keys=True, separators=separators, indent=indent)


def _key(key: Any, at: str) -> str:
    # JSON would spell the keys 1 and "1" alike, and two different configs would become one.
    if not isinstance(key, str):
        raise NotJsonError(f"a key of type {type(key).__name__}", at)
    return _text(key, at)


def _text(text: str, at: str) -> str:
    # Python spells half a surrogate pair, and strict readers then refuse the whole file.
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise NotJsonError("half a surrogate pair", at) from None
    return text
