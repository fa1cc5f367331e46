from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler

from taprobe_core.errors import DataError, NumericsError
from taprobe_core.solvers.columns import FitRequest
from taprobe_core.solvers.linear import ridge
from taprobe_core.solvers.linear.fold_matrix import FoldMatrix, TextBlock
from taprobe_core.solvers.linear.kernel_systems import BorderedInverse
from taprobe_core.solvers.linear.ridge import solve_ridge
from taprobe_core.solvers.linear.solution import agreeing_groups, row_patterns


@pytest.fixture(params=["primal", "dual"])
def way(request, monkeypatch) -> str:
    monkeypatch.setattr(ridge, "MAX_PRIMAL_FEATURES", 10**6 if request.param == "primal" else 0)
    return request.param


def problem(n_rows, n_features, n_folds, seed=0, offset=3.0):
    rng = np.random.default_rng(seed)
    spectrum = np.arange(1, n_features + 1) ** -0.5
    rotation = np.linalg.qr(rng.standard_normal((n_features, n_features)))[0]
    dense = (rng.standard_normal((n_rows, n_features)) * spectrum) @ rotation + offset
    block = np.arange(n_rows) * n_folds // n_rows
    train = np.stack([(block != fold) & (block != (fold + 1) % n_folds) for fold in range(n_folds)])
    return dense, train, rng


def expect(dense, train, columns, alpha, scaler_rows=None):
    """One scikit-learn pipeline per column: coefficients, intercepts, decisions."""
    found = []
    for column, fold in enumerate(columns.fold):
        rows = train[fold]
        scaler = StandardScaler().fit(dense[rows] if scaler_rows is None else dense[scaler_rows])
        values, weight = scaler.transform(dense), columns.weight[rows, column]
        model = Ridge(alpha[column]).fit(values[rows], columns.y[rows, column], weight)
        found.append((model.coef_, model.intercept_, model.predict(values)))
    return tuple(np.array(each) for each in zip(*found, strict=True))


def agree(solution, expected, tolerance=1e-8):
    for found, wanted in zip(
        (solution.coef, solution.intercept, solution.decision.T), expected, strict=True
    ):
        np.testing.assert_allclose(found, wanted, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("shape", [(60, 12), (60, 150)])
@pytest.mark.parametrize("weights", ["equal", "by fold", "by row", "by column", "with gaps"])
def test_every_path_gives_scikit_learns_optimum(way, shape, weights):
    dense, train, rng = problem(*shape, n_folds=6)
    fold = np.repeat(np.arange(6), 3)
    alpha = np.tile([0.3, 1.0, 20.0], 6)
    weight = train[fold].T.astype(float)
    if weights == "by fold":
        weight = weight * (1 + fold)
    elif weights == "by row":
        weight = weight * rng.uniform(0.1, 4, len(dense))[:, None]
    elif weights == "by column":
        weight = weight * rng.uniform(0.1, 4, weight.shape)
    elif weights == "with gaps":
        weight = weight * (rng.random(weight.shape) < 0.9)
    columns = FitRequest(fold, rng.standard_normal(weight.shape), weight)
    solution = solve_ridge(FoldMatrix(train, dense), columns, alpha)
    agree(solution, expect(dense, train, columns, alpha))
    assert (solution.n_iter == 0).all() == (way == "primal")


def test_large_offsets_and_scales_do_not_cost_accuracy(way):
    dense, train, rng = problem(50, 80, 5, offset=1e4)
    dense[:, 5] *= 1e3
    dense[:, 6] = -2.5
    columns = FitRequest(np.arange(5), rng.standard_normal((50, 5)), train.T.astype(float))
    alpha = np.ones(5)
    solution = solve_ridge(FoldMatrix(train, dense), columns, alpha)
    agree(solution, expect(dense, train, columns, alpha), 1e-7)
    np.testing.assert_allclose(solution.coef[:, 6], 0, atol=1e-12)


def test_shared_scaling_is_another_estimator_solved_as_exactly(way):
    dense, train, rng = problem(40, 70, 4)
    columns = FitRequest(np.arange(4), rng.standard_normal((40, 4)), train.T.astype(float))
    solution = solve_ridge(FoldMatrix(train, dense, scaling="shared"), columns, np.ones(4))
    everything = np.ones(40, dtype=bool)
    agree(solution, expect(dense, train, columns, np.ones(4), everything))
    own = solve_ridge(FoldMatrix(train, dense), columns, np.ones(4))
    assert np.abs(own.decision - solution.decision).max() > 1e-4


@pytest.mark.parametrize("with_dense", [False, True])
def test_text_blocks_are_solved_exactly(with_dense):
    rng = np.random.default_rng(4)
    counts = sp.csr_matrix(rng.poisson(0.15, (45, 90)))
    train = problem(45, 2, 5)[1]
    seen = np.stack([np.asarray(counts[rows].sum(0)).ravel() > 0 for rows in train])
    block = TextBlock(counts, seen * rng.uniform(1, 4, 90))
    dense = rng.standard_normal((45, 3)) if with_dense else None
    matrix = FoldMatrix(train, dense, block)
    columns = FitRequest(np.arange(5), rng.standard_normal((45, 5)), train.T.astype(float))
    solution = solve_ridge(matrix, columns, np.ones(5))
    assert solution.n_iter.min() > 0
    for fold, rows in enumerate(train):
        values = matrix.rows(fold).numpy()
        model = Ridge(1.0).fit(values[rows], columns.y[rows, fold])
        np.testing.assert_allclose(solution.decision[:, fold], model.predict(values), atol=1e-8)
        np.testing.assert_allclose(solution.coef[fold], model.coef_, atol=1e-8)
        assert not solution.coef[fold, :90][~seen[fold]].any()


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.integers(6, 25), st.integers(1, 40), st.floats(1e-3, 1e3))
def test_gradients_vanish_at_the_solution(seed, n_rows, n_features, alpha):
    rng = np.random.default_rng(seed)
    dense, train = rng.standard_normal((n_rows, n_features)), np.ones((1, n_rows), dtype=bool)
    columns = FitRequest(
        np.zeros(1, np.int64), rng.standard_normal((n_rows, 1)), rng.random((n_rows, 1)) + 0.1
    )
    matrix = FoldMatrix(train, dense)
    for limit in (0, 10**6):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ridge, "MAX_PRIMAL_FEATURES", limit)
            solution = solve_ridge(matrix, columns, np.array([alpha]))
        error = columns.weight[:, 0] * (solution.decision - columns.y)[:, 0]
        gradient = matrix.rows(0).numpy().T @ error + alpha * solution.coef[0]
        size = 1 + np.abs(alpha * solution.coef).max()
        assert np.abs(gradient).max() < 1e-7 * size
        assert abs(error.sum()) < 1e-8


def test_a_constant_target_is_predicted_by_the_intercept(way):
    dense, train, _ = problem(30, 40, 3)
    columns = FitRequest(np.arange(3), np.full((30, 3), 2.5), train.T.astype(float))
    solution = solve_ridge(FoldMatrix(train, dense), columns, np.ones(3))
    np.testing.assert_allclose(solution.decision, 2.5, atol=1e-12)
    np.testing.assert_allclose(solution.coef, 0, atol=1e-12)


def test_held_out_targets_do_not_matter(way):
    dense, train, rng = problem(30, 40, 3)
    y = rng.standard_normal((30, 3))
    weight = train.T.astype(float)
    matrix = FoldMatrix(train, dense)
    one = solve_ridge(matrix, FitRequest(np.arange(3), y, weight), np.ones(3))
    other = np.where(weight > 0, y, 1e6)
    two = solve_ridge(matrix, FitRequest(np.arange(3), other, weight), np.ones(3))
    np.testing.assert_array_equal(one.decision, two.decision)


def test_faulty_requests_name_the_column(way):
    dense, train, rng = problem(20, 4, 4)
    columns = FitRequest(np.arange(4), rng.standard_normal((20, 4)), train.T.astype(float))
    matrix = FoldMatrix(train, dense)
    with pytest.raises(DataError, match=r"penalty 0\.0 .*column 1"):
        solve_ridge(matrix, columns, np.array([1.0, 0.0, 1.0, 1.0]))
    with pytest.raises(DataError, match="penalties for 4 columns"):
        solve_ridge(matrix, columns, np.ones(1))
    with pytest.raises(DataError, match="outside its training rows"):
        solve_ridge(matrix, FitRequest(columns.fold, columns.y, np.ones((20, 4))), np.ones(4))


def test_a_column_that_does_not_converge_is_marked_and_ends_no_other():
    dense, train, rng = problem(30, 1100, 3)
    columns = FitRequest(np.arange(3), rng.standard_normal((30, 3)), train.T.astype(float))
    matrix = FoldMatrix(train, dense)
    exact = solve_ridge(matrix, columns, np.ones(3))
    assert exact.is_converged.all()
    rough = solve_ridge(matrix, columns, np.ones(3), max_iter=2)
    assert not rough.is_converged.any()
    assert ((rough.bound > 1e-10) & (rough.bound < 1e-2)).all()
    np.testing.assert_allclose(rough.decision, exact.decision, atol=1e-2)


def test_a_penalty_below_the_rounding_of_the_kernel_is_solved():
    dense, train, rng = problem(30, 1100, 3)
    dense[1] = dense[0]
    columns = FitRequest(np.arange(3), rng.standard_normal((30, 3)), train.T.astype(float))
    found = solve_ridge(FoldMatrix(train, dense), columns, np.full(3, 1e-5))
    assert np.isfinite(found.decision).all()
    assert found.is_converged.all()


def test_deletion_solves_each_subsets_bordered_system():
    rng = np.random.default_rng(0)
    values = rng.standard_normal((12, 20))
    gram, ridge_ = torch.as_tensor(values @ values.T), torch.as_tensor(rng.uniform(0.5, 2, 12))
    patterns = np.ones((4, 12), dtype=bool)
    patterns[1, :3] = patterns[2, 4:9] = False
    patterns[:, 11] = False
    pattern = np.array([1, 0, 2, 1])
    right = torch.as_tensor(rng.standard_normal((4, 12)) * patterns[pattern])
    # The fourth subset is like the first and is not asked for.
    chosen = np.array([True, True, True, False])
    found = BorderedInverse(gram, ridge_, patterns, chosen).solve(right, pattern)
    for column, index in enumerate(pattern):
        rows = np.flatnonzero(patterns[index])
        inner = gram.numpy()[np.ix_(rows, rows)] + np.diag(ridge_.numpy()[rows])
        border = np.ones((len(rows), 1))
        system = np.block([[inner, border], [border.T, np.zeros((1, 1))]])
        expected = np.linalg.solve(system, np.append(right[column, rows].numpy(), 0))[:-1]
        np.testing.assert_allclose(found[column, rows].numpy(), expected, atol=1e-12)
        outside = np.setdiff1d(np.arange(12), rows)
        np.testing.assert_array_equal(found[column, outside].numpy(), 0)


def test_an_indefinite_system_is_an_error():
    with pytest.raises(NumericsError, match="not positive definite"):
        BorderedInverse(-torch.eye(4), torch.ones(4) * 0.1, np.ones((1, 4), dtype=bool))


def test_columns_are_grouped_where_they_agree():
    support = np.array([[1, 1, 0, 1], [1, 0, 1, 1], [0, 1, 1, 1]], dtype=bool)
    values = np.array([[1.0, 1.0, 9.0, 1.0], [2.0, 9.0, 2.0, 2.0], [9.0, 3.0, 3.0, 4.0]])
    assert agreeing_groups(support, values, np.ones(4)).tolist() == [0, 0, 0, 1]
    assert agreeing_groups(support, values, np.array([1.0, 2.0, 1.0, 1.0])).tolist() == [0, 1, 0, 2]
    patterns, index = row_patterns(support[:, [0, 1, 0]])
    np.testing.assert_array_equal(patterns[index], support[:, [0, 1, 0]].T)
    assert len(patterns) == 2
