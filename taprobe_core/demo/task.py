"""A task number -> an arithmetic problem whose reading order matters.

    x = a + b * c,   y = x - d,   z = y + e * f

Products before sums is right; strictly left to right is wrong, but coherent. The verb of the
statement carries no arithmetic and shifts the policy's odds for the right plan, so the same
operands can be easy or hard. How a problem is solved belongs in `policy`. Invariant: an id alone
names a problem, in every setting, model and version.
"""

from __future__ import annotations

from typing import NamedTuple

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
    """Return the problem with this id.

    Args:
        problem_id: 0 to `N_TASKS` - 1: the operands and the verb as digits of a mixed-radix number.

    Raises:
        IndexError: no such problem.
    """
    if not 0 <= problem_id < N_TASKS:
        raise IndexError(f"problem ids are 0 to {N_TASKS - 1}, not {problem_id}")
    rest, operands = problem_id, []
    for choices in _CHOICES:
        rest, digit = divmod(rest, len(choices))
        operands.append(choices[digit])
    return Problem(problem_id, VERBS[rest], *operands)
