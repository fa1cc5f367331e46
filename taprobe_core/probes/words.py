"""Turn sentences into weighted counts of their terms (words and word pairs).

Counting needs no fold; the choice of terms and their weights are learned on training rows only.
What does not belong here: joining with other features (`inputs`). Invariant: the chosen terms
depend on the texts alone. scikit-learn's `max_features` breaks ties with an unstable sort, whose
order differs between instruction sets; here ties go to the alphabetically earlier term.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix
from sklearn.feature_extraction.text import CountVectorizer

MAX_TERMS = 10_000
_NGRAMS = (1, 2)


@dataclass(frozen=True, eq=False)
class TermCounts:
    """Counts of terms.

    Attributes:
        counts: [sentence, term] float64.
        terms: [term] in alphabetical order.
    """

    counts: csr_matrix
    terms: tuple[str, ...]


def count_terms(texts: Sequence[str], terms: Sequence[str] | None = None) -> TermCounts:
    """Count words of two letters or more, and pairs of neighbouring ones, in lower case.

    Args:
        texts: [sentence].
        terms: count these only, in this order; None counts every term that occurs.

    Returns:
        Counts; without any columns if `terms` is None and no text has such a word.
    """
    vectorizer = CountVectorizer(ngram_range=_NGRAMS, vocabulary=terms, dtype=np.float64)
    if terms is not None:
        return TermCounts(vectorizer.transform(texts), tuple(terms))
    analyze = vectorizer.build_analyzer()
    if not any(analyze(text) for text in texts):
        return TermCounts(csr_matrix((len(texts), 0)), ())
    counts = vectorizer.fit_transform(texts)
    return TermCounts(counts, tuple(str(term) for term in vectorizer.get_feature_names_out()))


def choose_terms(counts: csr_matrix, limit: int = MAX_TERMS) -> NDArray[np.intp]:
    """Return the columns of the most frequent terms, ascending.

    Args:
        counts: [sentence, term] of the training rows, terms in alphabetical order.
        limit: at most so many; among equal counts the earlier column is taken. Terms that do not
            occur are never taken.
    """
    totals = np.asarray(counts.sum(axis=0)).ravel()
    ranked = np.argsort(-totals, kind="stable")[: min(limit, np.count_nonzero(totals))]
    return np.sort(ranked)


def inverse_document_frequency(counts: csr_matrix) -> NDArray[np.float64]:
    """Return ln((1 + n) / (1 + df)) + 1 of each term, [term]; df is the rows that hold it of n."""
    rows_with_term = np.bincount(counts.indices, minlength=counts.shape[1])
    weights: NDArray[np.float64] = np.log((1 + counts.shape[0]) / (1 + rows_with_term)) + 1.0
    return weights


def weigh_terms(counts: csr_matrix, idf: NDArray[np.float64]) -> csr_matrix:
    """Return counts x idf, each row scaled to Euclidean length 1 (a row of zeros stays).

    Source:
        TF-IDF as scikit-learn's `TfidfVectorizer` defines it by default.
    """
    weighted = csr_matrix(
        (counts.data * idf[counts.indices], counts.indices, counts.indptr), shape=counts.shape
    )
    length = np.sqrt(np.asarray(weighted.multiply(weighted).sum(axis=1)).ravel())
    length[length == 0] = 1.0
    weighted.data /= np.repeat(length, np.diff(weighted.indptr))
    return weighted
