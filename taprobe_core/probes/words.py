"""Turn sentences into weighted counts of their terms (words and word pairs).

scikit-learn's vectorizer, with one step of ours between counting and weighting: its `max_features`
breaks ties with an unstable sort, whose order differs between instruction sets; `FrequentTerms`
gives ties to the alphabetically earlier term. What does not belong here: joining with other
features (`pipeline`, `inputs`). Invariant: the terms chosen depend on the texts alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix
from sklearn.base import BaseEstimator
from sklearn.feature_extraction.text import CountVectorizer, TfidfTransformer, TfidfVectorizer
from sklearn.feature_selection import SelectorMixin
from sklearn.pipeline import Pipeline
from sklearn.utils.validation import check_is_fitted, validate_data

MAX_TERMS = 10_000
_NGRAMS = (1, 2)


class FrequentTerms(SelectorMixin, BaseEstimator):  # type: ignore[misc] # scikit-learn is untyped
    """Keep the columns of the most frequent terms, in their order; ties go to the earlier column.

    Args:
        max_terms: at most so many.
    """

    def __init__(self, max_terms: int = MAX_TERMS) -> None:
        self.max_terms = max_terms

    def fit(self, X: csr_matrix, y: Any = None) -> Self:
        """Learn the columns from counts, [sentence, term]; `y` is ignored."""
        totals = np.asarray(validate_data(self, X, accept_sparse="csr").sum(axis=0)).ravel()
        self.support_ = np.zeros(len(totals), dtype=bool)
        self.support_[np.argsort(-totals, kind="stable")[: self.max_terms]] = True
        return self

    def _get_support_mask(self) -> NDArray[np.bool_]:
        check_is_fitted(self)
        return self.support_


def text_pipeline() -> Pipeline:
    """Return TF-IDF of the `MAX_TERMS` most frequent words and word pairs, unfitted.

    Words have two letters or more and are read in lower case; weights are scikit-learn's defaults.
    """
    return Pipeline(
        [
            ("count", CountVectorizer(ngram_range=_NGRAMS)),
            ("choose", FrequentTerms()),
            ("weigh", TfidfTransformer()),
        ]
    )


def has_words(texts: Sequence[str]) -> bool:
    """Say whether any text has a word that `text_pipeline` would count."""
    analyze = CountVectorizer().build_analyzer()
    return any(analyze(text) for text in texts)


def weigh_texts(texts: Sequence[str], terms: Sequence[str], idf: NDArray[np.float64]) -> csr_matrix:
    """Return what a fitted `text_pipeline` makes of `texts`, from its terms and weights alone.

    Args:
        texts: [sentence].
        terms: [term], the columns wanted.
        idf: [term], inverse document frequencies.

    Returns:
        [sentence, term] float64, each row of Euclidean length 1, or zero without any of the terms.
    """
    vectorizer = TfidfVectorizer(ngram_range=_NGRAMS, vocabulary=terms)
    vectorizer.idf_ = idf
    return vectorizer.transform(texts)
