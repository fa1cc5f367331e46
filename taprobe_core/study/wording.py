"""Turn what pydantic found wrong with a study into faults in our own plain words.

Every fault names the key as it stands in the file, the value found, what is allowed, and the edit.
The rules themselves belong to the models; this module only says them, and knows from their JSON
schema which keys a place has.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from taprobe_core.study.config import Study
from taprobe_core.study.document import Document, Fault, KeyPath, key_name, shown
from taprobe_core.study.parts import COMMIT_SHA, FOLDER_NAME, HUB_ID

_EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "string_type": "text",
    "bool_type": "true or false",
    "tuple_type": "a list, such as [a, b]",
    "dict_type": "a mapping of keys to values",
    "model_type": "a mapping of keys to values",
    "greater_than_equal": "at least {ge}",
    "greater_than": "more than {gt}",
    "less_than_equal": "at most {le}",
    "less_than": "less than {lt}",
    "too_short": "a list of at least {min_length} value(s)",
    "string_too_short": "at least {min_length} character(s)",
}

_PATTERNS = {
    COMMIT_SHA: "a commit sha of 40 hexadecimal digits (branches and tags move), or null",
    HUB_ID: "a hub repository as org/name",
    FOLDER_NAME: "one folder name of letters, digits, '.', '_' and '-'",
}

_LAYERS = "all, quartiles, mid, or a list of block indices such as [8, 16]"


def value_faults(error: ValidationError, document: Document) -> Iterator[Fault]:
    """Yield the faults that validation found, less those under a fault of the document itself."""
    found = [
        (details, _path_in_file(details, document.values))
        for details in error.errors(include_url=False)
    ]
    reported = document.reported_paths
    places = reported | {path for _, path in found}
    for details, path in found:
        if any(path[:depth] in reported for depth in range(1, len(path) + 1)):
            continue
        is_of_items = any(place[: len(path)] == path and place != path for place in places)
        if details["type"] == "too_short" and is_of_items:
            continue  # the list is short only because its faulty items were left out
        fault = _fault(details, path, document)
        if fault is not None:
            yield fault


def _path_in_file(details: ErrorDetails, values: Any) -> KeyPath:
    """Drop the parts of pydantic's location that name union branches instead of keys."""
    path: list[str | int] = []
    for part in details["loc"]:
        is_key = isinstance(values, dict) and part in values
        is_index = isinstance(values, list) and isinstance(part, int) and part < len(values)
        if is_key or is_index:
            path.append(part)
            values = values[part]
    if details["type"] == "missing":
        path.append(details["loc"][-1])
    return tuple(path)


def _fault(details: ErrorDetails, path: KeyPath, document: Document) -> Fault | None:
    kind, context, found = details["type"], details.get("ctx", {}), details["input"]
    line = document.line(path)
    if kind == "missing":
        return Fault(path, line, "a required key is missing", f"add `{path[-1]}: ...`")
    if kind == "extra_forbidden":
        return _unknown_key(path, line, document.values)
    if kind == "study":
        at = (*path, *context["at"])
        return Fault(at, document.line(at), context["what"], context["fix"])
    if kind in {"union_tag_invalid", "union_tag_not_found"}:
        return _wrong_kind(path, document, found)
    if path[-1:] == ("layers",) and kind in {"literal_error", "tuple_type"}:
        is_spoken_of_by_other_branch = isinstance(found, list) or kind == "tuple_type"
        return None if is_spoken_of_by_other_branch else _wrong_value(path, line, found, _LAYERS)
    if kind == "literal_error":
        return _wrong_choice(path, line, found, _choices(context["expected"]))
    if kind == "string_pattern_mismatch":
        expected = _PATTERNS.get(context["pattern"], f"text that matches {context['pattern']}")
        return _wrong_value(path, line, found, expected)
    expected = _EXPECTED.get(kind, details["msg"]).format(**context)
    return _wrong_value(path, line, found, expected)


def _wrong_value(path: KeyPath, line: int | None, found: Any, expected: str) -> Fault:
    return Fault(path, line, f"found {shown(found)}", f"set {key_name(path)} to {expected}")


def _wrong_choice(path: KeyPath, line: int | None, found: Any, choices: Sequence[str]) -> Fault:
    guess = _closest(found, choices)
    hint = f"did you mean `{guess}`? " if guess else ""
    fix = f"{hint}set {key_name(path)} to one of {', '.join(choices)}"
    return Fault(path, line, f"found {shown(found)}", fix)


def _wrong_kind(path: KeyPath, document: Document, found: Any) -> Fault:
    choices = list(
        _schema_at(path, document.values, stop_at_union=True)["discriminator"]["mapping"]
    )
    here = (*path, "kind")
    if isinstance(found, dict) and "kind" in found:
        return _wrong_choice(here, document.line(here), found["kind"], choices)
    fix = f"add `kind: ...`, one of {', '.join(choices)}"
    return Fault(here, document.line(path), "a required key is missing", fix)


def _unknown_key(path: KeyPath, line: int | None, values: Any) -> Fault:
    known = list(_schema_at(path[:-1], values).get("properties", {}))
    guess = _closest(path[-1], known)
    if guess:
        return Fault(path, line, "unknown key", f"did you mean `{guess}`?")
    return Fault(path, line, "unknown key", f"remove it; the keys here are {', '.join(known)}")


def _closest(found: Any, choices: Sequence[str]) -> str | None:
    asked = str(found).lower()
    close = difflib.get_close_matches(asked, choices, n=1, cutoff=0.6)
    held = [choice for choice in choices if len(asked) > 2 and asked in choice]
    return next(iter(close or held), None)


def _choices(expected: str) -> list[str]:
    """Split pydantic's "'a', 'b' or 'c'"."""
    return [part.strip(" '") for part in expected.replace(" or ", ", ").split(",")]


@cache
def _schema() -> dict[str, Any]:
    return Study.model_json_schema()


def _schema_at(path: KeyPath, values: Any, *, stop_at_union: bool = False) -> Mapping[str, Any]:
    """Return the schema of the part at `path`; of a union, the branch that `kind` picks."""
    node = _resolved(_schema(), values)
    for depth, part in enumerate(path, start=1):
        keep_union = stop_at_union and depth == len(path)
        values = values[part]
        child = node["items"] if isinstance(part, int) else _member(node, part)
        node = child if keep_union else _resolved(child, values)
    return node


def _member(node: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    child: Mapping[str, Any] = node.get("properties", {}).get(key) or node["additionalProperties"]
    return child


def _resolved(node: Mapping[str, Any], values: Any) -> Mapping[str, Any]:
    if "discriminator" in node:
        kind = values["kind"]
        node = {"$ref": node["discriminator"]["mapping"][kind]}
    if "$ref" in node:
        definition: Mapping[str, Any] = _schema()["$defs"][node["$ref"].rpartition("/")[2]]
        return definition
    return node
