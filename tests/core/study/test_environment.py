"""`${VAR}` in a study's text values."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from taprobe_core.study.document import ExpansionError, expand


@pytest.mark.parametrize(
    ("text", "expected", "unset"),
    [
        ("plain", "plain", []),
        ("${A}/x/${B}", "a/x/b", []),
        ("${A:-other}", "a", []),
        ("${EMPTY:-other}", "other", []),
        ("${NONE:-}", "", []),
        ("${NONE:-${A}/../${B}}/end", "a/../b/end", []),
        ("${NONE:-${ALSO:-${B}}}", "b", []),
        ("${NONE}-${A}-${GONE}", "-a-", ["NONE", "GONE"]),
        ("${NONE:-${GONE}}", "", ["GONE"]),
        ("${A:-${GONE}}", "a", []),
        ("${EMPTY}", "", ["EMPTY"]),
        ("cost $5 {x} }", "cost $5 {x} }", []),
        ("$${A} and ${A}", "${A} and a", []),
        ("${NESTED}", "${A}", []),
    ],
)
def test_variables_and_defaults_follow_the_shell(
    text: str, expected: str, unset: list[str]
) -> None:
    environ = {"A": "a", "B": "b", "EMPTY": "", "NESTED": "${A}"}

    assert expand(text, environ) == (expected, unset)


@pytest.mark.parametrize(
    "text", ["${A", "${NONE:-${B}", "${}", "${1A}", "${A b}", "${A:?gone}", "${B:-" * 20 + "}" * 20]
)
def test_what_is_no_variable_is_refused(text: str) -> None:
    with pytest.raises(ExpansionError, match=r"closing|does not name|deeper than 10"):
        expand(text, {"A": "a"})


@given(st.text(alphabet=st.characters(exclude_characters="$"), max_size=40))
def test_text_without_variables_stays(text: str) -> None:
    assert expand(text, {}) == (text, [])


@given(st.text(max_size=40))
def test_values_are_taken_literally(value: str) -> None:
    result, unset = expand("<${A}>", {"A": value})

    assert (result, unset) == ((f"<{value}>", []) if value else ("<>", ["A"]))
