"""The demo's reasoner on one problem: drawn from, replayed and solved exactly; texts read back.

`Policy.branches` lists every next sentence with its probability and the state after it. Drawing,
resampling at any sentence and the chance of a right answer all come from this one list, so what a
sentence is worth is known and not estimated.

A trained reasoner may write anything. A rest that breaks off has no answer, like a rollout of the
dataset that ran out of tokens; a base trace is taken only if the policy could have said it, because
only then is the truth about it known.

What does not belong here: what may be said (`rules`) and how (`wording`), files (`writer`), and
producing text with a model (`sampling`). Invariant: resampling from a replayed prefix has exactly
the distribution of whole traces that begin with this prefix.
"""

from __future__ import annotations

import random
import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

from taprobe_core.demo.rules import State, moves
from taprobe_core.demo.task import Continuation, Problem, Sentence, Trace
from taprobe_core.demo.wording import KINDS, dependencies
from taprobe_core.errors import DataError


class Branch(NamedTuple):
    """One possible next sentence; its kind is `after.stage`."""

    probability: float
    text: str
    after: State


class Policy:
    """The policy on one problem; what it computes, it keeps.

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
            # The last sum may round to less than 1, and the draw may land above it.
            branch = branches[min(bisect_right(cumulative, rng.random()), len(branches) - 1)]
            state = branch.after
            yield branch, "\n\n" if rng.random() < KINDS[state.stage].paragraph else " "

    def replay(self, sentences: Sequence[str]) -> list[State]:
        """Return the states before each of `sentences` and, last, the state after them."""
        states = [State()]
        for index, text in enumerate(sentences):
            after = next((b.after for b in self.branches(states[-1]) if b.text == text), None)
            if after is None:
                raise DataError(
                    f"sentence {index} ({text!r}) is none of the policy's",
                    f"problem {self.problem.id}",
                    "give a prefix that the policy wrote, or resample with the model that wrote it",
                )
            states.append(after)
        return states

    def _weighted(self, state: State) -> tuple[tuple[Branch, ...], list[float]]:
        if state not in self._branches:
            branches: list[Branch] = []
            for move in [] if state.stage == "answer" else moves(self.problem, state):
                forms = KINDS[move.after.stage].forms
                share = move.probability / len(forms)
                branches += [Branch(share, f.format(**move.numbers), move.after) for f in forms]
            cumulative = list(accumulate(branch.probability for branch in branches))
            self._branches[state] = (tuple(branches), cumulative)
        return self._branches[state]


def drawn_trace(problem: Problem, rng: random.Random) -> Trace:
    """Draw one whole solution of the policy."""
    drawn = list(policy(problem).walk(State(), rng))
    texts = [branch.text for branch, _ in drawn]
    separators = ["", *(separator for _, separator in drawn[1:])]
    return told_trace(problem, texts, separators)


def told_trace(problem: Problem, texts: Sequence[str], separators: Sequence[str]) -> Trace:
    """Return the trace of these sentences, with the tag and the uses of each."""
    states = policy(problem).replay(texts)
    if states[-1].stage != "answer":
        raise DataError(
            f"the trace ends after {states[-1].stage!r}",
            f"problem {problem.id}",
            "give a whole solution",
        )
    kinds = [state.stage for state in states[1:]]
    sentences = tuple(
        Sentence(text, separator, KINDS[kind].tag, uses, KINDS[kind].summary)
        for text, separator, kind, uses in zip(
            texts, separators, kinds, dependencies(kinds), strict=True
        )
    )
    value = states[-1].value
    return Trace(sentences, ending(value), str(value), value == problem.answer)


def drawn_rollouts(
    problem: Problem, prefix: Sequence[str], n: int, rng: random.Random
) -> list[Continuation]:
    """Draw `n` independent rests after `prefix`, which must be the policy's own.

    A rest begins with a blank, as after a prompt that ends in a sentence, unless `prefix` is
    empty.
    """
    solver = policy(problem)
    state = solver.replay(prefix)[-1]
    return [_continuation(solver, state, " " if prefix else "", rng) for _ in range(n)]


def _continuation(solver: Policy, state: State, lead: str, rng: random.Random) -> Continuation:
    parts: list[str] = []
    for branch, separator in solver.walk(state, rng):
        parts += (separator, branch.text)
        state = branch.after
    parts[0] = lead
    parts.append(ending(state.value))
    return Continuation(
        "".join(parts), parts[1], str(state.value), state.value == solver.problem.answer
    )


def drawn_answers(
    problem: Problem, prefix: Sequence[str], n: int, rng: random.Random
) -> list[Continuation]:
    """Draw `n` answers that are forced after `prefix`: those of rests that remain unsaid."""
    rests = drawn_rollouts(problem, prefix, n, rng)
    return [Continuation(f"{rest.answer}}}.", "", rest.answer, rest.is_correct) for rest in rests]


def ending(value: int) -> str:
    """Return what follows the thinking: the closing tag and the boxed answer."""
    return f"\n</think>\n\nThe value of z is \\boxed{{{value}}}."


@lru_cache(maxsize=32)
def policy(problem: Problem) -> Policy:
    """Return the policy on `problem`, one of the latest 32 kept: a problem is used many times."""
    return Policy(problem)


THINK_END = "\n</think>"

_SENTENCE = re.compile(r"(\s*)(\S.*?[.?!])(?=\s|\Z)", re.DOTALL)
_BOXED = re.compile(r"\\boxed\{\s*([^{}\s][^{}]*)\}")


def split_sentences(thinking: str) -> tuple[list[str], list[str], str]:
    """Split after each closing mark that whitespace or the end follows."""
    texts, separators, end = [], [], 0
    for match in _SENTENCE.finditer(thinking):
        separators.append(match[1])
        texts.append(match[2])
        end = match.end()
    return texts, separators, thinking[end:]


def boxed(text: str) -> str:
    """Return the first boxed text that is not empty, or an empty text."""
    match = _BOXED.search(text)
    return match[1].strip() if match else ""


def read_trace(problem: Problem, solution: str) -> Trace | None:
    """Read a whole solution; None if the policy could not have written it."""
    thinking, tag, rest = solution.partition(THINK_END)
    texts, separators, left = split_sentences(thinking)
    if not tag or left or not texts or separators[0] or set(separators[1:]) - {" ", "\n\n"}:
        return None
    try:
        trace = told_trace(problem, texts, separators)
    except DataError:
        return None
    return trace if trace.ending == tag + rest else None


def read_continuation(problem: Problem, text: str) -> Continuation:
    """Read a resampled rest."""
    thinking, _, _ = text.partition(THINK_END)
    match = _SENTENCE.match(thinking)
    first = match[2] if match else thinking.strip()
    answer = boxed(text)
    return Continuation(text, first, answer, answer == str(problem.answer))


def read_answer(problem: Problem, text: str) -> Continuation:
    """Read an answer that was forced: what follows an opened box."""
    answer = text.partition("}")[0].strip() if "}" in text else ""
    return Continuation(text, "", answer, answer == str(problem.answer))
