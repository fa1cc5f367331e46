"""Build and parse partition keys; nothing else in the project joins or splits them.

Four dimensions become two by pairing those that depend on each other:

    site  = model@Lnn     a model at a layer          deepseek-r1-distill-llama-8b@L16
    trial = setting@snn   a setting at a seed         correct_base_solution@s00

Keys are slugs; `@` appears only as the joint. Layer n is the output of block n, counted from 0.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from taprobe_core.errors import ConfigError

_FINGERPRINT = re.compile(r"[0-9a-f]{16,32}")
_RESERVED = frozenset(
    ["con", "prn", "aux", "nul", "current"]
    + [f"{device}{n}" for device in ("com", "lpt") for n in range(1, 10)]
)
_SLUG = re.compile(r"[a-z0-9][a-z0-9._-]{0,99}")
_SITE = re.compile(r"(?P<model>[a-z0-9][a-z0-9._-]{0,99})@L(?P<layer>\d{2,3})")
_TRIAL = re.compile(r"(?P<setting>[a-z0-9][a-z0-9._-]{0,99})@s(?P<seed>\d{2,4})")

LONGEST_KEY = 100
"""Characters of a partition key, at most."""


class Site(NamedTuple):
    """A model at a layer; `layer` is the block index, counted from 0."""

    model: str
    layer: int

    def __str__(self) -> str:
        return f"{self.model}@L{self.layer:02d}"


class Trial(NamedTuple):
    """A setting at a seed."""

    setting: str
    seed: int

    def __str__(self) -> str:
        return f"{self.setting}@s{self.seed:02d}"


def is_reserved(name: str) -> bool:
    """Tell whether a name has a meaning of its own in a folder of artifacts.

    So has what some file system takes for a device or cuts off at its end, `current`, and anything
    like a fingerprint: 16-32 characters of 0-9 a-f.
    """
    return (
        name.endswith(".")
        or name.split(".")[0] in _RESERVED
        or _FINGERPRINT.fullmatch(name) is not None
    )


def check_slug(value: str, where: str) -> str:
    """Return `value` if it may stand in a partition key.

    Args:
        value: candidate, for example a model key or a setting.
        where: what the value names, for the message.

    Raises:
        ConfigError: `value` is not 1-100 characters of `a-z 0-9 . _ -` starting with a letter or
            digit, or is reserved.
    """
    if is_reserved(value):
        raise ConfigError(
            f"{value!r}, which no folder of artifacts can be called",
            where,
            "choose another name: no device such as 'con', not 'current', no dot at the end, and "
            "not 16-32 characters of 0-9 and a-f alone",
        )
    if not _SLUG.fullmatch(value):
        raise ConfigError(
            f"{value!r} cannot be a partition key",
            where,
            "use 1-100 characters of a-z, 0-9, '.', '_' and '-', starting with a letter or digit",
        )
    return value


def parse_site(key: str) -> Site:
    """Parse `model@Lnn`.

    Raises:
        ConfigError: `key` has another form.
    """
    match = _SITE.fullmatch(key)
    if match is None:
        raise ConfigError(f"{key!r} is not a site", None, "write it as model@Lnn: my-model@L07")
    return Site(match["model"], int(match["layer"]))


def parse_trial(key: str) -> Trial:
    """Parse `setting@snn`.

    Raises:
        ConfigError: `key` has another form.
    """
    match = _TRIAL.fullmatch(key)
    if match is None:
        raise ConfigError(f"{key!r} is not a trial", None, "write it as setting@snn: correct@s00")
    return Trial(match["setting"], int(match["seed"]))
