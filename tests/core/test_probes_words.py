from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_matrix
from sklearn.exceptions import NotFittedError
from sklearn.feature_extraction.text import TfidfVectorizer

from taprobe_core.probes.words import FrequentTerms, has_words, text_pipeline, weigh_texts

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
