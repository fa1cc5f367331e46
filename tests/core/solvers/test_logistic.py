from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score
from sklearn.preprocessing import StandardScaler
from sklearn.utils.class_weight import compute_sample_weight

from benchmarks.probes.designs import KINDS, anchor_columns, compared, problems, stand_in_states
from taprobe_core.errors import DataError, NotEnoughDataError
from taprobe_core.solvers.columns import FitRequest
from taprobe_core.solvers.linear import logistic
from taprobe_core.solvers.linear.fold_matrix import FoldMatrix, TextBlock
from taprobe_core.solvers.linear.logistic import balanced_weights, solve_logistic

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
def float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logistic, "_FLOAT64_VALUES", 0)


@pytest.mark.parametrize("kind", ["iid", "ill"])
@pytest.mark.parametrize("shape", [(120, 30), (120, 200)])
@pytest.mark.parametrize("way", ["float32", "preconditioned", "no reference", "newton"])
def test_every_way_ends_at_scikit_learns_optimum(kind, shape, way, monkeypatch):
    if way == "float32":
        monkeypatch.setattr(logistic, "_FLOAT64_VALUES", 0)
    if way == "preconditioned":
        monkeypatch.setattr(logistic, "_EASY_ITERATIONS", 0)
    if way == "no reference":
        monkeypatch.setattr(logistic, "_COLUMNS_PER_REFERENCE", 10**6)
    dense, train, columns = problem(*shape, kind)
    C = np.tile([0.1, 1.0, 20.0], N_FOLDS)
    max_iter = 2 if way == "newton" else 400
    matrix = FoldMatrix(train, dense)
    solution = solve_logistic(matrix, columns, C, tol=1e-7, max_iter=max_iter)
    agree(dense, train, columns, solution, C, 2e-6, chosen=(0, 4, 14))
    assert solution.is_converged.all()
    assert solution.bound.max() <= 1e-7
    assert solution.n_iter.min() > 0


def test_a_factorised_start_saves_most_iterations(monkeypatch):
    dense, train, columns = problem(200, 400, "ill")
    C = np.full(len(columns), 100.0)
    found = []
    for easy in (0, 10**6):
        monkeypatch.setattr(logistic, "_EASY_ITERATIONS", easy)
        found.append(solve_logistic(FoldMatrix(train, dense), columns, C))
    assert found[0].n_iter.mean() < 0.5 * found[1].n_iter.mean()
    np.testing.assert_allclose(found[0].decision, found[1].decision, atol=1e-4)


@pytest.mark.usefixtures("float32")
def test_float32_products_reach_what_float64_certifies():
    dense, train, columns = problem(120, 300, "ill", n_targets=1)
    C = np.ones(len(columns))
    solution = solve_logistic(FoldMatrix(train, dense), columns, C, tol=1e-10)
    assert solution.is_converged.all()
    agree(dense, train, columns, solution, C, 1e-8, chosen=(0, 4))


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


def test_a_column_that_nothing_certifies_is_marked_and_ends_no_other(monkeypatch):
    dense, train, columns = problem(60, 100, "ill")
    C = np.where(np.arange(15) == 4, 1e7, 1.0)
    monkeypatch.setattr(logistic, "_MAX_NEWTON_STEPS", 2)
    monkeypatch.setattr(logistic, "_COLUMNS_PER_REFERENCE", 10**6)
    solution = solve_logistic(FoldMatrix(train, dense), columns, C, tol=1e-8, max_iter=80)
    assert np.flatnonzero(~solution.is_converged).tolist() == [4]
    assert 1e-8 < solution.bound[4] < np.inf
    assert np.isfinite(solution.decision).all()
    agree(dense, train, columns, solution, C, 1e-6, chosen=(3, 5))
    monkeypatch.undo()
    again = solve_logistic(FoldMatrix(train, dense), columns, C, tol=1e-8, max_iter=80)
    assert again.is_converged.all()


def test_a_wrong_side_of_the_optimum_is_not_certified():
    dense, train, columns = problem(80, 20, "iid")
    matrix, C = FoldMatrix(train, dense), np.ones(len(columns))
    rough = solve_logistic(matrix, columns, C, tol=1e-2)
    exact = solve_logistic(matrix, columns, C, tol=1e-10)
    error = np.linalg.norm(rough.coef - exact.coef, axis=1)
    assert (error <= rough.bound * np.linalg.norm(rough.coef, axis=1) * 1.001).all()
    assert error.max() > 0


def test_features_that_say_nothing_leave_the_intercept():
    train = np.ones((1, 40), dtype=bool)
    y = (np.arange(40) % 4 == 0).astype(float)[:, None]
    columns = FitRequest(np.zeros(1, np.int64), y, np.ones((40, 1)))
    for width in (3, 2000):
        solution = solve_logistic(FoldMatrix(train, np.ones((40, width))), columns, np.ones(1))
        np.testing.assert_allclose(solution.decision, np.log(1 / 3), atol=1e-6)
        np.testing.assert_allclose(solution.coef, 0, atol=1e-12)


@pytest.mark.parametrize("n_rows", [200, 400])
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


def test_random_designs_of_every_kind_end_and_agree_with_scikit_learn():
    every = [compared(seed) for seed in range(64)]
    assert {each.kind for each in every} == set(KINDS)
    for seed, each in enumerate(every):
        assert each.is_converged, (seed, each)
        assert each.n_equal == each.peer_converged, (seed, each)
    assert sum(each.peer_converged for each in every) > 170


def test_a_design_that_the_solver_before_gave_up_is_certified():
    seed = 23  # as 3, of the first 24
    problem, value = problems(seed)
    train, columns = anchor_columns(problem, value)
    matrix = FoldMatrix(train, stand_in_states(problem, 300, seed))
    found = solve_logistic(matrix, columns, np.full(len(columns), 100.0), tol=3e-4)
    assert found.is_converged.all()
    assert found.bound.max() <= 3e-4
