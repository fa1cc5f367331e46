"""A task number -> an arithmetic problem whose reading order matters; what a reasoner gives for it.

    x = a + b * c,   y = x - d,   z = y + e * f

Products before sums is right; strictly left to right is wrong, but coherent. The verb of the
statement carries no arithmetic and shifts the policy's odds for the right plan, so the same
operands can be easy or hard. What is given for a problem are traces and continuations of their
prefixes, sorted into settings. How a problem is solved belongs in `policy`; who reasons, and files,
elsewhere.

Invariants: an id alone names a problem, in every setting, model and version. A text is its
sentences with their separators, so that joining them by one blank is another view of the same
sentences.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import NamedTuple

SETTINGS = {"correct_base_solution": True, "incorrect_base_solution": False}
"""The demo's settings, and whether their base traces end in the right answer."""


VERBS = ("Compute", "Find", "Evaluate")

_LARGE = (2, 3, 4, 5, 6)
_SMALL = (2, 3)
_CHOICES: tuple[tuple[int, ...], ...] = (_LARGE, _LARGE, _LARGE, _LARGE, _LARGE, _SMALL)

N_TASKS = len(VERBS) * 5**5 * 2
"""Number of distinct problems; ids run from 0 to `N_TASKS` - 1."""


class Problem(NamedTuple):
    """One problem; operands are 2-6, except f, which is 2 or 3."""

    id: int
    verb: str
    a: int
    b: int
    c: int
    d: int
    e: int
    f: int

    @property
    def givens(self) -> str:
        """The three equations, as the statement and the trace write them."""
        return (
            f"x = {self.a} + {self.b} * {self.c}, y = x - {self.d} and z = y + {self.e} * {self.f}"
        )

    @property
    def statement(self) -> str:
        """The problem as posed."""
        return f"{self.verb} z when {self.givens}."

    @property
    def answer(self) -> int:
        """The right z, in 0..60."""
        return self.a + self.b * self.c - self.d + self.e * self.f

    @property
    def reference(self) -> str:
        """A reference solution that ends in the boxed answer."""
        x = self.a + self.b * self.c
        return (
            f"Products come before sums. x = {self.a} + {self.b * self.c} = {x}, "
            f"y = {x} - {self.d} = {x - self.d} and z = {x - self.d} + {self.e * self.f} = "
            f"\\boxed{{{self.answer}}}."
        )

    @property
    def prompt(self) -> str:
        """What the reasoner reads, in the dataset's own words; its completion begins after it."""
        return (
            "Solve this math problem step by step. You MUST put your final answer in \\boxed{}. "
            f"Problem: {self.statement} Solution: \n<think>\n"
        )


def problem(problem_id: int) -> Problem:
    """Return the problem with this id."""
    if not 0 <= problem_id < N_TASKS:
        raise IndexError(f"problem ids are 0 to {N_TASKS - 1}, not {problem_id}")
    rest, operands = problem_id, []
    for choices in _CHOICES:
        rest, digit = divmod(rest, len(choices))
        operands.append(choices[digit])
    return Problem(problem_id, VERBS[rest], *operands)


@dataclass(frozen=True, slots=True)
class Sentence:
    """One sentence of a trace.

    Attributes:
        text: the sentence, 10 characters or more, one closing mark at its end.
        separator: what stands before it in the text: "", " " or a blank line.
        function_tag: the dataset's tag for what the sentence does.
        depends_on: indices of earlier sentences whose content it uses, ascending.
        summary: two to four words.
    """

    text: str
    separator: str
    function_tag: str
    depends_on: tuple[int, ...]
    summary: str


@dataclass(frozen=True, slots=True)
class Trace:
    """One whole solution.

    Attributes:
        sentences: the thinking.
        ending: what follows it: closing think tag and boxed answer.
        answer: the boxed answer; empty if there is none.
        is_correct: its grade.
    """

    sentences: tuple[Sentence, ...]
    ending: str
    answer: str
    is_correct: bool

    @property
    def thinking(self) -> str:
        """The sentences with their separators."""
        return "".join(sentence.separator + sentence.text for sentence in self.sentences)


@dataclass(frozen=True, slots=True)
class Continuation:
    """One resampled rest of a trace.

    Attributes:
        text: everything after the prefix, ending included.
        first_sentence: the sentence that stands where the removed one stood.
        answer: the boxed answer; empty if there is none.
        is_correct: its grade.
    """

    text: str
    first_sentence: str
    answer: str
    is_correct: bool


@dataclass(frozen=True, slots=True)
class Reasoned:
    """What one reasoner has to say about one problem.

    Attributes:
        problem: the problem.
        trace: the base trace.
        rollouts: per sentence, the rests that were resampled with this sentence removed.
        forced: per sentence, the answers that were forced before this sentence.
    """

    problem: Problem
    trace: Trace
    rollouts: list[list[Continuation]]
    forced: list[list[Continuation]]

    @property
    def texts(self) -> list[str]:
        """The sentences of the base trace."""
        return [sentence.text for sentence in self.trace.sentences]


FORCED_ANSWER = "\n</think>\n\nTherefore, the final answers is \\boxed{"
"""What forces an answer, in the dataset's own words."""


def seeded(*parts: str | int) -> random.Random:
    """Return a generator that depends on `parts` alone, not on the process or its hash seed."""
    # Reproducible draws are the point here; nothing is kept secret.
    return random.Random("/".join(map(str, parts)))  # noqa: S311
