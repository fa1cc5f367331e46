from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer
from sklearn.preprocessing import StandardScaler

from taprobe_core.errors import DataError, NonFiniteError
from taprobe_core.solvers.columns import fold_moments
from taprobe_core.solvers.linear.fold_matrix import FoldMatrix, TextBlock

TEXTS = [
    "wait let me check the sum again",
    "the sum is twelve",
    "so twelve plus thirty is forty two",
    "therefore the answer is forty two",
    "!!",
    "hmm maybe I should check",
    "check check check the answer",
    "unrelated words appear nowhere else",
]


def masks(rng: np.random.Generator, n_folds: int, n_rows: int) -> np.ndarray:
    train = rng.random((n_folds, n_rows)) < 0.7
    train[:, :2] = True
    return train


def text_block(train: np.ndarray) -> tuple[TextBlock, list[TfidfVectorizer]]:
    counter = CountVectorizer(ngram_range=(1, 2))
    counts = counter.fit_transform(TEXTS)
    idf = np.zeros((len(train), counts.shape[1]))
    fitted = []
    for fold, rows in enumerate(train):
        tfidf = TfidfVectorizer(ngram_range=(1, 2))
        tfidf.fit([text for text, chosen in zip(TEXTS, rows, strict=True) if chosen])
        for term, column in tfidf.vocabulary_.items():
            idf[fold, counter.vocabulary_[term]] = tfidf.idf_[column]
        fitted.append(tfidf)
    return TextBlock(sp.csr_matrix(counts), idf), fitted


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 10**6),
    st.sampled_from([0.0, 1.0, 1e4, -3e7]),
    st.sampled_from([1e-3, 1.0, 1e5]),
    st.sampled_from([np.float32, np.float64]),
)
def test_means_and_scales_are_the_standard_scalers(seed, centre, spread, dtype):
    rng = np.random.default_rng(seed)
    dense = (centre + spread * rng.standard_normal((40, 5))).astype(dtype)
    dense[:, 3] = centre
    train = masks(rng, 4, 40)
    dense[train[1], 4] = dtype(0.1)
    matrix = FoldMatrix(train, dense)
    for fold, rows in enumerate(train):
        scaler = StandardScaler().fit(dense[rows].astype(np.float64))
        np.testing.assert_allclose(matrix.mean[fold], scaler.mean_, rtol=1e-12, atol=1e-15)
        np.testing.assert_allclose(matrix.scale[fold], scaler.scale_, rtol=1e-9)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_rows_are_not_changed_by_their_moments(dtype, monkeypatch):
    monkeypatch.setattr("taprobe_core.solvers.columns.FEATURES_AT_ONCE", 2)
    rng = np.random.default_rng(0)
    dense = (5 + rng.standard_normal((30, 5))).astype(dtype)
    train, before = masks(rng, 3, 30), dense.copy()
    mean, scale = fold_moments(dense, train)
    np.testing.assert_array_equal(dense, before)
    np.testing.assert_allclose(mean, [before[rows].astype(float).mean(0) for rows in train])
    np.testing.assert_allclose(scale, [before[rows].astype(float).std(0) for rows in train])


def test_a_feature_that_varies_outside_training_only_has_scale_one():
    rng = np.random.default_rng(0)
    dense = rng.standard_normal((30, 3)) * 1e3
    train = np.ones((2, 30), dtype=bool)
    train[1, :10] = False
    dense[10:, 2] = 7.3
    matrix = FoldMatrix(train, dense)
    assert matrix.scale[1, 2] == 1.0
    assert matrix.mean[1, 2] == pytest.approx(7.3, rel=1e-14)
    assert matrix.scale[0, 2] > 100


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.float64, 1e-12)])
def test_products_are_those_of_each_folds_standardised_rows(dtype, tolerance):
    rng = np.random.default_rng(3)
    dense = (100 + 3 * rng.standard_normal((50, 8))).astype(np.float32)
    train = masks(rng, 3, 50)
    matrix = FoldMatrix(train, dense)
    fold = np.array([2, 0, 0, 1])
    coef = torch.as_tensor(rng.standard_normal((4, 8))).to(dtype)
    dual = torch.as_tensor(rng.standard_normal((4, 50))).to(dtype)
    forward, backward = matrix.forward(fold, coef), matrix.backward(fold, dual)
    kernel = matrix.kernel(fold, dual)
    assert forward.dtype == backward.dtype == kernel.dtype == dtype
    for column, each in enumerate(fold):
        rows = StandardScaler().fit(dense[train[each]].astype(float)).transform(dense.astype(float))
        own, weights = coef[column].double().numpy(), dual[column].double().numpy()
        np.testing.assert_allclose(matrix.rows(each).numpy(), rows, atol=1e-10)
        for found, expected in (
            (forward[column], rows @ own),
            (backward[column], rows.T @ weights),
            (kernel[column], rows @ (rows.T @ weights)),
        ):
            scale = np.abs(expected).max()
            np.testing.assert_allclose(found.numpy(), expected, atol=tolerance * scale)


def test_large_matrices_are_read_in_pieces_with_the_same_result(monkeypatch):
    rng = np.random.default_rng(1)
    dense, train = rng.standard_normal((33, 7)), masks(rng, 2, 33)
    fold, dual = np.array([0, 1, 1]), torch.as_tensor(rng.standard_normal((3, 33)))
    whole = FoldMatrix(train, dense)
    monkeypatch.setattr("taprobe_core.solvers.linear.fold_matrix._CHUNK_VALUES", 40)
    monkeypatch.setattr("taprobe_core.solvers.linear.fold_matrix._CACHED_FLOAT64_VALUES", 0)
    pieces = FoldMatrix(train, dense)
    torch.testing.assert_close(pieces.kernel(fold, dual), whole.kernel(fold, dual))
    torch.testing.assert_close(pieces.backward(fold, dual), whole.backward(fold, dual))
    gram = pieces.shared_gram(torch.float64)
    torch.testing.assert_close(gram, whole.shared_gram(torch.float64))
    torch.testing.assert_close(gram.diagonal(), pieces.shared_lengths(), rtol=1e-5, atol=1e-5)


def test_text_rows_are_those_of_a_vectorizer_fitted_on_the_folds_training_texts():
    train = masks(np.random.default_rng(5), 3, len(TEXTS))
    block, fitted = text_block(train)
    for fold, tfidf in enumerate(fitted):
        expected = tfidf.transform(TEXTS).toarray()
        found = block.rows(fold)
        inside = block.idf[fold] > 0
        np.testing.assert_allclose(found[:, inside], expected, atol=1e-14)
        assert not found[:, ~inside].any()


def test_text_stands_before_dense_features_in_every_product():
    rng = np.random.default_rng(8)
    train = masks(rng, 3, len(TEXTS))
    block, _ = text_block(train)
    matrix = FoldMatrix(train, rng.standard_normal((len(TEXTS), 2)), block)
    assert (matrix.n_terms, matrix.n_dense, matrix.n_features) == (
        block.n_terms,
        2,
        block.n_terms + 2,
    )
    fold = np.array([1, 2])
    coef = torch.as_tensor(rng.standard_normal((2, matrix.n_features)))
    dual = torch.as_tensor(rng.standard_normal((2, len(TEXTS))))
    for column, each in enumerate(fold):
        rows = matrix.rows(each)
        torch.testing.assert_close(matrix.forward(fold, coef)[column], rows @ coef[column])
        torch.testing.assert_close(matrix.backward(fold, dual)[column], rows.T @ dual[column])


def test_shared_and_no_scaling_are_the_same_for_every_fold():
    rng = np.random.default_rng(2)
    dense, train = 5 + rng.standard_normal((20, 3)), masks(rng, 2, 20)
    shared = FoldMatrix(train, dense, scaling="shared")
    np.testing.assert_allclose(shared.mean, np.tile(dense.mean(0), (2, 1)))
    np.testing.assert_allclose(shared.scale, np.tile(dense.std(0), (2, 1)))
    plain = FoldMatrix(train, dense, scaling="none")
    assert not plain.mean.any()
    assert (plain.scale == 1).all()
    np.testing.assert_allclose(plain.rows(1).numpy(), dense)


def test_faulty_input_is_refused():
    train = np.ones((2, 4), dtype=bool)
    dense = np.ones((4, 2))
    block = TextBlock(sp.csr_matrix(np.eye(4)), np.ones((2, 4)))
    with pytest.raises(DataError, match="no features"):
        FoldMatrix(train)
    with pytest.raises(DataError, match=r"\(3, 2\) for 4 rows"):
        FoldMatrix(train, dense[:3])
    with pytest.raises(DataError, match="no training row"):
        FoldMatrix(np.zeros((1, 4), dtype=bool), dense)
    with pytest.raises(NonFiniteError, match="1 rows"):
        FoldMatrix(train, np.where(np.eye(4, 2, k=-2) > 0, np.nan, dense)[[0, 1, 2, 0]])
    with pytest.raises(DataError, match="term weights"):
        FoldMatrix(train, None, TextBlock(block.counts, np.ones((3, 4))))
    with pytest.raises(DataError, match="negative"):
        FoldMatrix(train, None, TextBlock(block.counts, -block.idf))


def test_a_row_without_a_term_of_the_fold_is_zero():
    block = TextBlock(sp.csr_matrix(np.array([[1, 2], [0, 0], [3, 0]])), np.array([[0.0, 1.5]]))
    np.testing.assert_array_equal(block.rows(0), [[0, 1], [0, 0], [0, 0]])
    gram = block.shared_gram()
    np.testing.assert_allclose(gram, block.rows(0) @ block.rows(0).T)


def test_a_fold_that_does_not_see_a_feature_is_a_fold_without_it():
    rng = np.random.default_rng(7)
    dense = rng.standard_normal((30, 6)) * 3 + 5
    train = masks(rng, 3, 30)
    seen = np.array([[True] * 6, [True, False] * 3, [False] * 5 + [True]])
    whole = FoldMatrix(train, dense, visible=seen)
    fold = np.arange(3)
    coef = torch.from_numpy(rng.standard_normal((3, 6)))
    dual = torch.from_numpy(rng.standard_normal((3, 30)))
    forward, backward = whole.forward(fold, coef).numpy(), whole.backward(fold, dual).numpy()
    for at, own in enumerate(seen):
        part = FoldMatrix(train, dense[:, own])
        one = np.array([at])
        np.testing.assert_allclose(
            forward[at], part.forward(one, coef[at : at + 1, own])[0], atol=1e-12
        )
        np.testing.assert_allclose(
            backward[at, own], part.backward(one, dual[at : at + 1])[0], atol=1e-12
        )
        assert not backward[at, ~own].any()
    with pytest.raises(DataError, match="visible features are"):
        FoldMatrix(train, dense, visible=seen[:2])


def test_the_gram_matrix_of_texts_is_that_of_all_terms_common_or_rare():
    rng = np.random.default_rng(3)
    words = np.array([f"w{at}" for at in range(400)])
    share = 1 / np.arange(1, 401)
    texts = [" ".join(rng.choice(words, 12, p=share / share.sum())) for _ in range(150)]
    counts = sp.csr_matrix(CountVectorizer().fit_transform(texts))
    block = TextBlock(counts, rng.random((2, counts.shape[1])) + 0.5)
    rows = counts.toarray() * block.idf.mean(axis=0)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    is_common = (counts.toarray() > 0).sum(axis=0) * 50 > 150
    assert 0 < is_common.sum() < len(is_common)
    np.testing.assert_allclose(block.shared_gram(), rows @ rows.T, atol=1e-12)
