"""Two sentences -> whether they say the same, numbers aside.

The published labels compare sentence embeddings; this is the comparison without a model that the
demo's labels use. Invariant: symmetric, deterministic, in [0, 1].
"""

from __future__ import annotations

import math
import re
from collections import Counter
from functools import lru_cache

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
