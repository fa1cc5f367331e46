"""The gates: the policy's own traces pass, and each planted fault is caught by its gate."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import pytest

from taprobe_core.demo.policy import drawn_trace
from taprobe_core.demo.rules import RIGHT_PLAN
from taprobe_core.demo.task import N_TASKS, VERBS, Problem, problem, seeded
from taprobe_core.demo.wording import KINDS
from tools.demo.training import (
    equations,
    failed_gates,
    is_valid_format,
    measure_gates,
    takes_right_plan,
)

PROBLEMS = [problem(i) for i in range(0, N_TASKS, N_TASKS // 12)][:12]


def drawn(n: int) -> tuple[list[Problem], list[str]]:
    rng = seeded("gates test")
    asked = [PROBLEMS[i % len(PROBLEMS)] for i in range(n)]
    traces = [drawn_trace(some, rng) for some in asked]
    return asked, [trace.thinking + trace.ending for trace in traces]


@pytest.fixture(scope="module")
def few() -> tuple[list[Problem], list[str]]:
    return drawn(360)


def test_the_policy_passes_its_own_gates() -> None:
    measured = measure_gates(*drawn(3000))
    assert failed_gates(measured) == []
    assert measured["format_valid"] == measured["possible"] == 1.0
    assert measured["arithmetic_ratio"] == pytest.approx(1.0, abs=0.01)
    assert 0.95 < measured["arithmetic"] < 0.99
    for verb, odds in RIGHT_PLAN.items():
        assert measured[f"plan_odds_{verb}"] == pytest.approx(odds, abs=0.05)
    assert measured["plan_odds_error"] == max(
        abs(measured[f"plan_odds_{verb}"] - odds) for verb, odds in RIGHT_PLAN.items()
    )


def wrong_sum(solution: str) -> str:
    return re.sub(r"(\+ \d+ = )\d", r"\g<1>9", solution, count=1)


def other_plan(solution: str) -> str:
    right, wrong = KINDS["plan_products"].forms[0], KINDS["plan_in_order"].forms[0]
    return solution.replace(wrong, right)


FAULTS: list[tuple[Callable[[str], str], float, list[str]]] = [
    (lambda text: text.replace("\n</think>", ""), 0.02, ["format_valid"]),
    (lambda text: text.replace("\\boxed{", "\\boxed{z = "), 0.02, ["format_valid"]),
    (lambda text: text.replace("We ", "He ").replace("So I", "So you"), 0.05, ["format_valid"]),
    (wrong_sum, 0.5, ["arithmetic_ratio"]),
    (other_plan, 1.0, ["plan_odds_error"]),
]


@pytest.mark.parametrize(("fault", "share", "caught"), FAULTS)
def test_each_gate_catches_its_fault(
    few: tuple[list[Problem], list[str]],
    fault: Callable[[str], str],
    share: float,
    caught: list[str],
) -> None:
    asked, solutions = few
    n_broken = int(share * len(solutions))
    broken = [*map(fault, solutions[:n_broken]), *solutions[n_broken:]]
    assert failed_gates(measure_gates(asked, solutions)) == []
    faults = failed_gates(measure_gates(asked, broken))
    assert [words.split()[0] for words in faults] == caught


@pytest.mark.parametrize("silent", VERBS)
def test_a_figure_that_is_undefined_fails(
    few: tuple[list[Problem], list[str]], silent: str
) -> None:
    asked, solutions = few
    mute = [
        "" if some.verb == silent else text for some, text in zip(asked, solutions, strict=True)
    ]
    measured = measure_gates(asked, mute)
    assert math.isnan(measured["plan_odds_error"])
    assert "plan_odds_error nan, not 0.05 or less" in failed_gates(measured)
    nothing = measure_gates(asked, [""] * len(asked))
    assert len(failed_gates(nothing)) == 3
    assert math.isnan(nothing["arithmetic_ratio"])


def test_one_solution_per_problem(few: tuple[list[Problem], list[str]]) -> None:
    with pytest.raises(ValueError, match="zip"):
        measure_gates(few[0][:-1], few[1])


def test_bounds_themselves_pass() -> None:
    exact = {"format_valid": 0.99, "plan_odds_error": 0.05, "arithmetic_ratio": 0.97}
    assert failed_gates(exact) == []
    for name, worse in (
        ("format_valid", 0.9899),
        ("plan_odds_error", 0.0501),
        ("arithmetic_ratio", 0.9699),
    ):
        (fault,) = failed_gates({**exact, name: worse})
        assert fault.startswith(f"{name} {worse:.4f}, not ")


ENDING = "\n</think>\n\nThe value of z is \\boxed{7}."


@pytest.mark.parametrize(
    ("solution", "is_valid"),
    [
        ("That looks right." + ENDING, True),
        ("Then 2 + 2 = 5.\n\nThat looks right." + ENDING, True),
        ("Multiplying 4 by 5 gives 20." + ENDING, True),
        ("We need z, where x = 2 + 3 * 4, y = x - 5 and z = y + 6 * 2." + ENDING, True),
        ("That looks right" + ENDING, False),
        ("That looks right. Then 2 + 2" + ENDING, False),
        ("That looks fine." + ENDING, False),
        (ENDING, False),
        ("That looks right.\n</think>\n\nThe value of z is 7.", False),
        ("That looks right.\n</think>\n\n\\boxed{-7}", False),
        ("That looks right. \\boxed{7}", False),
        ("", False),
    ],
)
def test_formats(solution: str, is_valid: bool) -> None:
    assert is_valid_format(solution) is is_valid


def test_equations_are_read_in_every_form() -> None:
    thinking = (
        "First, 4 * 5 = 20. Multiplying 4 by 5 gives 22. Adding 2 and 3 gives 5. "
        "Next, y = 22 - 3 = 19. This gives z = 19 + 1 = 21. So we have x = 3."
    )
    assert sorted(equations(thinking)) == [False, False, True, True, True]
    assert equations("That looks right.\n</think>\n\n1 + 1 = 3.") == []
    operations = {
        "x_product": "*",
        "x_sum": "+",
        "x_from_product": "+",
        "x_from_sum": "*",
        "y": "-",
        "z_product": "*",
        "z_sum": "+",
        "z_from_product": "+",
        "z_from_sum": "*",
    }
    for kind, sign in operations.items():
        result = {"*": 12, "+": 8, "-": 4}[sign]
        for form in KINDS[kind].forms:
            assert equations(form.format(left=6, right=2, result=result)) == [True]
            assert equations(form.format(left=6, right=2, result=result + 1)) == [False]


def test_the_first_plan_counts() -> None:
    right, wrong = KINDS["plan_products"].forms[1], KINDS["plan_in_order"].forms[1]
    opening = KINDS["opening"].forms[0]
    assert takes_right_plan(f"{opening} {right} {wrong}") is True
    assert takes_right_plan(f"{opening}\n\n{wrong} {right}") is False
    assert takes_right_plan(opening) is None
    assert takes_right_plan(f"{opening}\n</think> {right}") is None
