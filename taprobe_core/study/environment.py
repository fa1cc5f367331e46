"""Replace `${VAR}` and `${VAR:-default}` in a location by the values of environment variables.

A study is often somebody else's, and its texts end in manifests and reports. Variables therefore
stand only where a location does, and never one that by its name holds a secret.

As in a shell: the default is taken when the variable is unset or empty, and may itself hold
variables. `$${` stands for a literal `${`. A replaced value is never expanded again, so a variable
cannot smuggle in another one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_MAX_DEPTH = 10
_SECRET = re.compile(r"TOKEN(?!IZER)|KEY|SECRET|PASS|CREDENTIAL|AUTH(?!OR)", re.IGNORECASE)
_OPENING = re.compile(r"\$\$\{|\$\{([A-Za-z0-9_]*)")
_MARK = re.compile(r"\$\$\{|\$\{|\}")


class ExpansionError(ValueError):
    """A text holds a `${...}` that has no end, no variable's name, or too many others in it."""


def variables(text: str) -> list[str]:
    """Return the names of a text's variables, those in defaults too, in the order met.

    Example:
        >>> variables("${ROOT:-${HOME}}/$${no}")
        ['ROOT', 'HOME']
    """
    found = _OPENING.finditer(text)
    return [mark.group(1) for mark in found if mark.group(1) is not None]


def is_secret(name: str) -> bool:
    """Whether a variable by its name holds something that no report may show."""
    return _SECRET.search(name) is not None


def expand(text: str, environ: Mapping[str, str]) -> tuple[str, list[str]]:
    """Expand the variables of a text.

    Args:
        text: any text.
        environ: values of the variables.

    Returns:
        The expanded text, and the names of variables that have neither value nor default, in the
        order met; an unset one is replaced by nothing.

    Raises:
        ExpansionError: `${` without `}`, something else than a name between them, or more than ten
            levels.

    Example:
        >>> expand("${ROOT:-/data}/rollouts", {})
        ('/data/rollouts', [])
    """
    unset: list[str] = []
    return _expand(text, environ, unset), unset


def _expand(text: str, environ: Mapping[str, str], unset: list[str]) -> str:
    parts: list[str] = []
    at = 0
    while (mark := _next_opening(text, at)) is not None:
        parts.append(text[at : mark.start()])
        if mark.group() == "$${":
            parts.append("${")
            at = mark.end()
            continue
        end = _closing(text, mark.end())
        parts.append(_value(text[mark.end() : end], environ, unset))
        at = end + 1
    return "".join([*parts, text[at:]])


def _next_opening(text: str, at: int) -> re.Match[str] | None:
    return next((mark for mark in _MARK.finditer(text, at) if mark.group() != "}"), None)


def _closing(text: str, at: int) -> int:
    depth = 1
    for mark in _MARK.finditer(text, at):
        if mark.group() == "${":
            depth += 1
        elif mark.group() == "}":
            depth -= 1
        if depth > _MAX_DEPTH:
            raise ExpansionError(f"variables nested deeper than {_MAX_DEPTH}")
        if depth == 0:
            return mark.start()
    raise ExpansionError("`${` without a closing `}`")


def _value(body: str, environ: Mapping[str, str], unset: list[str]) -> str:
    name, has_default, default = body.partition(":-")
    if not _NAME.fullmatch(name):
        raise ExpansionError(f"`${{{name}}}` does not name a variable")
    value = environ.get(name, "")
    if value:
        return value
    if has_default:
        return _expand(default, environ, unset)
    unset.append(name)
    return ""
