from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score
from sklearn.preprocessing import StandardScaler
from sklearn.utils.class_weight import compute_sample_weight

from taprobe_core.errors import DataError, NotEnoughDataError, NumericsError
from taprobe_core.solvers.columns import FitRequest
from taprobe_core.solvers.linear import logistic, logistic_batch
from taprobe_core.solvers.linear.dual_subspace import DualProblem, best_intercept
from taprobe_core.solvers.linear.fold_matrix import FoldMatrix, TextBlock
from taprobe_core.solvers.linear.kernel_systems import BorderedInverse, NarrowInverse
from taprobe_core.solvers.linear.logistic import balanced_weights, solve_logistic
from taprobe_core.solvers.linear.logistic_phases import newton

N_FOLDS = 5


def problem(n_rows, n_features, kind, seed=0, n_targets=3):
    """Features, folds and labels at several percentiles of a planted signal."""
    rng = np.random.default_rng(seed)
    latent = rng.standard_normal((n_rows, n_features))
    signal = latent[:, :4].sum(1) + rng.standard_normal(n_rows)
    dense = latent
    if kind == "ill":
        rotation = np.linalg.qr(rng.standard_normal((n_features, n_features)))[0]
        dense = (latent * np.arange(1, n_features + 1) ** -0.7) @ rotation + 2.0
        dense[:, 0] *= 100
    block = np.arange(n_rows) * N_FOLDS // n_rows
    train = np.stack([block != fold for fold in range(N_FOLDS)])
    fold = np.repeat(np.arange(N_FOLDS), n_targets)
    cuts = np.quantile(signal, [0.9, 0.8, 0.6][:n_targets])
    y = (signal[:, None] > np.tile(cuts, N_FOLDS)).astype(float)
    return dense.astype(np.float32), train, FitRequest(fold, y, balanced_weights(y, train, fold))


def reference(values, columns, column, C, solver="newton-cholesky"):
    rows = columns.weight[:, column] > 0
    model = LogisticRegression(C=C, tol=1e-10, max_iter=10_000, solver=solver)
    model.fit(values[rows], columns.y[rows, column], columns.weight[rows, column])
    return model


def standardised(dense, rows):
    dense = dense.astype(np.float64)
    return StandardScaler().fit(dense[rows]).transform(dense)


def agree(dense, train, columns, solution, C, tolerance, chosen=(0, 4, 14)):
    for column in chosen:
        values = standardised(dense, train[columns.fold[column]])
        model = reference(values, columns, column, C[column])
        expected = model.decision_function(values)
        np.testing.assert_allclose(solution.decision[:, column], expected, atol=tolerance)
        np.testing.assert_allclose(solution.coef[column], model.coef_[0], atol=tolerance)
        assert solution.intercept[column] == pytest.approx(model.intercept_[0], abs=tolerance)
        held_out = columns.weight[:, column] == 0
        y = columns.y[held_out, column]
        assert average_precision_score(y, solution.decision[held_out, column]) == pytest.approx(
            average_precision_score(y, expected[held_out]), abs=1e-6
        )


@pytest.fixture
def without_newton(monkeypatch) -> None:
    monkeypatch.setattr(logistic, "MAX_NEWTON_FEATURES", 0)
    monkeypatch.setattr(logistic, "MAX_NEWTON_VALUES", 0)


@pytest.mark.parametrize("kind", ["iid", "ill"])
def test_newton_gives_scikit_learns_optimum(kind):
    dense, train, columns = problem(120, 30, kind)
    C = np.tile([0.1, 1.0, 50.0], N_FOLDS)
    solution = solve_logistic(FoldMatrix(train, dense), columns, C)
    agree(dense, train, columns, solution, C, 1e-7)
    assert solution.n_iter.max() < 25


@pytest.mark.usefixtures("without_newton")
@pytest.mark.parametrize("kind", ["iid", "ill"])
@pytest.mark.parametrize("shape", [(120, 30), (120, 200)])
@pytest.mark.parametrize("way", ["as measured", "diagonal", "factorised", "no reference"])
@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_every_way_through_the_dual_ends_at_the_same_optimum(
    kind, shape, way, precision, monkeypatch
):
    if precision == "float32":
        monkeypatch.setattr(logistic, "_FLOAT64_VALUES", 0)
    easy = {"diagonal": 10**6, "factorised": -1}.get(way)
    if easy is not None:
        monkeypatch.setattr(logistic_batch, "MAX_NARROW_FEATURES", 0)
        monkeypatch.setattr(logistic_batch, "_EASY_ITERATIONS", easy)
    if way == "no reference":
        monkeypatch.setattr(logistic_batch, "MIN_COLUMNS_FOR_REFERENCE", 10**6)
    dense, train, columns = problem(*shape, kind)
    C = np.tile([0.3, 1.0, 5.0], N_FOLDS)
    solution = solve_logistic(FoldMatrix(train, dense), columns, C)
    agree(dense, train, columns, solution, C, 2e-3, chosen=(1, 14))
    assert solution.n_iter.min() > 0


@pytest.mark.usefixtures("without_newton")
@pytest.mark.parametrize("is_tall", [True, False])
def test_tall_matrices_factorise_their_features_and_others_their_rows(is_tall, monkeypatch):
    refused = "BorderedInverse" if is_tall else "NarrowInverse"
    monkeypatch.setattr(logistic_batch, refused, None)
    monkeypatch.setattr(logistic_batch, "_EASY_ITERATIONS", -1)
    dense, train, columns = problem(120, 40 if is_tall else 41, "ill")
    C = np.ones(len(columns))
    solution = solve_logistic(FoldMatrix(train, dense), columns, C, tol=1e-7)
    agree(dense, train, columns, solution, C, 2e-5, chosen=(1, 14))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_systems_of_the_features_and_of_the_rows_have_one_solution(dtype):
    rng = np.random.default_rng(5)
    shared = torch.as_tensor(rng.standard_normal((60, 7)))
    ridge = torch.as_tensor(rng.uniform(0.5, 20, 60)).to(dtype)
    patterns = rng.random((3, 60)) < 0.8
    pattern = np.array([2, 0, 2])
    right = torch.as_tensor(rng.standard_normal((3, 60)) * patterns[pattern]).to(dtype)
    asked = np.array([True, False, True])
    narrow = NarrowInverse(shared, ridge, patterns, asked).solve(right, pattern)
    gram = (shared @ shared.T).to(dtype)
    wide = BorderedInverse(gram, ridge, patterns, asked).solve(right, pattern)
    assert narrow.dtype == dtype
    tolerance = 1e-4 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(narrow, wide, rtol=0, atol=tolerance)
    assert not narrow.numpy()[~patterns[pattern]].any()
    np.testing.assert_allclose(narrow.sum(1), 0, atol=tolerance)
    for column, each in enumerate(pattern):
        inside = patterns[each]
        system = gram.numpy()[np.ix_(inside, inside)] + np.diag(ridge.numpy()[inside])
        left = system @ narrow[column].numpy()[inside] - right[column].numpy()[inside]
        np.testing.assert_allclose(left, left.mean(), atol=100 * tolerance)


def test_normal_equations_without_a_row_are_an_error():
    shared, ridge = torch.zeros(6, 2).double(), torch.ones(6).double()
    patterns = np.array([[True] * 6, [False] * 6])
    NarrowInverse(shared, ridge, patterns, np.array([True, False]))
    with pytest.raises(NumericsError, match="not positive definite in subset 1 of rows"):
        NarrowInverse(shared, ridge, patterns, np.array([True, True]))


def test_newton_leaves_out_a_feature_of_factor_0():
    dense, _, columns = problem(120, 6, "iid")
    inputs = torch.as_tensor(np.column_stack([dense, np.ones(120)]).astype(float))
    sign = torch.as_tensor(columns.y[:, :2].T * 2 - 1)
    weight = torch.as_tensor(columns.weight[:, :2].T.copy())
    penalty = torch.ones(2, 7).double()
    penalty[:, -1] = 0
    factor = torch.ones(2, 7).double()
    factor[1, 2], factor[1, 4] = 0, 3
    found, _ = newton(inputs, factor, sign, weight, penalty)
    kept = [0, 1, 3, 4, 5, 6]
    scaled = inputs[:, kept] * factor[1, kept]
    alone, _ = newton(scaled, torch.ones(1, 6).double(), sign[1:], weight[1:], penalty[1:, kept])
    assert found[1, 2] == 0
    torch.testing.assert_close(found[1:, kept], alone)
    assert found[0, 2] != 0


@pytest.mark.usefixtures("without_newton")
def test_columns_that_a_phase_leaves_open_go_on_in_the_next(monkeypatch):
    monkeypatch.setattr(logistic_batch, "_DIAGONAL_ITERATIONS", 3)
    monkeypatch.setattr(logistic_batch, "_FACTOR_ITERATIONS", 4)
    monkeypatch.setattr(logistic, "_FLOAT64_VALUES", 0)
    dense, train, columns = problem(120, 200, "ill")
    C = np.ones(len(columns))
    solution = solve_logistic(FoldMatrix(train, dense), columns, C)
    agree(dense, train, columns, solution, C, 2e-3)
    monkeypatch.setattr(logistic_batch, "_ALWAYS_FACTORISED_ROWS", 0)
    monkeypatch.setattr(logistic_batch, "MIN_COLUMNS_FOR_REFERENCE", 10**6)
    solution = solve_logistic(FoldMatrix(train, dense), columns, C)
    agree(dense, train, columns, solution, C, 2e-3)


@pytest.mark.usefixtures("without_newton")
def test_batches_of_columns_change_nothing(monkeypatch):
    dense, train, columns = problem(80, 100, "iid")
    matrix, C = FoldMatrix(train, dense), np.ones(len(columns))
    together = solve_logistic(matrix, columns, C)
    monkeypatch.setattr(logistic, "MAX_COLUMNS_PER_BATCH", 4)
    apart = solve_logistic(matrix, columns, C)
    np.testing.assert_allclose(apart.decision, together.decision, atol=5e-4)
    again = solve_logistic(matrix, columns, C)
    np.testing.assert_array_equal(apart.decision, again.decision)
    shuffled = np.random.default_rng(0).permutation(len(columns))
    mixed = solve_logistic(matrix, columns.take(shuffled), C)
    np.testing.assert_allclose(mixed.decision, together.decision[:, shuffled], atol=5e-4)


@pytest.mark.usefixtures("without_newton")
def test_a_separable_problem_with_a_weak_penalty_converges():
    dense, train, columns = problem(60, 150, "ill")
    C = np.full(len(columns), 1e3)
    solution = solve_logistic(FoldMatrix(train, dense), columns, C)
    agree(dense, train, columns, solution, C, 1e-2, chosen=(3,))


def test_text_alone_and_with_dense_features_is_solved_exactly():
    rng = np.random.default_rng(4)
    counts = sp.csr_matrix(rng.poisson(0.2, (60, 80)))
    dense, train, columns = problem(60, 3, "iid")
    seen = np.stack([np.asarray(counts[rows].sum(0)).ravel() > 0 for rows in train])
    block = TextBlock(counts, seen * rng.uniform(1, 4, 80))
    for own in (None, dense):
        matrix = FoldMatrix(train, own, block)
        solution = solve_logistic(matrix, columns, np.ones(len(columns)))
        for column in (0, 8, 13):
            fold = columns.fold[column]
            values = matrix.rows(fold).numpy()
            model = reference(values, columns, column, 1.0)
            expected = model.decision_function(values)
            np.testing.assert_allclose(solution.decision[:, column], expected, atol=2e-3)
            assert not solution.coef[column, :80][~seen[fold]].any()


def test_text_alone_needs_no_gram_matrix_where_its_reference_is_easy(monkeypatch):
    rng = np.random.default_rng(4)
    counts = sp.csr_matrix(rng.poisson(0.2, (60, 80)))
    _, train, columns = problem(60, 3, "iid")
    block = TextBlock(counts, rng.uniform(1, 4, (N_FOLDS, 80)))
    matrix, C = FoldMatrix(train, None, block), np.ones(len(columns))
    expected = solve_logistic(matrix, columns, C, tol=1e-7).decision
    dual = rng.standard_normal((2, 60))
    terms = block.shared.backward(np.zeros(2, np.int64), dual)
    product = block.shared.forward(np.zeros(2, np.int64), terms)
    np.testing.assert_allclose(product, dual @ block.shared_gram(), atol=1e-12)

    def refuse(_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(TextBlock, "shared_gram", refuse)
    found = solve_logistic(matrix, columns, C, tol=1e-7).decision
    np.testing.assert_array_equal(found, expected)


def test_weights_are_scikit_learns_balanced_ones():
    _, train, columns = problem(50, 4, "iid")
    for column, fold in enumerate(columns.fold):
        rows = train[fold]
        expected = compute_sample_weight("balanced", columns.y[rows, column])
        np.testing.assert_allclose(columns.weight[rows, column], expected)
        assert not columns.weight[~rows, column].any()


def test_one_class_is_named():
    dense, train, columns = problem(50, 4, "iid")
    y = columns.y.copy()
    y[train[2], 7] = 0
    with pytest.raises(NotEnoughDataError, match="column 7, fold 2, class 0"):
        balanced_weights(y, train, columns.fold)
    with pytest.raises(NotEnoughDataError, match="1 columns have one class"):
        solve_logistic(
            FoldMatrix(train, dense), FitRequest(columns.fold, y, columns.weight), np.ones(15)
        )


def test_other_labels_are_refused():
    dense, train, columns = problem(50, 4, "iid")
    y = np.where(columns.weight > 0, columns.y, 7.0)
    matrix = FoldMatrix(train, dense)
    held_out_only = FitRequest(columns.fold, y, columns.weight)
    found = solve_logistic(matrix, held_out_only, np.ones(15))
    np.testing.assert_array_equal(
        found.decision, solve_logistic(matrix, columns, np.ones(15)).decision
    )
    y = np.where(columns.weight > 0, columns.y * 0.5, 0)
    with pytest.raises(DataError, match="labels other than 0 and 1"):
        solve_logistic(matrix, FitRequest(columns.fold, y, columns.weight), np.ones(15))


@pytest.mark.usefixtures("without_newton")
def test_a_column_that_does_not_converge_is_an_error():
    dense, train, columns = problem(60, 100, "ill")
    with pytest.raises(NumericsError, match=r"did not converge in 3 iterations in column \d+"):
        solve_logistic(FoldMatrix(train, dense), columns, np.ones(15), tol=1e-14, max_iter=3)


def test_features_that_say_nothing_leave_the_intercept():
    train = np.ones((1, 40), dtype=bool)
    y = (np.arange(40) % 4 == 0).astype(float)[:, None]
    columns = FitRequest(np.zeros(1, np.int64), y, np.ones((40, 1)))
    for width in (3, 2000):
        solution = solve_logistic(FoldMatrix(train, np.ones((40, width))), columns, np.ones(1))
        np.testing.assert_allclose(solution.decision, np.log(1 / 3), atol=1e-6)
        np.testing.assert_allclose(solution.coef, 0, atol=1e-12)


def test_the_best_intercept_is_found_from_afar():
    sign = torch.tensor([[1.0] * 3 + [-1.0] * 9]).double()
    data = DualProblem(sign, torch.ones_like(sign), torch.ones_like(sign), torch.ones(1, 1))
    for shift in (0.0, 900.0, -35.0):
        found = best_intercept(data, torch.full_like(sign, shift), torch.zeros(1, 1).double())
        assert float(found) == pytest.approx(np.log(1 / 3) - shift, abs=1e-9)


@pytest.mark.parametrize("n_rows", [200, 400])  # by Newton's method, and in a batch
def test_a_fold_that_is_blind_to_features_is_fitted_without_them(n_rows):
    dense, train, labels = problem(n_rows, 300, "iid", seed=4, n_targets=1)
    y = np.tile(labels.y, 2)
    seen = np.ones((2 * N_FOLDS, 300), dtype=bool)
    seen[:N_FOLDS, -4:] = False
    masks = np.tile(train, (2, 1))
    fold = np.arange(2 * N_FOLDS)
    columns = FitRequest(fold, y, balanced_weights(y, masks, fold))
    ones = np.ones(len(fold))
    found = solve_logistic(FoldMatrix(masks, dense, visible=seen), columns, ones, tol=1e-6)
    assert not found.coef[:N_FOLDS, -4:].any()
    assert found.coef[N_FOLDS:, -4:].all()
    for part, own in ((slice(0, N_FOLDS), slice(0, -4)), (slice(N_FOLDS, None), slice(None))):
        alone = FitRequest(fold[:N_FOLDS], y[:, part], columns.weight[:, part])
        matrix = FoldMatrix(train, np.ascontiguousarray(dense[:, own]))
        expected = solve_logistic(matrix, alone, ones[:N_FOLDS], tol=1e-6)
        np.testing.assert_allclose(found.decision[:, part], expected.decision, atol=1e-4)
