"""The rules of the demo's reasoner: from a state, every next kind of sentence and its chance.

    setup, facts?, opening, more?, doubt?, PLAN, x in two steps, conclusion?, nod?, bridge?,
    reminder?, y, reminder?, z in two steps,
    check?, then approval, second look? / Wait and redo / false alarm, recap?, answer

The plan decides the outcome, products may slip, and the first check may notice either: so few
sentences matter, and it is known which. A reminder repeats the plan in its own words, and a nod or
a second approval repeats the first: the same sentence decides everything in one place and nothing
in another, so its words alone do not tell. What does not belong here: words (`wording`), drawing
and solving (`policy`). Invariant: a state is a function of the text so far; no rule depends on
anything that the text does not show.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from taprobe_core.demo.task import Problem

RIGHT_PLAN = {"Compute": 0.80, "Find": 0.55, "Evaluate": 0.35}
"""Chance of the right plan, by the verb of the statement."""

FACTS, MORE, DOUBT, CONCLUSION, NOD, BRIDGE, CHECK = 0.5, 0.35, 0.35, 0.6, 0.35, 0.25, 0.75
"""Chances that the optional sentences are spoken."""

REMINDER, SECOND_LOOK, RECAP = 0.5, 0.3, 0.3
"""Chances of the optional sentences that repeat what has been said."""

NOTICE_ORDER, NOTICE_SLIP, FALSE_ALARM, MOVE = 0.40, 0.6, 0.20, 0.5
"""Chances, at a check, to see the wrong order or a slip, to doubt a right order, to give it up."""

LARGE_PRODUCT, SLIP_LARGE, SLIP_SMALL = 15, 0.10, 0.03
"""Products from `LARGE_PRODUCT` on go wrong more often."""

SLIP_OFFSETS = (-2, 2, 10)
"""What a slip adds to a product, equally likely."""


class Product(NamedTuple):
    """A product as it was written down."""

    left: int
    right: int
    shown: int


class State(NamedTuple):
    """Everything that the next sentences depend on, the problem aside.

    Attributes:
        stage: kind of the last sentence; "start" before the first.
        in_order: whether the plan in force is to go from left to right.
        is_redo: whether this is the second attempt; there is no third.
        value: latest result of the running computation.
        y: y, while only the first step of z stands.
        slip: first wrong product of a first attempt, products first.
    """

    stage: str = "start"
    in_order: bool = False
    is_redo: bool = False
    value: int = 0
    y: int = 0
    slip: Product | None = None


class Move(NamedTuple):
    """One next kind of sentence (`after.stage`), its chance and the numbers that it says."""

    probability: float
    after: State
    numbers: dict[str, int | str]


def moves(problem: Problem, state: State) -> list[Move]:
    """Return what may follow `state`; probabilities sum to 1."""
    return _RULES[state.stage](problem, state)


def _say(probability: float, after: State, **numbers: int | str) -> Move:
    return Move(probability, after, numbers)


def _scaled(share: float, found: list[Move]) -> list[Move]:
    return [move._replace(probability=share * move.probability) for move in found]


def _start(problem: Problem, state: State) -> list[Move]:
    return [_say(1.0, state._replace(stage="setup"), givens=problem.givens)]


def _after_setup(_problem: Problem, state: State) -> list[Move]:
    return [
        _say(FACTS, state._replace(stage="facts")),
        _say(1 - FACTS, state._replace(stage="opening")),
    ]


def _after_facts(_problem: Problem, state: State) -> list[Move]:
    return [_say(1.0, state._replace(stage="opening"))]


def _after_opening(problem: Problem, state: State) -> list[Move]:
    more = _say(MORE, state._replace(stage="more"))
    return [more, *_scaled(1 - MORE, _after_more(problem, state))]


def _after_more(problem: Problem, state: State) -> list[Move]:
    doubt = _say(DOUBT, state._replace(stage="doubt"))
    return [doubt, *_scaled(1 - DOUBT, _plan(problem, state))]


def _plan(problem: Problem, state: State) -> list[Move]:
    right = RIGHT_PLAN[problem.verb]
    return [
        _say(right, state._replace(stage="plan_products", in_order=False)),
        _say(1 - right, state._replace(stage="plan_in_order", in_order=True)),
    ]


def _first_step(problem: Problem, state: State) -> list[Move]:
    if state.in_order:
        return _sum(state, "x_sum", problem.a, problem.b)
    return _product(state, "x_product", problem.b, problem.c)


def _x_from_product(problem: Problem, state: State) -> list[Move]:
    return _sum(state, "x_from_product", problem.a, state.value)


def _x_from_sum(problem: Problem, state: State) -> list[Move]:
    return _product(state, "x_from_sum", state.value, problem.c)


def _after_x(problem: Problem, state: State) -> list[Move]:
    conclusion = _say(CONCLUSION, state._replace(stage="conclusion"), result=state.value)
    return [conclusion, *_scaled(1 - CONCLUSION, _after_conclusion(problem, state))]


def _after_conclusion(problem: Problem, state: State) -> list[Move]:
    return [_say(NOD, state._replace(stage="nod")), *_scaled(1 - NOD, _after_nod(problem, state))]


def _after_nod(problem: Problem, state: State) -> list[Move]:
    bridge = _say(BRIDGE, state._replace(stage="bridge"))
    return [bridge, *_scaled(1 - BRIDGE, _after_bridge(problem, state))]


def _after_bridge(problem: Problem, state: State) -> list[Move]:
    return [_reminder("y", state), *_scaled(1 - REMINDER, _y(problem, state))]


def _reminder(before: str, state: State) -> Move:
    plan = "in_order" if state.in_order else "products"
    return _say(REMINDER, state._replace(stage=f"reminder_{before}_{plan}"))


def _y(problem: Problem, state: State) -> list[Move]:
    y = state.value - problem.d
    after = state._replace(stage="y", value=y)
    return [_say(1.0, after, left=state.value, right=problem.d, result=y)]


def _after_y(problem: Problem, state: State) -> list[Move]:
    return [_reminder("z", state), *_scaled(1 - REMINDER, _z(problem, state))]


def _z(problem: Problem, state: State) -> list[Move]:
    if state.in_order:
        return _sum(state, "z_sum", state.value, problem.e)
    return _product(state._replace(y=state.value), "z_product", problem.e, problem.f)


def _z_from_product(_problem: Problem, state: State) -> list[Move]:
    return _sum(state._replace(y=0), "z_from_product", state.y, state.value)


def _z_from_sum(problem: Problem, state: State) -> list[Move]:
    return _product(state, "z_from_sum", state.value, problem.f)


def _after_z(problem: Problem, state: State) -> list[Move]:
    check = _say(CHECK, state._replace(stage="check"))
    return [check, *_scaled(1 - CHECK, _after_second_approval(problem, state))]


def _after_check(_problem: Problem, state: State) -> list[Move]:
    approval = state._replace(stage="approval", slip=None)
    if state.is_redo:
        return [_say(1.0, approval)]
    if state.in_order:
        wait = State("wait_order", in_order=False, is_redo=True)
        return [_say(NOTICE_ORDER, wait), _say(1 - NOTICE_ORDER, approval)]
    alarm = _say(FALSE_ALARM, state._replace(stage="alarm", slip=None))
    if state.slip is None:
        return [alarm, _say(1 - FALSE_ALARM, approval)]
    wait = State("wait_slip", in_order=False, is_redo=True)
    return [
        alarm,
        _say(NOTICE_SLIP, wait, **state.slip._asdict()),
        _say(1 - FALSE_ALARM - NOTICE_SLIP, approval),
    ]


def _after_approval(problem: Problem, state: State) -> list[Move]:
    again = _say(SECOND_LOOK, state._replace(stage="second_check"))
    return [again, *_scaled(1 - SECOND_LOOK, _after_second_approval(problem, state))]


def _after_second_check(_problem: Problem, state: State) -> list[Move]:
    return [_say(1.0, state._replace(stage="second_approval"))]


def _after_second_approval(problem: Problem, state: State) -> list[Move]:
    recap = _say(RECAP, state._replace(stage="recap"))
    return [recap, *_scaled(1 - RECAP, _answer(problem, state))]


def _after_alarm(_problem: Problem, state: State) -> list[Move]:
    return [
        _say(MOVE, State("move", in_order=True, is_redo=True)),
        _say(1 - MOVE, state._replace(stage="stay")),
    ]


def _answer(_problem: Problem, state: State) -> list[Move]:
    return [_say(1.0, State("answer", value=state.value), result=state.value)]


def _sum(state: State, stage: str, left: int, right: int) -> list[Move]:
    after = state._replace(stage=stage, value=left + right)
    return [_say(1.0, after, left=left, right=right, result=after.value)]


def _product(state: State, stage: str, left: int, right: int) -> list[Move]:
    true = left * right
    rate = SLIP_LARGE if true >= LARGE_PRODUCT else SLIP_SMALL
    right_after = state._replace(stage=stage, value=true)
    found = [_say(1 - rate, right_after, left=left, right=right, result=true)]
    for offset in SLIP_OFFSETS:
        shown = true + offset
        # Only a check of a first attempt, products first, looks at single products.
        unseen = state.in_order or state.is_redo
        slip = None if unseen else state.slip or Product(left, right, shown)
        after = state._replace(stage=stage, value=shown, slip=slip)
        share = rate / len(SLIP_OFFSETS)
        found.append(_say(share, after, left=left, right=right, result=shown))
    return found


_RULES: dict[str, Callable[[Problem, State], list[Move]]] = {
    "start": _start,
    "setup": _after_setup,
    "facts": _after_facts,
    "opening": _after_opening,
    "more": _after_more,
    "doubt": _plan,
    **dict.fromkeys(
        ("plan_products", "plan_in_order", "wait_order", "wait_slip", "move"), _first_step
    ),
    "x_product": _x_from_product,
    "x_sum": _x_from_sum,
    **dict.fromkeys(("x_from_product", "x_from_sum"), _after_x),
    "conclusion": _after_conclusion,
    "nod": _after_nod,
    "bridge": _after_bridge,
    **dict.fromkeys(("reminder_y_products", "reminder_y_in_order"), _y),
    "y": _after_y,
    **dict.fromkeys(("reminder_z_products", "reminder_z_in_order"), _z),
    "z_product": _z_from_product,
    "z_sum": _z_from_sum,
    **dict.fromkeys(("z_from_product", "z_from_sum"), _after_z),
    "check": _after_check,
    "alarm": _after_alarm,
    "approval": _after_approval,
    "second_check": _after_second_check,
    **dict.fromkeys(("second_approval", "stay"), _after_second_approval),
    "recap": _answer,
}
