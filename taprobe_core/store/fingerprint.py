"""Name artifacts: stage, partition and a fingerprint of everything that decides the content.

Turns a stage's code version, its slice of the study and the identities of its inputs into one short
hash; same inputs, same name, so nothing is computed twice and nothing stale is reused. What is
hashed is JSON text in one spelling, with sorted keys. What a value means, and which error a user
sees, belongs to the caller; where an artifact lives to `backend`.

Invariants: equal values give equal text, different values give different text, and every reader of
JSON can read it. A checked key is a path inside the store on every file system, and a partition
never looks like a version.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from taprobe_core.errors import ConfigError
from taprobe_core.keys import is_reserved

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


FINGERPRINT_LENGTH = 20
"""Hex characters, 80 bits: a collision is unlikely below some 10^11 artifacts."""

MAX_DEPTH = 8

_FINGERPRINT = re.compile(r"[0-9a-f]{16,32}")
_PART = re.compile(r"[a-z0-9][a-z0-9@L._-]{0,99}")


class ArtifactKey(NamedTuple):
    """The name of one artifact; `str()` gives its path inside the store.

    `partition` holds slugs, sites and trials; it is empty for a stage without partitions.
    """

    stage: str
    partition: tuple[str, ...]
    fingerprint: str

    def __str__(self) -> str:
        return "/".join((self.stage, *self.partition, self.fingerprint))


def fingerprint(
    stage: str, code_version: str, config: Mapping[str, Any], upstream: Sequence[str]
) -> str:
    """Hash everything that decides an artifact's content.

    The first 20 hex characters of the sha256 of the canonical JSON of the four arguments. A tuple
    equals a list and the order of keys is irrelevant; any other change, also 1 against 1.0 and the
    order of `upstream`, gives another fingerprint.

    Args:
        stage: stage name.
        code_version: version of the stage's code; a new one makes every artifact new.
        config: the slice of the study that the stage depends on, JSON values only.
        upstream: identities of the inputs: fingerprints, revisions, digests.

    Returns:
        20 characters of 0-9 a-f.

    Raises:
        ConfigError: JSON cannot hold a value (NaN, infinity, an object); names its path.

    Example:
        >>> fingerprint("labels", "1", {"k": (1, 2)}, []) == fingerprint(
        ...     "labels", "1", {"k": [1, 2]}, []
        ... )
        True
    """
    if isinstance(upstream, str):
        raise TypeError("upstream is one text, not a sequence of identities")
    parts = {
        "code_version": code_version,
        "config": config,
        "stage": stage,
        "upstream": list(upstream),
    }
    try:
        text = canonical_json(parts)
    except NotJsonError as error:
        raise ConfigError(
            f"{error.found} cannot be part of a fingerprint",
            f"stage {stage!r}, {error.at}",
            "use finite numbers, text, lists and mappings with text keys "
            "(for a pydantic model: model_dump(mode='json'))",
        ) from None
    return hashlib.sha256(text.encode()).hexdigest()[:FINGERPRINT_LENGTH]


def is_fingerprint(text: str) -> bool:
    """Tell whether `text` has the form of a fingerprint: 16 to 32 characters of 0-9 a-f."""
    return _FINGERPRINT.fullmatch(text) is not None


@lru_cache(maxsize=4096)
def is_part(text: str) -> bool:
    """Tell whether `text` may name a stage or stand in a partition."""
    return _PART.fullmatch(text) is not None and not is_reserved(text)


def check_partition(stage: str, partition: Sequence[str]) -> None:
    """Refuse a stage or a partition that could leave the store or be taken for a version.

    Raises:
        ConfigError: not 1-100 characters of `a-z 0-9 @ L . _ -` starting with a letter or digit; a
            device name; the form of a fingerprint; more than 8 parts. Lists every fault.
    """
    if isinstance(partition, str):
        raise TypeError("partition is one text, not a sequence of parts")
    faults = [repr(part) for part in (stage, *partition) if not is_part(part)]
    if len(partition) > MAX_DEPTH:
        faults.append(f"{len(partition)} parts")
    if faults:
        raise ConfigError(
            f"{', '.join(faults)} cannot be part of an artifact's name",
            f"stage {stage!r}, partition {tuple(partition)!r}",
            "use 1-100 characters of a-z, 0-9, '@', 'L', '.', '_' and '-', starting with a letter "
            "or digit, no device name such as 'con', nothing like a fingerprint, at most "
            f"{MAX_DEPTH} parts",
        )


def check_key(key: ArtifactKey) -> ArtifactKey:
    """Return `key` if it names a place inside the store.

    Raises:
        ConfigError: as `check_partition`, or the fingerprint is not 16-32 characters of 0-9 a-f.
    """
    check_partition(key.stage, key.partition)
    if not is_fingerprint(key.fingerprint):
        raise ConfigError(
            f"{key.fingerprint!r} is not a fingerprint",
            f"artifact {str(key)!r}",
            "make it with taprobe_core.store.fingerprint",
        )
    return key


def parse_key(text: str) -> ArtifactKey:
    """Parse `stage/part/.../fingerprint`, the form that `str(key)` gives.

    Raises:
        ConfigError: `text` has another form.
    """
    stage, *partition = text.split("/")
    version = partition.pop() if partition else ""
    return check_key(ArtifactKey(stage, tuple(partition), version))
