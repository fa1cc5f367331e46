from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_matrix
from sklearn.exceptions import NotFittedError
from sklearn.feature_extraction.text import TfidfVectorizer

from taprobe_core.errors import NotEnoughDataError
from taprobe_core.probes.features import (
    FoldWords,
    FrequentTerms,
    fold_words,
    has_words,
    text_pipeline,
    weigh_texts,
)

words = st.sampled_from(["so", "we", "Add", "carry", "x", "=", "12", "wait,", "größe"])
texts = st.lists(st.lists(words, max_size=8).map(" ".join), min_size=1, max_size=12)


@settings(max_examples=20, deadline=None)
@given(texts)
def test_few_terms_weigh_as_scikit_learn_weighs_them(texts: list[str]) -> None:
    training = [*texts, "so we"]
    pipeline, reference = text_pipeline(), TfidfVectorizer(ngram_range=(1, 2))
    expected = reference.fit_transform(training).toarray()

    weights = pipeline.fit_transform(training).toarray()

    terms = pipeline[:-1].get_feature_names_out()
    assert list(terms) == list(reference.get_feature_names_out())
    np.testing.assert_allclose(weights, expected, atol=1e-12)
    stored = weigh_texts([*training, "unseen"], list(terms), pipeline["weigh"].idf_)
    np.testing.assert_allclose(stored.toarray()[:-1], weights, atol=1e-12)
    assert not stored.toarray()[-1].any()


def test_ties_go_to_the_alphabetically_earlier_term() -> None:
    # 40 terms occur once; unstable sorting would take any of them.
    names = [f"t{index:02d}" for index in range(40)]
    pipeline = text_pipeline().set_params(choose__max_terms=17)

    pipeline.fit(["zz", "zz", *names[::-1]])

    assert list(pipeline[:-1].get_feature_names_out()) == [*names[:16], "zz"]


def test_terms_cannot_be_chosen_before_any_were_seen() -> None:
    with pytest.raises(NotFittedError):
        FrequentTerms().transform(csr_matrix(np.ones((2, 3))))


@settings(max_examples=20, deadline=None)
@given(texts)
def test_words_are_what_the_pipeline_counts(texts: list[str]) -> None:
    if has_words(texts):
        assert len(text_pipeline().fit(texts)[:-1].get_feature_names_out())
    else:
        with pytest.raises(ValueError, match="empty vocabulary"):
            text_pipeline().fit(texts)


# --- every fold's vocabulary from one count


def weights_of(words: FoldWords, fold: int) -> np.ndarray:
    weighted = words.counts.multiply(words.idf[fold]).toarray()
    length = np.linalg.norm(weighted, axis=1, keepdims=True)
    return np.divide(weighted, length, out=np.zeros_like(weighted), where=length > 0)


@settings(max_examples=40, deadline=None)
@given(texts=texts, max_terms=st.integers(1, 12), draw=st.data())
def test_every_fold_weighs_as_a_pipeline_of_its_own(
    texts: list[str], max_terms: int, draw: st.DataObject
) -> None:
    texts = [*texts, "we carry"]
    learns = st.lists(st.booleans(), min_size=len(texts) - 1, max_size=len(texts) - 1)
    folds = draw.draw(st.lists(learns, min_size=1, max_size=4))
    train = np.array([[*fold, True] for fold in folds])

    words = fold_words(texts, train, max_terms)

    assert list(words.terms) == sorted(words.terms)
    assert words.idf.any(axis=0).all()
    for fold, own in enumerate(train):
        pipeline = text_pipeline().set_params(choose__max_terms=max_terms)
        pipeline.fit([text for text, seen in zip(texts, own, strict=True) if seen])
        used = np.flatnonzero(words.idf[fold])
        assert words.terms_of(fold) == tuple(pipeline[:-1].get_feature_names_out())
        np.testing.assert_allclose(words.idf[fold, used], pipeline["weigh"].idf_, rtol=1e-14)
        expected = pipeline.transform(texts).toarray()
        weights = weights_of(words, fold)
        np.testing.assert_allclose(weights[:, used], expected, atol=1e-14)
        assert not np.delete(weights, used, axis=1).any()


def test_a_fold_gives_ties_to_the_alphabetically_earlier_term() -> None:
    names = [f"t{index:02d}" for index in range(40)]
    texts = ["zz", "zz", *names[::-1], "aa aa aa"]
    train = np.ones((1, len(texts)), dtype=bool)
    train[0, -1] = False

    words = fold_words(texts, train, max_terms=17)

    assert words.terms == (*names[:16], "zz")


@pytest.mark.parametrize("texts", [["we add", "x", "="], ["x", "=", "7"]])
def test_folds_that_learn_no_word_are_named(texts: list[str]) -> None:
    train = np.array([[True, True, False], [False, True, True]])

    with pytest.raises(NotEnoughDataError, match=r"no word to count in folds \[.*1\]"):
        fold_words(texts, train)
