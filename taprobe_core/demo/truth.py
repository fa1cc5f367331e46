"""The policy -> true importances and a choice of problems: what more rollouts would converge to.

Only the demo knows its truth; a label or a probe can be measured against it. Invariant: exact up to
float rounding, no sampling.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from taprobe_core.demo.policy import Policy, policy
from taprobe_core.demo.rules import State
from taprobe_core.demo.task import N_TASKS, Problem, problem
from taprobe_core.demo.trace import seeded
from taprobe_core.errors import PlanError

OPEN_ACCURACY = (0.25, 0.75)
"""Problems outside are nearly decided before the first sentence."""


def choose_problems(n_problems: int, seed: int) -> list[Problem]:
    """Draw problems whose true accuracy is open; ascending by id.

    Args:
        n_problems: how many.
        seed: of the draw. A larger `n_problems` keeps the problems of a smaller one.

    Raises:
        PlanError: fewer such problems exist.
    """
    low, high = OPEN_ACCURACY
    chosen: list[Problem] = []
    for problem_id in seeded(seed, "problems").sample(range(N_TASKS), N_TASKS):
        candidate = problem(problem_id)
        if low <= Policy(candidate).success(State()) <= high:
            chosen.append(candidate)
        if len(chosen) == n_problems:
            return sorted(chosen)
    raise PlanError(
        f"the demo has {len(chosen)} open problems, not {n_problems}",
        "rollouts.source.n_problems",
        f"ask for {len(chosen)} or fewer",
    )


def true_importance(
    of: Problem, sentences: Sequence[str], is_dissimilar: Callable[[str, str], bool]
) -> list[float]:
    """Return each sentence's counterfactual importance (accuracy) for infinitely many rollouts.

    For sentence i: P(right | another sentence, dissimilar to i, at i) - P(right | sentences to i).
    0 where no sentence that may stand at i is dissimilar, and for the last sentence.

    Args:
        of: the problem.
        sentences: a trace that the policy wrote.
        is_dissimilar: takes the removed and the resampled sentence.

    Raises:
        DataError: the policy could not have said `sentences`.
    """
    solver = policy(of)
    states = solver.replay(sentences)
    effects = [0.0] * len(sentences)
    for i, sentence in enumerate(sentences[:-1]):
        others = [b for b in solver.branches(states[i]) if is_dissimilar(sentence, b.text)]
        mass = sum(branch.probability for branch in others)
        if mass > 0:
            right = sum(branch.probability * solver.success(branch.after) for branch in others)
            effects[i] = right / mass - solver.success(states[i + 1])
    return effects
