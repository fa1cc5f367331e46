"""Turn sentences into weighted counts of their terms (words and word pairs).

scikit-learn's vectorizer, with one step of ours between counting and weighting: its `max_features`
breaks ties with an unstable sort, whose order differs between instruction sets; `FrequentTerms`
gives ties to the alphabetically earlier term. What does not belong here: joining with other
features (`solvers.fold_matrix`). Invariant: the terms chosen depend on the texts alone, those of a
fold on its training texts alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix
from sklearn.base import BaseEstimator
from sklearn.feature_extraction.text import CountVectorizer, TfidfTransformer, TfidfVectorizer
from sklearn.feature_selection import SelectorMixin
from sklearn.pipeline import Pipeline
from sklearn.utils.validation import check_is_fitted, validate_data

from taprobe_core.errors import NotEnoughDataError

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


@dataclass(frozen=True, eq=False)
class FoldWords:
    """Counts of terms, and what every fold makes of them.

    The weights of a row in a fold are `counts * idf[fold]`, divided by their Euclidean length
    (zero without any of the fold's terms): what `text_pipeline`, fitted on the fold's training
    texts, gives.

    Attributes:
        terms: [term], alphabetical; those of any fold.
        counts: [sentence, term] float64.
        idf: [fold, term] float64, inverse document frequency ln((1 + n) / (1 + n_with)) + 1 among
            the n training texts of the fold; 0 where the fold does not use the term.
    """

    terms: tuple[str, ...]
    counts: csr_matrix
    idf: NDArray[np.float64]

    def terms_of(self, fold: int) -> tuple[str, ...]:
        """Return the terms that a fold uses, alphabetical, as `text_pipeline` would name them."""
        return tuple(self.terms[column] for column in np.flatnonzero(self.idf[fold]))


def fold_words(
    texts: Sequence[str], train: NDArray[np.bool_], max_terms: int = MAX_TERMS
) -> FoldWords:
    """Count terms once, and choose and weigh them for every fold on its training texts.

    Args:
        texts: [sentence].
        train: [fold, sentence] bool, the training texts of each fold.
        max_terms: at most so many per fold; the most frequent in its training texts, ties to the
            alphabetically earlier one.

    Raises:
        NotEnoughDataError: the training texts of a fold hold no word; names every such fold.

    Source:
        scikit-learn's TfidfTransformer with smooth_idf.
    """
    learns = csr_matrix(np.asarray(train, dtype=np.float64))
    wordless = list(range(len(train)))
    if has_words(texts):
        vectorizer = CountVectorizer(ngram_range=_NGRAMS, dtype=np.float64)
        counts = vectorizer.fit_transform(texts)
        totals = (learns @ counts).toarray()
        wordless = np.flatnonzero(~totals.any(axis=1)).tolist()
    if wordless:
        raise NotEnoughDataError(
            "the training sentences hold no word to count",
            f"folds {wordless}",
            "take text out of the recipe's features, or use more problems",
        )
    n_with = (learns @ (counts > 0)).toarray()
    n_train = np.asarray(train).sum(axis=1, keepdims=True)
    weights = np.log((1 + n_train) / (1 + n_with)) + 1
    for own, total in zip(weights, totals, strict=True):
        own[np.argsort(-total, kind="stable")[max_terms:]] = 0.0
        own[total == 0] = 0.0
    is_used = weights.any(axis=0)
    terms = vectorizer.get_feature_names_out()[is_used]
    return FoldWords(tuple(map(str, terms)), counts[:, is_used].tocsr(), weights[:, is_used])
