from __future__ import annotations

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from taprobe_core.errors import ConfigError
from taprobe_core.store import ArtifactKey, fingerprint, parse_key
from taprobe_core.store.fingerprint import NotJsonError, canonical_json, check_key, is_part, plain

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
)
KEYS = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=12,
)
CONFIGS = st.dictionaries(KEYS, VALUES, max_size=5)


def respelled(value: object) -> object:
    """The same value with tuples for lists and the keys in the opposite order."""
    if isinstance(value, dict):
        return {key: respelled(value[key]) for key in reversed(list(value))}
    if isinstance(value, list):
        return tuple(respelled(item) for item in value)
    return value


@settings(max_examples=60, deadline=None)
@given(config=CONFIGS)
def test_spelling_is_irrelevant(config: dict[str, object]) -> None:
    other = respelled(config)
    assert isinstance(other, dict)
    assert fingerprint("labels", "1", config, ["a"]) == fingerprint("labels", "1", other, ("a",))


@settings(max_examples=60, deadline=None)
@given(config=CONFIGS)
def test_canonical_text_is_a_fixed_point(config: dict[str, object]) -> None:
    text = canonical_json(config)
    assert json.loads(text) == config
    assert canonical_json(json.loads(text)) == text
    assert text.isascii()


@pytest.mark.parametrize(
    "other",
    [
        ("spans", "1", {"k": 1}, ["a", "b"]),
        ("labels", "2", {"k": 1}, ["a", "b"]),
        ("labels", "1", {"k": 2}, ["a", "b"]),
        ("labels", "1", {"k": 1.0}, ["a", "b"]),
        ("labels", "1", {"k": True}, ["a", "b"]),
        ("labels", "1", {"k": "1"}, ["a", "b"]),
        ("labels", "1", {"k": [1]}, ["a", "b"]),
        ("labels", "1", {"k": 1, "l": None}, ["a", "b"]),
        ("labels", "1", {"k": 1}, ["b", "a"]),
        ("labels", "1", {"k": 1}, ["ab"]),
        ("labels", "1", {"k": 1}, []),
    ],
)
def test_any_change_changes_it(other: tuple[str, str, dict[str, object], list[str]]) -> None:
    assert fingerprint("labels", "1", {"k": 1}, ["a", "b"]) != fingerprint(*other)


def test_the_value_is_part_of_the_format() -> None:
    # A change of this value would orphan every artifact ever written.
    assert fingerprint("labels", "1", {"b": (1, 2.5), "a": None}, ["x"]) == "b4a91e20650013dd194e"


def deep(levels: int) -> list[object]:
    value: list[object] = []
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("value", "at"),
    [
        (math.nan, "$.config.a[1]"),
        (math.inf, "$.config.a[1]"),
        ({1: 2}, "$.config.a[1]"),
        ({1, 2}, "$.config.a[1]"),
        (b"x", "$.config.a[1]"),
        (2**63, "$.config.a[1]"),
        ("\ud800", "$.config.a[1]"),
        ({"\ud800": 1}, "$.config.a[1]"),
        (deep(200), "$.config.a[1]"),
    ],
)
def test_what_json_cannot_hold_is_refused_with_its_path(value: object, at: str) -> None:
    with pytest.raises(ConfigError, match="cannot be part of a fingerprint") as caught:
        fingerprint("labels", "1", {"a": [0, value]}, [])
    assert at in str(caught.value)
    assert "Fix:" in str(caught.value)


def test_nesting_up_to_the_limit_is_kept() -> None:
    assert plain(deep(99)) == deep(99)
    with pytest.raises(NotJsonError, match="100 levels"):
        plain(deep(100))


GOOD = ("labels", ("deepseek-r1@L16", "correct_base_solution@s00", "330"), "0" * 20)


def test_a_key_prints_as_its_path_and_parses_back() -> None:
    key = check_key(ArtifactKey(*GOOD))
    assert str(key) == "labels/deepseek-r1@L16/correct_base_solution@s00/330/" + "0" * 20
    assert parse_key(str(key)) == key
    assert parse_key("leaderboard/" + "f" * 20) == ArtifactKey("leaderboard", (), "f" * 20)


@pytest.mark.parametrize("text", ["", "labels", "labels/", "/labels/" + "0" * 20, "a//" + "0" * 20])
def test_a_text_that_is_no_key_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_key(text)


HOSTILE = [
    "..", ".", "", "../../etc", "/abs", "a/b", "a\\b", "a\0b", "a\n", "con", "con.txt", "nul",
    "lpt1", "com9.log", "current", "CURRENT", ".lock", ".tmp-x", "a b", "a.", "Ä", "x" * 101,
    "-rf", "@L01", "a:b", "~", "$HOME", "0123456789abcdef", "f" * 32,
]  # fmt: skip


@pytest.mark.parametrize("part", HOSTILE)
def test_hostile_names_are_refused_everywhere(part: str) -> None:
    for key in (ArtifactKey(part, (), "0" * 20), ArtifactKey("labels", ("a", part), "0" * 20)):
        with pytest.raises(ConfigError) as caught:
            check_key(key)
        assert repr(part) in str(caught.value)
    with pytest.raises(ConfigError):
        check_key(ArtifactKey("labels", ("a",), part.upper() if part else part))


@pytest.mark.parametrize("version", ["0" * 15, "0" * 33, "g" * 20, "../" + "0" * 20, "CURRENT"])
def test_a_fingerprint_has_one_form(version: str) -> None:
    with pytest.raises(ConfigError, match="not a fingerprint"):
        check_key(ArtifactKey("labels", ("a",), version))


def test_too_many_parts_are_refused() -> None:
    check_key(ArtifactKey("labels", ("a",) * 8, "0" * 20))
    with pytest.raises(ConfigError, match="9 parts"):
        check_key(ArtifactKey("labels", ("a",) * 9, "0" * 20))


def test_one_text_is_not_taken_for_a_sequence() -> None:
    with pytest.raises(TypeError, match="upstream"):
        fingerprint("labels", "1", {}, "abc")
    with pytest.raises(TypeError, match="partition"):
        check_key(ArtifactKey("labels", "abc", "0" * 20))  # type: ignore[arg-type]


@settings(deadline=None)
@given(part=st.text(max_size=120))
def test_an_accepted_part_is_one_safe_folder_name(part: str) -> None:
    if is_part(part):
        assert 1 <= len(part) <= 100
        assert not set(part) & set('/\\:\0\n <>"|?*')
        assert part[0] not in ".-"
        assert part[-1] != "."
