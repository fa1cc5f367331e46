"""The policy -> true importances and a choice of problems; the published measures beside them.

What more rollouts would converge to: only the demo knows its truth, and a label or a probe can be
measured against it. The measures of what a reasoner gave come from `labels.measures`, the same code
that reads published rollouts; the truth comes from the policy.

Invariants: truths are exact up to float rounding; only `simulated_importance` draws. Measures
depend on rollouts alone, the truth on sentences alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from taprobe_core.demo.policy import Policy, policy
from taprobe_core.demo.rules import State
from taprobe_core.demo.task import N_TASKS, Continuation, Problem, Reasoned, problem, seeded
from taprobe_core.errors import PlanError
from taprobe_core.labels import Rollout, published_measures, trigram_masked_dissimilar

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


class Rates(NamedTuple):
    """What resampling one sentence does, exactly.

    Attributes:
        replaced: probability that a resampled sentence is dissimilar to it.
        right_if_replaced: probability of a right answer then; 0 if that cannot be.
        right_if_kept: probability of a right answer after the sentence itself.
    """

    replaced: float
    right_if_replaced: float
    right_if_kept: float


def exact_rates(
    of: Problem, sentences: Sequence[str], is_dissimilar: Callable[[str, str], bool]
) -> list[Rates]:
    """Return the rates of each sentence."""
    solver = policy(of)
    states = solver.replay(sentences)
    rates = []
    for sentence, before, after in zip(sentences, states, states[1:], strict=False):
        others = [b for b in solver.branches(before) if is_dissimilar(sentence, b.text)]
        mass = sum(branch.probability for branch in others)
        right = sum(branch.probability * solver.success(branch.after) for branch in others)
        rates.append(Rates(mass, right / mass if mass else 0.0, solver.success(after)))
    return rates


def true_importance(
    of: Problem, sentences: Sequence[str], is_dissimilar: Callable[[str, str], bool]
) -> list[float]:
    """Return each sentence's counterfactual importance (accuracy) for infinitely many rollouts.

    P(right | another sentence, dissimilar to i, at i) - P(right | sentences to i); 0 where no
    sentence that may stand at i is dissimilar, and for the last sentence.

    Args:
        of: the problem.
        sentences: a trace that the policy wrote.
        is_dissimilar: takes the removed and the resampled sentence.

    Raises:
        DataError: the policy could not have said `sentences`.
    """
    rates = exact_rates(of, sentences, is_dissimilar)
    effects = [r.right_if_replaced - r.right_if_kept if r.replaced else 0.0 for r in rates]
    return [*effects[:-1], 0.0]


def simulated_importance(
    rates: Sequence[Rates], n_rollouts: int, n_draws: int, rng: np.random.Generator
) -> npt.NDArray[np.float64]:
    """Draw the labels that `n_rollouts` a sentence would give, again and again.

    The number of dissimilar rollouts, of right ones among them and of right ones at the next
    sentence are binomial; a label is 0 without dissimilar rollouts, and for the last sentence.

    Returns:
        [draw, sentence] in [-1, 1].
    """
    replaced, right, kept = (np.array(column) for column in zip(*rates, strict=True))
    n_dissimilar = rng.binomial(n_rollouts, replaced, (n_draws, len(rates)))
    n_right = rng.binomial(n_dissimilar, right)
    next_accuracy = rng.binomial(n_rollouts, kept, n_right.shape) / n_rollouts
    labels = n_right / np.maximum(n_dissimilar, 1) - next_accuracy
    labels[(n_dissimilar == 0) | (np.arange(len(rates)) == len(rates) - 1)] = 0.0
    return labels


TRUE_IMPORTANCE = "true_importance"
"""Key of the policy's exact importance: one that the published files do not have."""


def measures(reasoned: Reasoned) -> list[dict[str, float]]:
    """Compute the measures of each sentence, forced ones included, in the dataset's key order."""
    texts = reasoned.texts
    measured = published_measures(texts, _rollouts(reasoned.rollouts), trigram_masked_dissimilar)
    if not any(reasoned.forced):
        return measured
    forced = published_measures(texts, _rollouts(reasoned.forced), trigram_masked_dissimilar)
    return [
        {
            **{name: own[name] for name in _FIRST},
            "forced_importance_accuracy": other["resampling_importance_accuracy"],
            "forced_importance_kl": other["resampling_importance_kl"],
            **{name: own[name] for name in own if name not in _FIRST},
        }
        for own, other in zip(measured, forced, strict=True)
    ]


_FIRST = (
    "accuracy",
    "resampling_importance_accuracy",
    "resampling_importance_kl",
    "counterfactual_importance_accuracy",
    "counterfactual_importance_kl",
)


def exact_importance(reasoned: Reasoned) -> list[float]:
    """Return the policy's exact counterfactual importance of each sentence."""
    return true_importance(reasoned.problem, reasoned.texts, trigram_masked_dissimilar)


def _rollouts(banks: Sequence[Sequence[Continuation]]) -> list[list[Rollout]]:
    return [
        [Rollout(rest.answer, rest.is_correct, rest.first_sentence) for rest in bank]
        for bank in banks
    ]
