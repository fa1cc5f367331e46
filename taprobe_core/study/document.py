"""Read the YAML text of a study into plain values that know their lines; collect its faults.

Only what a study needs is accepted: mappings with text keys, lists, text, numbers, true, false and
null, by the rules of YAML 1.2 (so `no` is text and `1e-3` a number). Whatever YAML would let pass
in silence is a fault here: a key given twice, NaN, infinity, tags. A fault knows where it stands
(key and line), what was found there and what to write instead; those of the values are found in
`wording`. What the values mean belongs in `config`.

`${VAR}` and `${VAR:-default}` are replaced by values of environment variables. A study is often
somebody else's, and its texts end in manifests and reports: variables therefore stand only where a
location does, and never one that by its name holds a secret. As in a shell, the default is taken
when the variable is unset or empty, and may itself hold variables; `$${` stands for a literal `${`.
A replaced value is never expanded again, so a variable cannot smuggle in another one.

Invariant: a hostile file costs no more than its own size.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from taprobe_core.errors import ConfigError

KeyPath = tuple[str | int, ...]
"""Keys and list indices from the top of the file down to a value."""


@dataclass(frozen=True)
class Fault:
    """One thing to correct.

    Attributes:
        path: where it stands in the study.
        line: line of the file, counted from 1; None when the fault is of the whole file.
        what: what was found, in one sentence without a full stop.
        fix: the edit to make, or the command to type.
    """

    path: KeyPath
    line: int | None
    what: str
    fix: str


def key_name(path: KeyPath) -> str:
    """Return a path as a user writes it, for example `models.tiny.layers[2]`."""
    name = ""
    for part in path:
        name += f"[{part}]" if isinstance(part, int) else f".{part}" if name else part
    return name


def shown(value: Any, limit: int = 80) -> str:
    """Return a value as it may stand in a message: one line, printable, at most `limit` long."""
    text = repr(value) if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def fault_error(faults: Sequence[Fault], where: str) -> ConfigError:
    """Return the one error that says every fault, in the order of the file."""
    ordered = sorted(faults, key=lambda fault: fault.line or 0)
    if len(ordered) == 1:
        (fault,) = ordered
        place = where if fault.line is None else f"{where}:{fault.line}"
        name = key_name(fault.path)
        return ConfigError(fault.what, f"{place}, {name}" if name else place, fault.fix)
    listed = "".join(f"\n  - {_listed(fault)}" for fault in ordered)
    return ConfigError(
        f"{len(ordered)} faults", f"{where}:{listed}", "make the edit that each line names"
    )


def _listed(fault: Fault) -> str:
    place = [f"line {fault.line}"] if fault.line is not None else []
    name = key_name(fault.path)
    head = ", ".join([*place, name] if name else place)
    said = f"{fault.what}; fix: {fault.fix}"
    return f"{head}: {said}" if head else said


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


MAX_CHARACTERS = 1_000_000
LOCATIONS: tuple[KeyPath, ...] = (
    ("rollouts", "source", "folder"),
    ("models", "*", "checkpoint", "path"),
    ("models", "*", "tokenizer"),
)
"""Values in which `${VAR}` stands for an environment variable; `*` is any key."""
_LOCATION_NAMES = ", ".join(".".join(map(str, location)) for location in LOCATIONS)
_MAX_NODES = 10_000
_DOCUMENT_MAX_DEPTH = 20
_MAX_DIGITS = 100
_TAG = "tag:yaml.org,2002:"


class _TooLargeError(Exception):
    """More values or levels than a study has; the argument is the line reached."""


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2's core schema that gives up on a file beyond any study."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - the base class's own declaration

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.n_composed = 0
        self.depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self.n_composed += 1
        self.depth += 1
        if self.depth > _DOCUMENT_MAX_DEPTH or self.n_composed > _MAX_NODES:
            raise _TooLargeError(self.line + 1)
        node: yaml.Node | None = super().compose_node(parent, index)
        self.depth -= 1
        return node


for _kind, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
):
    _Loader.add_implicit_resolver(f"{_TAG}{_kind}", re.compile(f"^(?:{_pattern})$"), _first)


@dataclass
class Document:
    """Plain values of a study file, with what was wrong so far.

    Attributes:
        values: mappings, lists and scalars; None where a fault stands.
        lines: line of each value, counted from 1, by its path.
        faults: duplicate keys, NaN, unset variables and the like.
        reported_paths: that these faults speak of, where a further fault would say nothing new.
    """

    values: Any = None
    lines: dict[KeyPath, int] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    reported_paths: set[KeyPath] = field(default_factory=set)

    def line(self, path: KeyPath) -> int | None:
        """Line of a value, or of the nearest part around it that stands in the file."""
        while path and path not in self.lines:
            path = path[:-1]
        return self.lines.get(path)


def read_document(text: str, where: str, environ: Mapping[str, str]) -> Document:
    """Read a study's text."""
    if len(text) > MAX_CHARACTERS:
        raise fault_error(
            [_whole(f"{len(text):,} characters", "a study has at most 1,000,000")], where
        )
    root = _compose(text, where)
    if root is None:
        raise fault_error([_whole("an empty study", "start from studies/demo.yaml")], where)
    if not isinstance(root, yaml.MappingNode):
        fix = "begin with `name: ...`, as studies/demo.yaml does"
        raise fault_error([_whole("a study that is not a mapping of keys to values", fix)], where)
    builder = _Builder(where, environ)
    builder.document.values = builder.build(root, ())
    builder.report_unset()
    return builder.document


def _whole(what: str, fix: str) -> Fault:
    return Fault((), None, what, fix)


def _too_large(path: KeyPath, line: int | None, where: str) -> ConfigError:
    what = f"more than {_DOCUMENT_MAX_DEPTH} levels or {_MAX_NODES:,} values, aliases expanded"
    return fault_error([Fault(path, line, what, "write a flatter or smaller study")], where)


def _compose(text: str, where: str) -> yaml.Node | None:
    loader = None
    try:
        loader = _Loader(text)
        node: yaml.Node | None = loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        what = " ".join(part for part in (error.context, error.problem) if part)
        line = mark.line + 1 if mark else None
        fix = "correct it; indent with blanks, quote text with ': ' or '#', and ${VAR} in brackets"
        raise fault_error([Fault((), line, f"not YAML: {what}", fix)], where) from None
    except yaml.YAMLError as error:
        what = f"not YAML: {str(error).splitlines()[0]}"
        raise fault_error([_whole(what, "remove characters that are not text")], where) from None
    except _TooLargeError as error:
        raise _too_large((), error.args[0], where) from None
    finally:
        if loader is not None:
            loader.dispose()
    return node


def _is_location(path: KeyPath) -> bool:
    return any(
        len(path) == len(location)
        and all(part in {"*", found} for part, found in zip(location, path, strict=True))
        for location in LOCATIONS
    )


class _Builder:
    """Walks the YAML nodes once, aliases included, so that their number can be limited."""

    def __init__(self, where: str, environ: Mapping[str, str]) -> None:
        self.document = Document()
        self.where = where
        self.environ = environ
        self.n_nodes = 0
        self.unset: dict[str, list[KeyPath]] = defaultdict(list)

    def build(self, node: yaml.Node, path: KeyPath) -> Any:
        self.n_nodes += 1
        self.document.lines.setdefault(path, node.start_mark.line + 1)
        if len(path) > _DOCUMENT_MAX_DEPTH or self.n_nodes > _MAX_NODES:
            line = self.document.line(path)
            raise _too_large(path[:3], line, self.where)
        if isinstance(node, yaml.MappingNode) and node.tag == f"{_TAG}map":
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode) and node.tag == f"{_TAG}seq":
            return [self.build(item, (*path, index)) for index, item in enumerate(node.value)]
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node, path)
        self._fault(path, f"tag {shown(node.tag)}", "remove the tag")
        return None

    def report_unset(self) -> None:
        for name, paths in self.unset.items():
            self.document.reported_paths.update(paths)
            others = ", ".join(key_name(path) for path in paths[1:])
            what = f"environment variable {name} is not set" + (
                f" (also {others})" if others else ""
            )
            self._fault(paths[0], what, f"export {name}=..., or write ${{{name}:-default}}")

    def _fault(self, path: KeyPath, what: str, fix: str) -> None:
        self.document.reported_paths.add(path)
        self.document.faults.append(Fault(path, self.document.line(path), what, fix))

    def _mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if key_node.tag != f"{_TAG}str":
                found = key_node.value if isinstance(key_node, yaml.ScalarNode) else "a collection"
                what = f"a key that is not text: {found}"
                self.document.faults.append(Fault(path, line, what, "put the key in quotes"))
                continue
            key = str(key_node.value)
            here = (*path, key)
            if key in values:
                what = f"key {shown(key)} given again, first on line {self.document.lines[here]}"
                self.document.faults.append(Fault(here, line, what, "keep one of the two"))
                continue
            self.document.lines[here] = line
            values[key] = self.build(value_node, here)
        return values

    def _scalar(self, node: yaml.ScalarNode, path: KeyPath) -> Any:
        text = str(node.value)
        kind = node.tag.removeprefix(_TAG)
        if kind == "str":
            return self._text(text, path)
        if kind == "null":
            return None
        if kind == "bool" and text.lower() in {"true", "false"}:
            return text.lower() == "true"
        if kind in {"int", "float"}:
            return self._number(text, kind, path)
        self._fault(path, f"tag {shown(node.tag)}", "remove the tag")
        return None

    def _number(self, text: str, kind: str, path: KeyPath) -> int | float | None:
        try:
            value = int(text) if kind == "int" else float(text.lower().replace(".inf", "inf"))
        except ValueError:
            value = math.nan
        if len(text) > _MAX_DIGITS or not math.isfinite(value):
            self._fault(path, f"found {shown(text)}", "give a finite number")
            return None
        return value

    def _text(self, text: str, path: KeyPath) -> str | None:
        names = variables(text)
        if names and not _is_location(path):
            fix = f"write the value; only {_LOCATION_NAMES} take variables; for a literal ${{ $${{"
            self._fault(path, f"a variable in {shown(text)}, which is no location", fix)
            return None
        if secret := next(filter(is_secret, names), None):
            fix = "reports show locations; put this one into a variable of another name"
            self._fault(path, f"variable {secret}, which by its name holds a secret", fix)
            return None
        try:
            value, unset = expand(text, self.environ)
        except ExpansionError as error:
            fix = "write ${VAR} or ${VAR:-default}; for a literal ${ write $${"
            self._fault(path, f"{error} in {shown(text)}", fix)
            return None
        for name in unset:
            if path not in self.unset[name]:
                self.unset[name].append(path)
        if any(char == "\0" or "\ud800" <= char <= "\udfff" for char in value):
            self._fault(path, f"{shown(value)} holds a character that no text has", "remove it")
            return None
        return None if unset else value
