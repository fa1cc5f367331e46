"""The demo's reasoner: a stochastic policy over sentences, small enough to be solved exactly.

From a `State`, `Policy.branches` lists every next sentence with its probability and the state
after it. Drawing, resampling at any sentence and the exact chance of a right answer all come from
this one list, so the true importance of a sentence is known and not estimated. The policy:

    setup, facts?, opening, doubt?, PLAN, product (may slip), sum, x?, bridge?, y, second part, z,
    check?, then one of: approval / Wait and redo / false alarm, answer

What does not belong here: words (`wording`), files (`writer`), true effects (`truth`). Invariant: a
state is a function of the text so far, so resampling from a stored state equals resampling from
the text, and no branch depends on anything that the text does not show.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

from taprobe_core.demo.task import Problem
from taprobe_core.demo.trace import Continuation, Sentence, Trace
from taprobe_core.demo.wording import KINDS, dependencies
from taprobe_core.errors import DataError

PLAN_ODDS = {"Compute": 0.80, "Find": 0.55, "Evaluate": 0.35}
"""Chance of the right plan, by the verb of the statement."""

FACTS, DOUBT, CONSOLIDATION, BRIDGE, CHECK = 0.6, 0.35, 0.7, 0.25, 0.75
"""Chances that the optional sentences are spoken."""

NOTICE_ORDER, NOTICE_SLIP, FALSE_ALARM, MOVE = 0.35, 0.6, 0.10, 0.5
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
    """Everything the next sentences depend on, the problem aside.

    Attributes:
        stage: kind of the last sentence; "start" before the first.
        in_order: whether the plan in force is to go from left to right.
        redone: whether the one redo has been used.
        value: latest result of the running computation.
        y: y, while z's first step stands.
        slip: first wrong product of the attempt in force.
    """

    stage: str = "start"
    in_order: bool = False
    redone: bool = False
    value: int = 0
    y: int = 0
    slip: Product | None = None


class Branch(NamedTuple):
    """One possible next sentence."""

    probability: float
    kind: str
    text: str
    after: State


class _Move(NamedTuple):
    """A branch before its words are chosen."""

    probability: float
    after: State
    numbers: dict[str, int | str]


def _say(probability: float, after: State, **numbers: int | str) -> _Move:
    return _Move(probability, after, numbers)


class Policy:
    """The policy on one problem; computed branches and success rates are kept.

    Args:
        problem: the problem.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self._branches: dict[State, tuple[tuple[Branch, ...], list[float]]] = {}
        self._success: dict[State, float] = {}

    def branches(self, state: State) -> tuple[Branch, ...]:
        """Return every sentence that may follow; probabilities sum to 1; empty after the answer."""
        return self._weighted(state)[0]

    def success(self, state: State) -> float:
        """Return the exact probability that a trace in `state` ends in the right answer."""
        if state.stage == "answer":
            return float(state.value == self.problem.answer)
        if state not in self._success:
            self._success[state] = sum(
                branch.probability * self.success(branch.after) for branch in self.branches(state)
            )
        return self._success[state]

    def walk(self, state: State, rng: random.Random) -> Iterator[tuple[Branch, str]]:
        """Draw sentences from `state` to the answer, each with the separator before it."""
        while state.stage != "answer":
            branches, cumulative = self._weighted(state)
            # The last sum may round below 1, and the draw may land above it.
            drawn = min(bisect_right(cumulative, rng.random()), len(branches) - 1)
            branch = branches[drawn]
            blank_line = rng.random() < KINDS[branch.kind].paragraph
            yield branch, "\n\n" if blank_line else " "
            state = branch.after

    def replay(self, sentences: Sequence[str]) -> list[State]:
        """Return the states before each of `sentences` and, last, the state after them.

        Raises:
            DataError: the policy could not have said this.
        """
        states = [State()]
        for index, text in enumerate(sentences):
            after = next((b.after for b in self.branches(states[-1]) if b.text == text), None)
            if after is None:
                raise DataError(
                    f"sentence {index} ({text!r}) is none of the policy's",
                    f"problem {self.problem.id}",
                    "build the demo world again",
                )
            states.append(after)
        return states

    def _weighted(self, state: State) -> tuple[tuple[Branch, ...], list[float]]:
        if state not in self._branches:
            branches = tuple(
                Branch(
                    move.probability / len(KINDS[move.after.stage].forms),
                    move.after.stage,
                    form.format(**move.numbers),
                    move.after,
                )
                for move in self._moves(state)
                for form in KINDS[move.after.stage].forms
            )
            cumulative = list(accumulate(branch.probability for branch in branches))
            self._branches[state] = (branches, cumulative)
        return self._branches[state]

    def _moves(self, state: State) -> list[_Move]:
        if state.stage in ("start", "setup", "facts", "opening", "doubt"):
            return self._before_plan(state)
        if state.stage in ("check", "approval", "alarm", "stay"):
            return self._after_check(state)
        if state.stage in ("plan_products", "plan_in_order", "move", "wait_order", "wait_slip"):
            return self._first_step(state)
        if state.stage in ("x_product", "x_sum", "x_from_product", "x_from_sum"):
            return self._to_x(state)
        if state.stage in ("consolidation", "bridge"):
            return self._to_y(state)
        return self._to_z(state)
