"""Texts of a trained reasoner beside texts of the policy -> has it learned what it was taught?

Three gates: the format is valid, the plan is chosen as often as the policy chooses it, sums and
products come out right as often as the policy's. What does not belong here: sampling, training.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Mapping, Sequence

import numpy as np

from taprobe_core.demo.policy import drawn_trace
from taprobe_core.demo.reading import THINK_END, boxed, read_trace, split_sentences
from taprobe_core.demo.rules import RIGHT_PLAN
from taprobe_core.demo.task import VERBS, Problem
from taprobe_core.demo.trace import seeded
from taprobe_core.demo.wording import KINDS

MIN_FORMAT_VALID = 0.99
MAX_PLAN_ODDS_ERROR = 0.05
MIN_ARITHMETIC_RATIO = 0.97

_RIGHT = frozenset(KINDS["plan_products"].forms)
_PLANS = _RIGHT | frozenset(KINDS["plan_in_order"].forms)
_FORMS = [
    re.compile(re.sub(r"\\\{\w+\\\}", r"(?:[\\w ,=+*-]+)", re.escape(form)))
    for kind in KINDS.values()
    for form in kind.forms
]
_EQUATION = re.compile(r"(\d+) ([+*-]) (\d+) = (\d+)")
_SPOKEN = re.compile(r"(Multiplying|Adding) (\d+) (?:by|and) (\d+) gives (\d+)")
_OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul}


def is_valid_format(solution: str) -> bool:
    """Whether every sentence has a form of the policy, and an answer is boxed after the thinking.

    Numbers may be wrong, and sentences may stand in a wrong order.

    Args:
        solution: everything after the prompt.
    """
    thinking, tag, rest = solution.partition(THINK_END)
    texts, _, left = split_sentences(thinking)
    if not (tag and texts and not left and boxed(rest).isdecimal()):
        return False
    return all(any(form.fullmatch(text) for form in _FORMS) for text in texts)


def equations(solution: str) -> list[bool]:
    """Return, for each equation in the thinking, whether it is right."""
    thinking = solution.partition(THINK_END)[0]
    found = [(a, sign, b, c) for a, sign, b, c in _EQUATION.findall(thinking)]
    found += [
        (a, "*" if verb == "Multiplying" else "+", b, c)
        for verb, a, b, c in _SPOKEN.findall(thinking)
    ]
    return [_OPERATORS[sign](int(a), int(b)) == int(c) for a, sign, b, c in found]


def takes_right_plan(solution: str) -> bool | None:
    """Whether the first plan is to do the products first; None without a plan."""
    texts, _, _ = split_sentences(solution.partition(THINK_END)[0])
    plan = next((text for text in texts if text in _PLANS), None)
    return None if plan is None else plan in _RIGHT


def measure_gates(problems: Sequence[Problem], solutions: Sequence[str]) -> dict[str, float]:
    """Measure the gates.

    Args:
        problems: one per solution; every verb occurs.
        solutions: whole solutions of the trained reasoner, temperature 1.

    Returns:
        format_valid: share of valid formats. possible: share that the policy could have said to
        the letter. plan_odds_<verb>: share of right plans; plan_odds_error: the largest distance
        of these from the policy's odds. arithmetic: share of right equations; arithmetic_ratio:
        this over the same share of as many traces of the policy on the same problems.
    """
    rng = seeded("gates")
    policys = [trace.thinking for trace in (drawn_trace(some, rng) for some in problems)]
    odds = {verb: _right_plans(problems, solutions, verb) for verb in VERBS}
    arithmetic = _share_right(solutions)
    n = len(solutions)
    return {
        "format_valid": sum(map(is_valid_format, solutions)) / n,
        "possible": sum(
            read_trace(*pair) is not None for pair in zip(problems, solutions, strict=True)
        )
        / n,
        **{f"plan_odds_{verb}": share for verb, share in odds.items()},
        # Unlike `max`, this is NaN wherever one of them is.
        "plan_odds_error": float(np.max([abs(odds[verb] - RIGHT_PLAN[verb]) for verb in VERBS])),
        "arithmetic": arithmetic,
        "arithmetic_ratio": arithmetic / _share_right(policys),
    }


def failed_gates(measured: Mapping[str, float]) -> list[str]:
    """Return what a reasoner fails, in words; empty if it passes."""
    # Written so that an undefined figure (NaN) fails.
    faults = [
        f"{name} {measured[name]:.4f}, not {bound} or more"
        for name, bound in (
            ("format_valid", MIN_FORMAT_VALID),
            ("arithmetic_ratio", MIN_ARITHMETIC_RATIO),
        )
        if not measured[name] >= bound
    ]
    error = measured["plan_odds_error"]
    if not error <= MAX_PLAN_ODDS_ERROR:
        faults.append(f"plan_odds_error {error:.4f}, not {MAX_PLAN_ODDS_ERROR} or less")
    return faults


def _right_plans(problems: Sequence[Problem], solutions: Sequence[str], verb: str) -> float:
    plans = [
        plan
        for some, solution in zip(problems, solutions, strict=True)
        if some.verb == verb and (plan := takes_right_plan(solution)) is not None
    ]
    return sum(plans) / len(plans) if plans else math.nan


def _share_right(solutions: Sequence[str]) -> float:
    found = [right for solution in solutions for right in equations(solution)]
    return sum(found) / len(found) if found else math.nan
