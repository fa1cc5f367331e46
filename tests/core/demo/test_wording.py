"""What the demo's sentences say: shared words, invariants of forms, few sentences that matter."""

from __future__ import annotations

import re
from collections import defaultdict
from functools import cache

import numpy as np
import pytest

from taprobe_core.demo import SETTINGS, choose_problems, true_importance
from taprobe_core.demo.policy import drawn_trace, policy
from taprobe_core.demo.rules import State
from taprobe_core.demo.task import Problem, Trace, seeded
from taprobe_core.demo.wording import KINDS
from taprobe_core.labels import trigram_masked_dissimilar

PLACEHOLDER = re.compile(r"\{(\w+)\}")

NEW_KINDS = {
    *("more", "nod", "recap", "second_check", "second_approval"),
    *(f"reminder_{place}_{plan}" for place in "yz" for plan in ("products", "in_order")),
}

MATTER = {
    "plan_products": {"reminder_y_products", "reminder_z_products"},
    "plan_in_order": {"reminder_y_in_order", "reminder_z_in_order"},
    "alarm": {"doubt"},
    "approval": {"nod", "second_approval"},
}
"""Kinds that decide much, and kinds with the same forms that decide nothing."""


def graded(asked: Problem, setting: str) -> Trace:
    rng = seeded("graded", asked.id, setting)
    while True:
        trace = drawn_trace(asked, rng)
        if trace.is_correct == SETTINGS[setting]:
            return trace


@cache
def spoken(setting: str) -> list[tuple[str, str, float]]:
    """(kind, text, true importance) of every sentence in one trace of each of 20 problems.

    The last sentence, whose importance is 0 by definition, is left out.
    """
    found = []
    for asked in choose_problems(20, seed=0):
        texts = [sentence.text for sentence in graded(asked, setting).sentences]
        kinds = [state.stage for state in policy(asked).replay(texts)[1:]]
        effects = true_importance(asked, texts, trigram_masked_dissimilar)
        found += list(zip(kinds, texts, effects, strict=True))[:-1]
    return found


@pytest.mark.parametrize("setting", SETTINGS)
def test_few_sentences_matter(setting: str) -> None:
    effects = np.abs([effect for _, _, effect in spoken(setting)])
    assert 0.10 <= np.mean(effects > 0.1) <= 0.25
    assert np.mean(effects < 0.02) > 0.6


def test_the_same_words_matter_in_one_place_and_not_in_another() -> None:
    sizes: dict[tuple[str, str], list[float]] = defaultdict(list)
    for setting in SETTINGS:
        for kind, text, effect in spoken(setting):
            sizes[kind, text].append(abs(effect))
    for kind, idle in MATTER.items():
        for form in KINDS[kind].forms:
            assert max(sizes[kind, form]) > 0.2, (kind, form)
            nothing = [size for other in idle for size in sizes[other, form]]
            assert nothing, (kind, form)
            assert min(nothing) < 1e-9, (kind, form)


def test_kinds_that_matter_share_every_form_with_kinds_that_do_not() -> None:
    for kind, idle in MATTER.items():
        assert {KINDS[other].forms for other in idle} == {KINDS[kind].forms}


def test_new_kinds_are_there_and_are_said() -> None:
    assert set(KINDS) >= NEW_KINDS
    said = {kind for setting in SETTINGS for kind, _, _ in spoken(setting)}
    assert said >= NEW_KINDS


@pytest.mark.parametrize("name", KINDS)
def test_forms_of_a_kind_carry_the_same_numbers_and_close_once(name: str) -> None:
    kind = KINDS[name]
    assert len(set(kind.forms)) == len(kind.forms) >= 2
    assert len({frozenset(PLACEHOLDER.findall(form)) for form in kind.forms}) == 1
    for form in kind.forms:
        assert re.findall(r"[.?!]", form) == [form[-1]]
        assert len(PLACEHOLDER.sub("0", form)) >= 10
    assert 0 <= kind.paragraph <= 1
    assert 2 <= len(kind.summary.split()) <= 4


def test_a_reminder_says_the_plan_in_force() -> None:
    (asked,) = choose_problems(1, seed=0)
    solver = policy(asked)
    waiting, seen = [State()], set()
    while waiting:
        state = waiting.pop()
        for branch in solver.branches(state):
            if branch.after.stage.startswith("reminder_"):
                plan = "in_order" if state.in_order else "products"
                assert branch.text in KINDS[f"plan_{plan}"].forms
                assert branch.after._replace(stage="") == state._replace(stage="")
            if branch.after not in seen:
                seen.add(branch.after)
                waiting.append(branch.after)
