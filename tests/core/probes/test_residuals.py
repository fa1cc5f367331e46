from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from taprobe_core.errors import DataError
from taprobe_core.labels.make import anchors
from taprobe_core.probes.features import fold_words, text_pipeline
from taprobe_core.probes.residuals import (
    BASELINE_FEATURES,
    ResidualTargets,
    baseline_predictions,
    residual_targets,
)
from taprobe_core.probes.targets import TargetValues
from taprobe_core.solvers.linear.fold_matrix import FoldMatrix, TextBlock
from taprobe_core.study.config import Labels
from taprobe_core.study.probes import ProbeRecipe

N_PROBLEMS, N_SENTENCES = 6, 25
PROBLEM_ID = np.repeat(np.arange(N_PROBLEMS) * 3, N_SENTENCES)
N = len(PROBLEM_ID)
TRAIN = np.array([held_out * 3 != PROBLEM_ID for held_out in range(N_PROBLEMS)])
RECIPE = ProbeRecipe.model_validate(
    {"name": "left", "features": ("position",), "percentile": 85.0, "residualize": "position"}
).resolved("anchor_binary", 90.0)


@pytest.fixture
def position() -> np.ndarray:
    rng = np.random.default_rng(0)
    index = np.tile(np.arange(N_SENTENCES), N_PROBLEMS)
    tokens = rng.integers(3, 60, N)
    constant = np.full(N, N_SENTENCES)
    return np.column_stack([index, constant, index / (N_SENTENCES - 1), tokens])


def target_of(position: np.ndarray, *, weigh: bool = False, lose: bool = False) -> TargetValues:
    """Importance that falls with position, and noise."""
    rng = np.random.default_rng(1)
    value = np.abs(0.5 - 0.02 * position[:, 0] + 0.2 * rng.standard_normal(N))
    is_defined = np.ones(N, dtype=bool)
    is_defined[::7] = not lose
    weight = rng.uniform(0.1, 3, N) if weigh else np.ones(N)
    weight = weight * is_defined
    return TargetValues(np.where(is_defined, value, 0), np.where(is_defined, value, 0),
                        value > 0.5, weight / weight[is_defined].mean(), is_defined)  # fmt: skip


def left_of(
    matrix: FoldMatrix, target: TargetValues, tie_rule: str = "rank", train: np.ndarray = TRAIN
) -> ResidualTargets:
    study = Labels.model_validate({"tie_rule": tie_rule})
    predictions = baseline_predictions(matrix, train, target)
    return residual_targets(predictions, target, PROBLEM_ID, RECIPE, study)


@pytest.mark.parametrize("weigh", [False, True])
@pytest.mark.parametrize("lose", [False, True])
def test_residuals_of_position_are_those_of_scikit_learns_ridge(
    position: np.ndarray, weigh: bool, lose: bool
) -> None:
    target = target_of(position, weigh=weigh, lose=lose)

    left = left_of(FoldMatrix(TRAIN, position), target)

    for fold, train in enumerate(TRAIN):
        # The scaler sees every training row; rows without a target weigh nothing in the ridge.
        scaled = StandardScaler().fit(position[train]).transform(position)
        ridge = Ridge(alpha=1.0).fit(scaled[train], target.value[train], target.weight[train])
        expected = np.where(target.is_defined, target.value - ridge.predict(scaled), 0.0)
        np.testing.assert_allclose(left.value[fold], expected, atol=1e-9)


def test_residuals_of_position_and_text_are_those_of_scikit_learns_ridge(
    position: np.ndarray,
) -> None:
    rng = np.random.default_rng(2)
    words = np.array(["carry", "the", "one", "so", "add", "wait", "check", "again", "seven"])
    texts = [" ".join(rng.choice(words, rng.integers(1, 7))) for _ in range(N)]
    counted, target = fold_words(texts, TRAIN), target_of(position)
    matrix = FoldMatrix(TRAIN, position, TextBlock(counted.counts, counted.idf))

    left = left_of(matrix, target)

    assert BASELINE_FEATURES["position_plus_text"] == ("text", "position")
    for fold, train in enumerate(TRAIN):
        rows = np.flatnonzero(train)
        weigh = text_pipeline().fit([texts[row] for row in rows])
        scale = StandardScaler().fit(position[rows])
        both = np.hstack([weigh.transform(texts).toarray(), scale.transform(position)])
        ridge = Ridge(alpha=1.0).fit(both[rows], target.value[rows])
        np.testing.assert_allclose(left.value[fold], target.value - ridge.predict(both), atol=1e-9)


def test_held_out_problems_do_not_enter_other_residuals(position: np.ndarray) -> None:
    matrix, target = FoldMatrix(TRAIN, position), target_of(position)
    changed = TargetValues(
        target.y, np.where(TRAIN[2], target.value, 9.0), target.is_positive, target.weight,
        target.is_defined,
    )  # fmt: skip

    before, after = left_of(matrix, target), left_of(matrix, changed)

    np.testing.assert_array_equal(before.value[2, TRAIN[2]], after.value[2, TRAIN[2]])
    assert before.is_positive is not None
    assert after.is_positive is not None
    np.testing.assert_array_equal(before.is_positive[2, TRAIN[2]], after.is_positive[2, TRAIN[2]])
    assert (before.value[0, TRAIN[2]] != after.value[0, TRAIN[2]]).all()


@pytest.mark.parametrize("tie_rule", ["rank", "legacy"])
@pytest.mark.parametrize("lose", [False, True])
def test_residual_anchors_rank_the_signed_residual_within_a_problem(
    position: np.ndarray, tie_rule: str, lose: bool
) -> None:
    target = target_of(position, lose=lose)

    left = left_of(FoldMatrix(TRAIN, position), target, tie_rule)

    assert left.is_positive is not None
    assert not left.is_positive[:, ~target.is_defined].any()
    for fold in range(len(TRAIN)):
        for problem in np.unique(PROBLEM_ID):
            own = (problem == PROBLEM_ID) & target.is_defined
            values = left.value[fold, own]
            if tie_rule == "legacy":
                expected = values >= np.percentile(values, 85.0)
            else:
                expected = anchors(values, 85.0, "rank")
                assert (values[expected] > 0).all()
            assert left.is_positive[fold, own].tolist() == expected.tolist()
    # Far below its prediction is not above it.
    low = left.value == left.value[:, target.is_defined].min(axis=1, keepdims=True)
    assert not left.is_positive[low & target.is_defined].any()


def test_a_problem_below_its_predictions_has_no_residual_anchor(position: np.ndarray) -> None:
    value = np.where(PROBLEM_ID == 0, 0.0, 0.5)
    target = TargetValues(value, value, value > 0, np.ones(N), np.ones(N, dtype=bool))

    left = left_of(FoldMatrix(TRAIN, position), target)

    assert left.is_positive is not None
    assert (left.value[0, ~TRAIN[0]] < 0).all()
    assert not left.is_positive[0, ~TRAIN[0]].any()


def test_a_signed_target_has_no_residual_anchors(position: np.ndarray) -> None:
    target = target_of(position)
    signed = TargetValues(target.y, target.value, None, target.weight, target.is_defined)

    left = left_of(FoldMatrix(TRAIN, position), signed)

    assert left.is_positive is None
    np.testing.assert_array_equal(left.value, left_of(FoldMatrix(TRAIN, position), target).value)


def test_what_position_explains_is_gone_from_training_rows(position: np.ndarray) -> None:
    left = left_of(FoldMatrix(TRAIN, position), target_of(position))

    for fold, train in enumerate(TRAIN):
        residual = left.value[fold, train]
        assert abs(residual.mean()) < 1e-9
        assert abs(np.corrcoef(residual, position[train, 0])[0, 1]) < 0.02


def test_a_fold_without_a_defined_target_is_refused(position: np.ndarray) -> None:
    target = target_of(position)
    nothing = np.zeros(N, dtype=bool)
    empty = TargetValues(target.y, target.value, None, np.zeros(N), nothing)

    with pytest.raises(DataError, match="no training row"):
        left_of(FoldMatrix(TRAIN, position), empty)


def test_the_pipeline_of_the_earlier_system_gives_the_same_residuals(position: np.ndarray) -> None:
    target, train = target_of(position), TRAIN[1]
    pipeline = make_pipeline(StandardScaler(), Ridge(alpha=1.0))
    pipeline.fit(position[train], target.value[train])

    left = left_of(FoldMatrix(TRAIN[1:2], position), target, train=TRAIN[1:2])

    assert left.value.shape == (1, N)
    np.testing.assert_allclose(left.value[0], target.value - pipeline.predict(position), atol=1e-9)
