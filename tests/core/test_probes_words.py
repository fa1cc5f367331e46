from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.feature_extraction.text import TfidfVectorizer

from taprobe_core.probes.words import (
    choose_terms,
    count_terms,
    inverse_document_frequency,
    weigh_terms,
)

words = st.sampled_from(["so", "we", "Add", "carry", "x", "=", "12", "wait,", "größe"])
texts = st.lists(st.lists(words, max_size=8).map(" ".join), min_size=1, max_size=12)


@settings(max_examples=50)
@given(texts)
def test_weights_are_scikit_learns_defaults(texts: list[str]) -> None:
    found = count_terms([*texts, "so we"])
    weights = weigh_terms(found.counts, inverse_document_frequency(found.counts))

    reference = TfidfVectorizer(ngram_range=(1, 2))
    expected = reference.fit_transform([*texts, "so we"])
    assert list(found.terms) == list(reference.get_feature_names_out())
    np.testing.assert_allclose(weights.toarray(), expected.toarray(), atol=1e-12)


def test_ties_go_to_the_alphabetically_earlier_term() -> None:
    # 40 terms occur once; unstable sorting would take any of them.
    names = [f"t{index:02d}" for index in range(40)]
    found = count_terms(["zz", "zz", *names[::-1]])

    columns = choose_terms(found.counts, limit=17)

    assert [found.terms[column] for column in columns] == [*names[:16], "zz"]


def test_terms_that_do_not_occur_are_never_chosen() -> None:
    found = count_terms(["so we add", "carry"])

    assert [found.terms[column] for column in choose_terms(found.counts[:1])] == [
        "add", "so", "so we", "we", "we add",
    ]  # fmt: skip


def test_texts_without_words_have_no_terms() -> None:
    found = count_terms(["x = 2", ""])

    assert found.terms == ()
    assert found.counts.shape == (2, 0)
    assert choose_terms(found.counts).size == 0


def test_counts_of_given_terms_keep_their_order() -> None:
    found = count_terms(["we add and add", "none"], terms=("we", "add"))

    assert found.counts.toarray().tolist() == [[1, 2], [0, 0]]
