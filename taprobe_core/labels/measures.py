"""Resampled rollouts of one trace -> the published importance measures of its sentences.

For sentence i a bank holds the rollouts that were resampled with sentence i removed: n_i answered,
k_i of them correct, and inside the dissimilar part (the first resampled sentence differs from the
removed one) nd_i and kd_i. The measures and their signs are those of the Thought Anchors dataset
(Bogdan et al. 2025, "Thought Anchors: Which LLM Reasoning Steps Matter?"): a positive resampling
importance means that keeping the sentence helps, a positive counterfactual importance means that
replacing it helps. The published labels tell similar sentences by their embeddings; the similarity
here needs no model, and the demo's labels use it.

What does not belong here: where rollouts come from, files, and targets made from the measures
(`probes.targets`). Invariants: pure and deterministic; the same rollouts give the same floats,
whatever their source and the interpreter's hash seed. Similarity is symmetric and in [0, 1].
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from taprobe_core.errors import ConfigError, LabelError
from taprobe_core.rollouts.solutions import Rollout

SIMILARITY_THRESHOLD = 0.8
"""Cosine under which a resampled sentence counts as another sentence."""

_DIGITS = re.compile(r"\d+")


def trigram_masked_dissimilar(a: str, b: str, threshold: float = SIMILARITY_THRESHOLD) -> bool:
    """Whether two sentences differ in more than their numbers.

    Args:
        a: removed sentence.
        b: resampled sentence.
        threshold: cosine below which they count as different.
    """
    return trigram_cosine(a, b) < threshold


def trigram_cosine(a: str, b: str) -> float:
    """Return the cosine of character-trigram counts, digit runs masked as `#`, in [0, 1].

    Numbers are masked because otherwise each arithmetic slip would count as another sentence. A
    text of fewer than three characters is its own only gram; equal masked texts give exactly 1.
    """
    return _masked_cosine(*sorted((_masked(a), _masked(b))))


@lru_cache(maxsize=1 << 16)
def _masked(text: str) -> str:
    return _DIGITS.sub("#", text)


@lru_cache(maxsize=1 << 16)
def _masked_cosine(a: str, b: str) -> float:
    if a == b:
        return 1.0
    p, q = _trigrams(a), _trigrams(b)
    dot = sum(count * q[gram] for gram, count in p.items())
    norms = sum(count * count for count in p.values()) * sum(count * count for count in q.values())
    return min(1.0, dot / math.sqrt(norms))


@lru_cache(maxsize=1 << 14)
def _trigrams(text: str) -> Counter[str]:
    return Counter(text[i : i + 3] for i in range(max(1, len(text) - 2)))


MIN_SENTENCE_CHARS = 4
"""Shorter sentences carry no data in the published measures."""


@dataclass(frozen=True, slots=True)
class _Bank:
    """The rollouts of one sentence, divided as the measures need them."""

    answered: list[Rollout]
    dissimilar: list[Rollout]
    similar: list[Rollout]

    @property
    def counterfactual(self) -> list[Rollout]:
        return self.dissimilar + self.similar


def published_measures(
    sentences: Sequence[str],
    rollouts: Sequence[Sequence[Rollout]],
    is_dissimilar: Callable[[str, str], bool],
    kl_alpha: float = 1e-9,
) -> list[dict[str, float]]:
    """Compute the dataset's measures for each sentence of one trace.

    | field | formula |
    |---|---|
    | accuracy | acc_i = k_i / n_i |
    | resampling_importance_accuracy | acc_{i+1} - acc_i |
    | resampling_importance_kl | KL(P_i || P_{i+1}), P over answers |
    | counterfactual_importance_accuracy | kd_i / nd_i - acc_{i'} |
    | counterfactual_importance_kl | KL(P_i, dissimilar || P_{i'} pooled with i's similar ones) |
    | different_trajectories_fraction | nd_i / n_i |
    | overdeterminedness | 1 - distinct / all resampled sentences |

    i' is the next sentence with data, while resampling importance needs i+1 itself. A rollout is
    answered if its answer is not empty; counterfactual quantities also drop the answer "None".
    Without dissimilar rollouts the two counterfactual importances are 0; without a successor (the
    last sentence) everything but the accuracy is 0; without data everything is 0.

    Args:
        sentences: n_sentences texts of the base trace.
        rollouts: per sentence, its resampled rollouts; may be empty.
        is_dissimilar: takes the removed and the resampled sentence. Called once per distinct text.
        kl_alpha: pseudo-count a of each answer in both distributions.

    Returns:
        n_sentences dicts with the seven fields above, all finite.

    Raises:
        LabelError: `sentences` and `rollouts` have different lengths.
        ConfigError: `kl_alpha` is not positive and finite.
    """
    if len(sentences) != len(rollouts):
        raise LabelError(
            f"{len(rollouts)} rollout banks for {len(sentences)} sentences",
            None,
            "give one bank per sentence, an empty one where rollouts are missing",
        )
    if not (math.isfinite(kl_alpha) and kl_alpha > 0):
        raise ConfigError(f"kl_alpha is {kl_alpha}", None, "set a positive pseudo-count: 1e-9")
    banks = [
        _bank(sentence, bank, is_dissimilar)
        for sentence, bank in zip(sentences, rollouts, strict=True)
    ]
    return [
        {
            "accuracy": _accuracy(bank.answered),
            **_resampling(bank, banks[i + 1] if i + 1 < len(banks) else None, kl_alpha),
            **_counterfactual(
                bank,
                next((later for later in banks[i + 1 :] if later.counterfactual), None),
                kl_alpha,
            ),
        }
        for i, bank in enumerate(banks)
    ]


def _bank(
    sentence: str, rollouts: Sequence[Rollout], is_dissimilar: Callable[[str, str], bool]
) -> _Bank:
    if len(sentence) < MIN_SENTENCE_CHARS:
        return _Bank([], [], [])
    answered = [rollout for rollout in rollouts if rollout.answer != ""]
    verdicts: dict[str, bool] = {}
    parts: tuple[list[Rollout], list[Rollout]] = ([], [])
    for rollout in answered:
        if rollout.answer == "None":
            continue
        text = rollout.chunk_resampled
        if text not in verdicts:
            verdicts[text] = is_dissimilar(sentence, text)
        parts[verdicts[text]].append(rollout)
    return _Bank(answered, dissimilar=parts[True], similar=parts[False])


def _accuracy(rollouts: Sequence[Rollout]) -> float:
    if not rollouts:
        return 0.0
    return sum(rollout.is_correct for rollout in rollouts) / len(rollouts)


def _resampling(bank: _Bank, successor: _Bank | None, alpha: float) -> dict[str, float]:
    accuracy, kl = 0.0, 0.0
    if successor is not None and bank.answered and successor.answered:
        accuracy = _accuracy(successor.answered) - _accuracy(bank.answered)
        kl = answer_kl(bank.answered, successor.answered, alpha)
    return {"resampling_importance_accuracy": accuracy, "resampling_importance_kl": kl}


def _counterfactual(bank: _Bank, successor: _Bank | None, alpha: float) -> dict[str, float]:
    accuracy, kl, different, overdetermined = 0.0, 0.0, 0.0, 0.0
    drawn = bank.counterfactual
    if successor is not None and drawn:
        different = len(bank.dissimilar) / len(drawn)
        overdetermined = 1.0 - len({rollout.chunk_resampled for rollout in drawn}) / len(drawn)
        if bank.dissimilar:
            kept = successor.counterfactual
            accuracy = _accuracy(bank.dissimilar) - _accuracy(kept)
            kl = answer_kl(bank.dissimilar, kept + bank.similar, alpha)
    return {
        "counterfactual_importance_accuracy": accuracy,
        "counterfactual_importance_kl": kl,
        "different_trajectories_fraction": different,
        "overdeterminedness": overdetermined,
    }


def answer_kl(p: Sequence[Rollout], q: Sequence[Rollout], alpha: float) -> float:
    """Return KL(P || Q) in nats between the answers of two non-empty sets of rollouts.

    Each probability is (c + a) / (N + a V), with V the number of distinct answers of both sets
    together; a result under 0 (rounding) becomes 0.

    Args:
        p: rollouts whose answers give P.
        q: rollouts whose answers give Q.
        alpha: pseudo-count a > 0. Small values make an answer unseen in Q cost about ln(1/a).
    """
    p_counts = Counter(rollout.answer for rollout in p)
    q_counts = Counter(rollout.answer for rollout in q)
    # Sorted, because float sums depend on order and set order depends on the hash seed.
    vocabulary = sorted(p_counts.keys() | q_counts.keys())
    p_total = len(p) + alpha * len(vocabulary)
    q_total = len(q) + alpha * len(vocabulary)
    total = 0.0
    for answer in vocabulary:
        p_share = (p_counts[answer] + alpha) / p_total
        total += p_share * math.log(p_share / ((q_counts[answer] + alpha) / q_total))
    return max(0.0, total)
