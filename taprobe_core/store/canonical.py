"""One spelling of a JSON value: the same value always gives the same characters.

Turns mappings, sequences, strings, numbers, booleans and None into JSON text with sorted keys. What
a value means, and which error a user sees, belongs to the caller. Invariant: equal values give equal
text, different values give different text; a number that is not finite has no spelling at all.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any


class NotJsonError(ValueError):
    """A value that JSON cannot hold; callers turn it into an error of the project's tree.

    Args:
        found: what stands there.
        at: path to it, for example `$.layers[2]`.
        is_number: it is a number, but NaN or infinite.
    """

    def __init__(self, found: str, at: str, *, is_number: bool = False) -> None:
        self.found = found
        self.at = at
        self.is_number = is_number
        super().__init__(f"{found} at {at}")


def plain(value: Any, at: str = "$") -> Any:
    """Return `value` made of dict, list, str, int, float, bool and None only.

    A tuple becomes a list. Nothing is rounded, sorted or coerced otherwise.

    Args:
        value: candidate.
        at: path to `value`, for the message.

    Raises:
        NotJsonError: another type, a key that is not a string, NaN or infinity; names the path.
    """
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise NotJsonError(repr(value), at, is_number=True)
        return value
    if isinstance(value, Mapping):
        return {_text_key(key, at): plain(item, f"{at}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, f"{at}[{index}]") for index, item in enumerate(value)]
    raise NotJsonError(f"a value of type {type(value).__name__}", at)


def canonical_json(value: Any, *, indent: int | None = None) -> str:
    """Spell `value` as JSON: sorted keys, ASCII, no NaN; without spaces unless `indent` is given.

    Raises:
        NotJsonError: JSON cannot hold `value`, or it is nested too deep.

    Example:
        >>> canonical_json({"b": (1, 2.0), "a": None})
        '{"a":null,"b":[1,2.0]}'
    """
    separators = (",", ":") if indent is None else (",", ": ")
    try:
        return json.dumps(plain(value), sort_keys=True, separators=separators, indent=indent)
    except RecursionError:
        raise NotJsonError("a value nested too deep", "$") from None


def _text_key(key: Any, at: str) -> str:
    # JSON would spell the keys 1 and "1" alike, and two different configs would become one.
    if not isinstance(key, str):
        raise NotJsonError(f"a key of type {type(key).__name__}", at)
    return key
