from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kstest

from taprobe_core.errors import DataError, NonFiniteError, NotEnoughDataError, PlanError
from taprobe_core.evaluation.tripwires import (
    Fit,
    duplicates_across_problems,
    fits,
    linear_probe,
    memorises_one_problem,
    network,
    ridge_probe,
    row_identity,
    shuffled_labels,
)
from taprobe_core.evaluation.tripwires.memorisation import anchor_share
from taprobe_core.evaluation.tripwires.shuffling import (
    enough_shuffles,
    permuted_pr_auc,
    shuffle_within,
)
from taprobe_core.metrics import pr_auc
from taprobe_core.solvers.columns import FitRequest
from taprobe_core.splits import Fold

N_PROBLEMS, N_FEATURES = 12, 24
SIZES = np.array([9, 14, 11, 16, 10, 13, 15, 12, 9, 14, 11, 16])
PROBLEM_ID = np.repeat(np.arange(N_PROBLEMS) * 10 + 7, SIZES)
PROBLEMS = tuple(int(each) for each in np.unique(PROBLEM_ID))


def chance_pr_auc(n: int, k: int) -> float:
    """Mean over all rankings of n rows with k anchors, by the expectation at each rank."""
    ranks = np.arange(1, n + 1)
    return float(np.mean((1 + (ranks - 1) * (k - 1) / (n - 1)) / ranks))


def lopo(problems: tuple[int, ...] = PROBLEMS) -> list[Fold]:
    folds = []
    for index, tested in enumerate(problems):
        rest = tuple(each for each in problems if each != tested)
        folds.append(Fold("lopo", index, rest[2:], rest[:2], (tested,)))
    return folds


FOLDS = lopo()
HOLDOUT = Fold("holdout", 0, PROBLEMS[:7], PROBLEMS[7:9], PROBLEMS[9:])


def sound(seed: int = 0, d: int = N_FEATURES) -> tuple[np.ndarray, np.ndarray]:
    """Features with a trend along each trace and a problem's own level; two anchors a problem."""
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(len(PROBLEM_ID), d)) + 2 * rng.normal(size=(N_PROBLEMS, d)).repeat(
        SIZES, 0
    )
    is_anchor = np.zeros(len(PROBLEM_ID), dtype=np.bool_)
    for problem in PROBLEMS:
        rows = np.flatnonzero(problem == PROBLEM_ID)
        X[rows] += np.linspace(-1, 1, len(rows))[:, None]
        is_anchor[rows[np.argsort(-X[rows, 0] - rng.normal(size=len(rows)))[:2]]] = True
    return X.astype(np.float32), is_anchor


def ridge(X: np.ndarray, penalty: float = 4.0) -> Fit:
    """A probe that owes nothing to the project's solvers."""

    def fit(train: np.ndarray, columns: FitRequest) -> np.ndarray:
        score = np.empty(columns.y.shape)
        for fold, rows in enumerate(train):
            mine = columns.fold == fold
            scale = X[rows].std(axis=0)
            Z = (X - X[rows].mean(axis=0)) / np.where(scale == 0, 1, scale)
            y = columns.y[rows][:, mine]
            gram = Z[rows].T @ Z[rows] + penalty * np.eye(X.shape[1])
            score[:, mine] = Z @ np.linalg.solve(gram, Z[rows].T @ (y - y.mean(axis=0)))
        return score

    return fit


def on_both_sides(fold: Fold) -> Fold:
    return replace(fold, train=tuple(sorted({*fold.train, *fold.test})))


# ---- the null


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=2, max_size=7), st.data())
def test_the_null_is_the_enumeration_of_all_placements_of_the_anchors(score, data):
    n = len(score)
    k = data.draw(st.integers(1, n - 1))
    every = []
    for chosen in itertools.combinations(range(n), k):
        labels = np.isin(np.arange(n), chosen)
        every.append(pr_auc(labels, np.array(score)))
    drawn = permuted_pr_auc(np.array(score, dtype=np.float64), k, 6_000, np.random.default_rng(0))
    values, counts = np.unique(np.round(every, 9), return_counts=True)
    share = counts / len(every)
    assert set(np.round(drawn, 9)) <= set(values)
    found = [np.isclose(drawn, value, atol=1e-8).mean() for value in values]
    np.testing.assert_allclose(found, share, atol=5 * np.sqrt(0.25 / len(drawn)))


def test_the_null_without_ties_has_the_known_mean():
    score = np.random.default_rng(3).normal(size=40)
    drawn = permuted_pr_auc(score, 5, 20_000, np.random.default_rng(1))
    assert drawn.mean() == pytest.approx(chance_pr_auc(40, 5), abs=4 * drawn.std() / 20_000**0.5)


# ---- shuffling


def test_a_shuffle_keeps_every_problems_anchors_and_differs_between_columns():
    _, is_anchor = sound()
    y = shuffle_within(PROBLEM_ID, is_anchor, None, 30, np.random.default_rng(0))
    assert y.shape == (len(PROBLEM_ID), 30)
    assert set(np.unique(y)) == {0, 1}
    for problem in PROBLEMS:
        rows = problem == PROBLEM_ID
        assert (y[rows].sum(axis=0) == is_anchor[rows].sum()).all()
    assert len(np.unique(y, axis=1).T) == 30


@pytest.mark.parametrize("identity", [None, np.array([3, 3, 3, 1, 1, 3, 3, 1, 9, 8])])
def test_every_placement_is_equally_likely_even_among_equal_rows(identity):
    problem_id = np.repeat([4, 2], 5)
    is_anchor = np.isin(np.arange(10), [0, 3, 5, 6])
    y = shuffle_within(problem_id, is_anchor, identity, 20_000, np.random.default_rng(2))
    for rows in (slice(0, 5), slice(5, 10)):
        code = (2 ** np.arange(5)) @ y[rows]
        counts = np.unique(code, return_counts=True)[1]
        assert len(counts) == 10
        np.testing.assert_allclose(counts / 20_000, 0.1, atol=0.01)


def test_a_trace_stored_twice_keeps_one_labelling_if_its_rows_are_known_to_be_equal():
    problem_id, identity = np.repeat([1, 2], 6), np.tile(np.arange(6), 2)
    is_anchor = np.tile(np.arange(6) < 2, 2)
    rng = np.random.default_rng(0)
    alike = shuffle_within(problem_id, is_anchor, identity, 200, rng)
    assert (alike[:6] == alike[6:]).all()
    apart = shuffle_within(problem_id, is_anchor, None, 200, rng)
    assert 0.02 < (apart[:6] == apart[6:]).all(axis=0).mean() < 0.15  # 1 in 15


# ---- shuffled labels


def test_sound_data_passes_with_26_of_26_seeds():
    X, is_anchor = sound()
    found = [
        shuffled_labels(ridge_probe(X), PROBLEM_ID, is_anchor, FOLDS, seed=seed, n_shuffles=4)
        for seed in range(26)
    ]
    assert [each.passes for each in found] == [True] * 26
    for each in found:
        assert each.low < each.value < each.high
        assert each.chance == pytest.approx(np.mean([chance_pr_auc(n, 2) for n in SIZES]), abs=0.01)
        assert "rankings that know nothing" in each.text
        assert "Look for" not in each.text
    assert len({each.value for each in found}) == 26


@pytest.mark.parametrize("fold", [None, 5])
def test_the_logistic_probe_passes_and_is_caught_like_the_ridge_probe(fold):
    X, is_anchor = sound(d=60)
    folds = [each if each.index != fold else on_both_sides(each) for each in FOLDS]
    found = shuffled_labels(linear_probe(X), PROBLEM_ID, is_anchor, folds, n_shuffles=4)
    assert found.passes == (fold is None)


def test_p_is_uniform_on_sound_data_although_folds_share_training_problems():
    X, is_anchor = sound(d=6)
    fit, few = ridge(X), FOLDS[:6]
    found = [
        shuffled_labels(
            fit, PROBLEM_ID, is_anchor, few, seed=seed, n_shuffles=2, n_null=199, alpha=0.01
        )
        for seed in range(150)
    ]  # fmt: skip
    assert kstest([each.p_mean for each in found], "uniform").pvalue > 1e-3
    assert kstest([each.p_problem for each in found], "uniform").pvalue > 1e-3
    assert np.mean([each.p <= 0.1 for each in found]) <= 0.17
    assert sum(each.p <= 0.02 for each in found) <= 9  # binomial(150, .02), 99.9 %


def test_every_fold_and_shuffle_has_its_own_labels_and_no_weight_outside_training():
    X, is_anchor = sound()
    asked: list[tuple[np.ndarray, FitRequest]] = []

    def listen(train: np.ndarray, columns: FitRequest) -> np.ndarray:
        asked.append((train, columns))
        return ridge(X)(train, columns)

    shuffled_labels(listen, PROBLEM_ID, is_anchor, FOLDS, n_shuffles=3)
    (train, columns), *rest = asked
    assert rest == []
    columns.check(train)
    assert columns.fold.tolist() == np.repeat(np.arange(len(FOLDS)), 3).tolist()
    assert len(np.unique(columns.y, axis=1).T) == len(columns)
    weight = columns.weight
    sides = [(weight * (columns.y == label)).sum(axis=0) for label in (0, 1)]
    np.testing.assert_allclose(sides[0], sides[1])  # balanced
    np.testing.assert_allclose(weight.sum(axis=0), train[columns.fold].sum(axis=1))


def test_a_real_signal_does_not_trip_it():
    _, is_anchor = sound()
    X = np.column_stack([is_anchor, sound()[0][:, 1]]).astype(np.float32)
    assert shuffled_labels(ridge(X), PROBLEM_ID, is_anchor, FOLDS).passes


def test_all_problems_on_both_sides_are_caught():
    X, is_anchor = sound()
    found = shuffled_labels(
        ridge_probe(X), PROBLEM_ID, is_anchor, [on_both_sides(fold) for fold in FOLDS]
    )
    assert not found.passes
    assert found.value > found.high
    assert "both sides of a fold" in found.text


@pytest.mark.parametrize("seed", range(3))
def test_one_problem_on_both_sides_of_one_fold_is_caught_and_named(seed):
    X, is_anchor = sound(seed, d=60)
    folds = [*FOLDS, HOLDOUT]
    folds[5] = on_both_sides(folds[5])
    found = shuffled_labels(ridge_probe(X), PROBLEM_ID, is_anchor, folds, seed=seed)
    assert not found.passes
    assert (found.worst.protocol, found.worst.fold, found.worst.problem_id) == ("lopo", 5, 57)
    assert "problem 57 in lopo fold 5" in found.text
    assert [each.fold for each in found.problems if each.p <= 0.005] == [5]
    assert len(found.problems) == 12 + 3


def test_features_chosen_by_the_labels_of_all_rows_are_caught():
    X, is_anchor = sound(d=400)

    def select_first(train: np.ndarray, columns: FitRequest) -> np.ndarray:
        Z = (X - X.mean(axis=0)) / X.std(axis=0)
        score = np.empty(columns.y.shape)
        for column in range(len(columns)):
            one = columns.take(np.array([column]))
            chosen = np.argsort(-np.abs(Z.T @ (one.y[:, 0] - one.y.mean())))[:10]
            score[:, column] = ridge(X[:, chosen])(train, one)[:, 0]
        return score

    assert not shuffled_labels(select_first, PROBLEM_ID, is_anchor, FOLDS, n_shuffles=4).passes


def test_a_feature_made_of_the_labels_is_caught_and_so_is_its_opposite():
    X, is_anchor = sound()
    noise = np.random.default_rng(0).normal(size=len(X))[:, None]

    def encode(sign: int) -> Fit:
        return lambda train, columns: sign * columns.y + noise

    found = shuffled_labels(encode(1), PROBLEM_ID, is_anchor, FOLDS)
    assert (found.passes, found.value > found.high) == (False, True)
    found = shuffled_labels(encode(-1), PROBLEM_ID, is_anchor, FOLDS)
    assert (found.passes, found.value < found.low) == (False, True)
    assert "opposite sign" in found.text


def test_copies_of_traces_are_caught_once_equal_rows_are_shuffled_alike():
    X, is_anchor = sound(d=60)
    rows = np.concatenate([np.arange(len(X)), np.flatnonzero(PROBLEM_ID < 30)])
    problem_id = PROBLEM_ID[rows].copy()
    problem_id[len(X) :] += 1000
    X, is_anchor = X[rows], is_anchor[rows]
    folds = lopo(tuple(int(each) for each in np.unique(problem_id)))
    fit = ridge_probe(X)
    assert shuffled_labels(fit, problem_id, is_anchor, folds).passes
    alike = shuffled_labels(fit, problem_id, is_anchor, folds, identity=row_identity(X))
    assert not alike.passes
    assert alike.worst.problem_id % 1000 < 30


def test_problems_with_one_class_are_left_out_and_counted():
    X, is_anchor = sound()
    is_anchor[PROBLEM_ID == 27] = False
    is_anchor[PROBLEM_ID == 37] = True
    found = shuffled_labels(ridge(X), PROBLEM_ID, is_anchor, FOLDS)
    assert found.n_undefined == 2
    assert "2 held-out problems have one class" in found.text
    assert {27, 37}.isdisjoint(each.problem_id for each in found.problems)


def test_constant_scores_are_at_chance():
    _, is_anchor = sound()
    found = shuffled_labels(
        lambda train, columns: np.zeros(columns.y.shape),
        PROBLEM_ID, is_anchor, FOLDS,
    )  # fmt: skip
    assert (found.passes, found.p) == (True, 1.0)


def test_a_solvers_rounding_is_no_leak():
    X, is_anchor = sound()
    level = np.round(X[:, :1])

    def rounds(train: np.ndarray, columns: FitRequest) -> np.ndarray:
        return level + 1e-12 * columns.y

    assert shuffled_labels(rounds, PROBLEM_ID, is_anchor, FOLDS).passes


def test_the_same_seed_gives_the_same_result():
    X, is_anchor = sound()
    args = (ridge(X), PROBLEM_ID, is_anchor, FOLDS)
    first, again, other = (shuffled_labels(*args, seed=seed, n_shuffles=2) for seed in (3, 3, 4))
    assert first == again
    assert first != other


def test_small_studies_are_shuffled_more_often():
    assert [enough_shuffles(n) for n in (10, 280, 300, 601, 2_000, 80_000)] == [
        20,
        20,
        20,
        10,
        3,
        2,
    ]


def test_what_cannot_be_checked_is_an_error():
    X, is_anchor = sound()
    fit, none = ridge(X), np.zeros(len(X), dtype=np.bool_)
    with pytest.raises(PlanError, match="n_null = 1999 or more"):
        shuffled_labels(fit, PROBLEM_ID, is_anchor, FOLDS, n_null=1998)
    with pytest.raises(NotEnoughDataError, match="found 0 anchors"):
        shuffled_labels(fit, PROBLEM_ID, none, FOLDS)
    with pytest.raises(NotEnoughDataError, match="no fold"):
        shuffled_labels(fit, PROBLEM_ID, is_anchor, [])
    only = is_anchor & (FOLDS[0].test[0] != PROBLEM_ID)
    with pytest.raises(NotEnoughDataError, match="no held-out problem"):
        shuffled_labels(fit, PROBLEM_ID, only, FOLDS[:1])
    with pytest.raises(DataError, match=r"problems \[999\] have no rows"):
        shuffled_labels(fit, PROBLEM_ID, is_anchor, [replace(FOLDS[0], test=(999,))])
    with pytest.raises(DataError, match="problem ids and"):
        shuffled_labels(fit, PROBLEM_ID[1:], is_anchor, FOLDS)
    with pytest.raises(DataError, match="one score per row"):
        shuffled_labels(lambda train, columns: columns.y[1:], PROBLEM_ID, is_anchor, FOLDS)
    with pytest.raises(NonFiniteError, match="fold 0"):
        shuffled_labels(
            lambda train, columns: columns.y * np.nan,
            PROBLEM_ID, is_anchor, FOLDS,
        )  # fmt: skip


# ---- memorisation


def test_random_features_are_learned_by_heart_with_26_of_26_seeds():
    _, is_anchor = sound()
    for seed in range(26):
        X = np.random.default_rng(seed).normal(size=(len(PROBLEM_ID), 64)).astype(np.float32)
        found = memorises_one_problem(network(), X, PROBLEM_ID, is_anchor, seed=seed, n_networks=1)
        assert found.passes
        assert (found.attainable, found.n_mixed_rows, found.n_constant) == (1.0, 0, 0)
        assert "Look for" not in found.text


def test_the_largest_problem_with_both_classes_is_learned():
    X, is_anchor = sound()
    found = memorises_one_problem(network(), X, PROBLEM_ID, is_anchor)
    assert (found.problem_id, found.n_rows, found.n_anchors) == (37, 16, 2)  # 117 has 16 too
    is_anchor[PROBLEM_ID == 37] = False
    found = memorises_one_problem(network(), X, PROBLEM_ID, is_anchor)
    assert (found.problem_id, len(found.values)) == (117, 3)
    assert found.value == max(found.values)


@pytest.mark.parametrize("value", [0.0, 1e6])
def test_constant_features_are_told_so(value):
    _, is_anchor = sound()
    X = np.full((len(PROBLEM_ID), 64), value, dtype=np.float32)
    found = memorises_one_problem(network(), X, PROBLEM_ID, is_anchor)
    assert not found.passes
    assert found.value == pytest.approx(found.attainable) == pytest.approx(2 / 16)
    assert (found.n_distinct, found.n_constant) == (1, 64)
    assert "All feature rows are equal" in found.text


@pytest.mark.parametrize("seed", range(4))
def test_rows_that_were_joined_twice_with_other_labels_are_told_so(seed):
    X, is_anchor = sound(seed, d=64)
    twice = np.repeat(np.arange(len(X)), 2)
    labels = np.column_stack([is_anchor, np.zeros(len(X), dtype=np.bool_)]).ravel()
    found = memorises_one_problem(network(), X[twice], PROBLEM_ID[twice], labels, seed=seed)
    assert not found.passes
    assert found.attainable == pytest.approx(0.5)
    assert found.value == pytest.approx(found.attainable, abs=0.02)
    assert (found.n_rows, found.n_distinct, found.n_mixed_rows) == (32, 16, 4)
    assert found.n_mixed_rows_all == 2 * is_anchor.sum()
    assert "32 of 32 rows equal another row and labels contradict" in found.text


def test_rows_that_repeat_each_other_fail_even_where_labels_agree():
    X, is_anchor = sound(d=64)
    twice = np.repeat(np.arange(len(X)), 2)
    args = (X[twice], PROBLEM_ID[twice], is_anchor[twice])
    found = memorises_one_problem(network(), *args)
    assert (found.passes, found.value, found.n_repeated, found.n_mixed_rows) == (False, 1.0, 32, 0)
    assert "32 of 32 rows equal another row. Look for" in found.text
    X[PROBLEM_ID == 37] = X[PROBLEM_ID == 37][[0, 0, 0, *range(3, 16)]]
    is_anchor[PROBLEM_ID == 37] = np.isin(np.arange(16), [5, 6])
    found = memorises_one_problem(network(), X, PROBLEM_ID, is_anchor)
    assert (found.passes, found.n_repeated, found.n_distinct) == (True, 3, 14)


def test_rows_that_differ_too_little_for_a_network_are_told_so():
    _, is_anchor = sound()
    X = np.arange(len(PROBLEM_ID), dtype=np.float32)[:, None] * np.float32([1, 0])
    is_anchor = is_anchor & (PROBLEM_ID != 37) | (np.arange(len(X)) % 3 == 0)
    found = memorises_one_problem(network(), X, PROBLEM_ID, is_anchor, threshold=0.999)
    assert not found.passes
    assert (found.attainable, found.n_constant) == (1.0, 1)
    assert "1 of 2 are" in found.text


def test_the_share_of_anchors_is_that_of_equal_rows():
    identity = np.array([5, 5, 2, 5, 2, 9])
    is_anchor = np.array([True, False, True, False, True, False])
    expected = [1 / 3, 1 / 3, 1, 1 / 3, 1, 0]
    np.testing.assert_allclose(anchor_share(identity, is_anchor), expected)


def test_early_stopping_is_off_and_cannot_be_asked_for(monkeypatch):
    asked = []
    fit_networks = fits.fit_networks

    def listen(X, train, columns, options, *args, **keywords):
        asked.append((train, columns, options, args, keywords))
        return fit_networks(X, train, columns, options, *args, **keywords)

    monkeypatch.setattr(fits, "fit_networks", listen)
    X, is_anchor = sound()
    memorises_one_problem(network(), X, PROBLEM_ID, is_anchor)
    ((train, columns, options, args, keywords),) = asked
    assert options.early_stopping == "off"
    assert (args, "validation" in keywords) == ((), False)
    assert train.all()
    assert (columns.weight == 1).all()
    assert len(set(columns.seed)) == 3


def test_data_that_nothing_can_learn_is_an_error():
    X, is_anchor = sound()
    args = (PROBLEM_ID, is_anchor)
    with pytest.raises(NotEnoughDataError, match="none of 12 problems"):
        memorises_one_problem(network(), X, PROBLEM_ID, np.ones(len(X), dtype=np.bool_))
    with pytest.raises(NotEnoughDataError, match="5 sentences"):
        memorises_one_problem(network(), X[:4], PROBLEM_ID[:4], np.arange(4) < 2)
    with pytest.raises(DataError, match="feature rows"):
        memorises_one_problem(network(), X[1:], *args)
    with pytest.raises(NonFiniteError, match=r"rows \[3\]"):
        memorises_one_problem(
            network(), np.where(np.arange(len(X))[:, None] == 3, np.nan, X), *args
        )
    with pytest.raises(NonFiniteError, match="problem 37"):
        memorises_one_problem(lambda X, y, seeds: np.full((len(X), 1), np.inf), X, *args)


# ---- duplicates


def test_rows_are_equal_where_every_feature_is_and_zero_has_no_sign():
    X = np.array([[0.0, 1], [-0.0, 1], [0, 1 + 1e-7], [0, 1]], dtype=np.float32)
    identity = row_identity(X)
    assert identity[0] == identity[1] == identity[3] != identity[2]
    assert len(set(row_identity(np.zeros((3, 0), dtype=np.float32)))) == 1
    with pytest.raises(NonFiniteError):
        row_identity(np.array([[np.inf]], dtype=np.float32))


def test_distinct_rows_have_no_duplicates():
    X, _ = sound()
    found = duplicates_across_problems(row_identity(X), PROBLEM_ID, FOLDS)
    assert (found.passes, found.n_found, found.n_rows) == (True, 0, len(X))
    assert (
        found.text
        == f"0 of {len(X)} held-out sentences (0.0%) equal a sentence of a training problem."
    )


def test_a_few_equal_sentences_are_counted_and_a_copied_problem_is_a_fault():
    X, _ = sound()
    X[PROBLEM_ID == 47] = np.append(X[PROBLEM_ID == 57][:2], X[PROBLEM_ID == 47][2:], axis=0)
    found = duplicates_across_problems(row_identity(X), PROBLEM_ID, FOLDS)
    assert (found.passes, found.n_found) == (True, 4)
    assert (found.worst.problem_id, found.worst.source) == (47, 57)
    assert "2 of 10" in found.text
    X[PROBLEM_ID == 47] = X[PROBLEM_ID == 57][:10]
    found = duplicates_across_problems(row_identity(X), PROBLEM_ID, FOLDS)
    assert (found.passes, found.worst.problem_id, found.worst.n_found) == (False, 47, 10)
    assert "That is a copy" in found.text


def test_copies_among_rows_that_never_train_together_do_not_count():
    identity = np.arange(len(PROBLEM_ID))
    identity[PROBLEM_ID == 97] = identity[PROBLEM_ID == 7].repeat(2)[:14]
    assert not duplicates_across_problems(identity, PROBLEM_ID, [HOLDOUT]).passes
    elsewhere = replace(HOLDOUT, train=PROBLEMS[1:7])
    assert duplicates_across_problems(identity, PROBLEM_ID, [elsewhere]).n_found == 0


def test_duplicates_need_rows_and_folds():
    with pytest.raises(DataError, match="row identities"):
        duplicates_across_problems(np.zeros(3, dtype=np.int64), PROBLEM_ID, FOLDS)
    with pytest.raises(DataError, match="no fold holds out"):
        duplicates_across_problems(PROBLEM_ID, PROBLEM_ID, [replace(HOLDOUT, test=(999,))])
