"""What a reasoner gave -> the dataset's measures, and what they would converge to.

The measures come from `importance`, the same code that reads published rollouts; the truth comes
from the policy. Invariant: measures depend on rollouts alone, the truth on sentences alone.
"""

from __future__ import annotations

from collections.abc import Sequence

from taprobe_core.demo.trace import Continuation, Reasoned
from taprobe_core.demo.truth import true_importance
from taprobe_core.importance import Rollout, published_measures, trigram_masked_dissimilar

TRUE_IMPORTANCE = "true_importance"
"""Key of the policy's exact importance: one that the published files do not have."""


def measures(reasoned: Reasoned) -> list[dict[str, float]]:
    """Compute the measures of each sentence, forced ones included, in the dataset's key order.

    Args:
        reasoned: one problem. Forced measures are left out where nothing was forced.
    """
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
    """Return the policy's exact counterfactual importance of each sentence.

    Raises:
        DataError: the policy could not have said the base trace.
    """
    return true_importance(reasoned.problem, reasoned.texts, trigram_masked_dissimilar)


def _rollouts(banks: Sequence[Sequence[Continuation]]) -> list[list[Rollout]]:
    return [
        [Rollout(rest.answer, rest.is_correct, rest.first_sentence) for rest in bank]
        for bank in banks
    ]
