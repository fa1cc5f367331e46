from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from taprobe_core.errors import ConfigError, LabelError
from taprobe_core.labels.effects import fit_effects, posterior
from taprobe_core.labels.make import anchors, anchors_by_problem, make_labels
from taprobe_core.probes.targets import (
    TargetValues,
    importance_errors,
    target_values,
    windowed_change,
)
from taprobe_core.rollouts import FolderRollouts, read_rollouts
from taprobe_core.study.config import Labels, MirrorSource, Model, Rollouts, StandInCheckpoint
from taprobe_core.study.probes import ProbeRecipe

SIZES = {3: 40, 5: 25, 9: 60}
RESAMPLING = Labels(field="resampling_importance_accuracy")


def recipe(target: str, **settings: object) -> ProbeRecipe:
    made = ProbeRecipe.model_validate(
        {"name": "tried", "features": ("position",), "target": target, **settings}
    )
    return made.resolved("anchor_binary", 90.0)


def sentences_of(seed: int = 0, n_rollouts: int = 20) -> pl.DataFrame:
    """The columns of sentences that labels are made of, from simulated rollouts."""
    rng = np.random.default_rng(seed)
    parts = []
    for problem_id, n in SIZES.items():
        rate = np.clip(0.5 + np.cumsum(rng.normal(0, 0.1, n)), 0, 1)
        n_correct = rng.binomial(n_rollouts, rate)
        n_dissimilar = rng.integers(0, n_rollouts + 1, n)
        hits = rng.hypergeometric(n_correct, n_rollouts - n_correct, n_dissimilar)
        accuracy = n_correct / n_rollouts
        following = np.append(accuracy[1:], 0)
        cf = np.where(n_dissimilar > 0, hits / np.maximum(n_dissimilar, 1) - following, 0)
        cf[-1] = 0
        parts.append(
            pl.DataFrame(
                {
                    "problem_id": np.full(n, problem_id),
                    "sentence_idx": np.arange(n),
                    "function_tag": ["unknown"] * n,
                    "accuracy": accuracy,
                    "resampling_importance_accuracy": np.append(np.diff(accuracy), 0.0),
                    "counterfactual_importance_accuracy": cf,
                    "different_trajectories_fraction": n_dissimilar / n_rollouts,
                    "overdeterminedness": np.full(n, 1 / n_rollouts),
                    "forced_importance_accuracy": cf / 2,
                    "true_importance": [None] * n,
                },
                schema_overrides={"true_importance": pl.Float64},
            )
        )
    return pl.concat(parts)


@pytest.fixture(scope="module")
def rows() -> pl.DataFrame:
    return make_labels(sentences_of(), Labels())


def by_problem(rows: pl.DataFrame) -> list[np.ndarray]:
    return [np.flatnonzero(rows["problem_id"] == problem_id) for problem_id in SIZES]


def is_sound(target: TargetValues, n: int) -> bool:
    undefined = ~target.is_defined
    assert all(len(part) == n for part in (target.y, target.value, target.weight))
    assert {part.dtype for part in (target.y, target.value, target.weight)} == {np.dtype(float)}
    assert np.isfinite(target.y).all()
    assert not target.y[undefined].any()
    assert not target.weight[undefined].any()
    assert target.weight.min() >= 0
    assert target.weight[target.is_defined].mean() == pytest.approx(1)
    return True


# --- anchors and importance


@pytest.mark.parametrize("tie_rule", ["rank", "legacy"])
@pytest.mark.parametrize("percentile", [85.0, 90.0, 95.0])
def test_anchors_are_those_of_the_recipes_percentile_and_the_studys_rule(
    rows: pl.DataFrame, tie_rule: str, percentile: float
) -> None:
    study = Labels.model_validate({"tie_rule": tie_rule})

    target = target_values(rows, recipe("anchor_binary", percentile=percentile), study)

    assert is_sound(target, rows.height)
    assert target.is_positive is not None
    importance = rows["importance_abs"].to_numpy()
    for own in by_problem(rows):
        expected = anchors(importance[own], percentile, tie_rule)
        assert target.is_positive[own].tolist() == expected.tolist()
    assert target.y.tolist() == target.is_positive.tolist()
    assert target.value.tolist() == importance.tolist()
    assert (target.weight == 1).all()


def test_at_the_studys_percentile_anchors_are_the_labels_own(rows: pl.DataFrame) -> None:
    for name in ("anchor_binary", "importance_abs", "exceeds_threshold"):
        target = target_values(rows, recipe(name), Labels())

        assert target.is_positive is not None
        assert target.is_positive.tolist() == rows["is_anchor"].to_list()


def test_importance_is_as_labelled_and_a_signed_one_has_no_anchors(rows: pl.DataFrame) -> None:
    absolute = target_values(rows, recipe("importance_abs"), Labels())
    signed = target_values(rows, recipe("importance_signed"), Labels())

    assert absolute.y.tolist() == absolute.value.tolist() == rows["importance_abs"].to_list()
    assert signed.y.tolist() == signed.value.tolist() == rows["importance_signed"].to_list()
    assert signed.is_positive is None
    assert is_sound(absolute, rows.height)
    assert is_sound(signed, rows.height)


@given(st.lists(st.tuples(st.integers(1, 4), st.floats(-1, 1)), min_size=1, max_size=30))
def test_anchors_of_a_problem_do_not_depend_on_other_problems(
    drawn: list[tuple[int, float]],
) -> None:
    drawn.sort(key=lambda each: each[0])
    problem_id, values = np.array([pid for pid, _ in drawn]), np.array([v for _, v in drawn])

    marked = anchors_by_problem(problem_id, values, 60.0, "rank")

    for each in np.unique(problem_id):
        own = problem_id == each
        assert marked[own].tolist() == anchors(values[own], 60.0, "rank").tolist()


# --- change over a window


@pytest.mark.parametrize("window", [1, 4, 24, 59, 60])
def test_windowed_change_is_the_difference_of_rates(rows: pl.DataFrame, window: int) -> None:
    rate = (rows["n_correct"] / rows["n_rollouts"]).to_numpy()

    change, se = windowed_change(rows, window)

    for own in by_problem(rows):
        n = max(len(own) - window, 0)
        np.testing.assert_allclose(change[own[:n]], rate[own[window:]] - rate[own[:n]])
        assert np.isnan(change[own[n:]]).all()
    assert (np.isnan(se) == np.isnan(change)).all()
    assert (se[np.isfinite(se)] > 0).all()


def test_over_one_sentence_it_is_the_resampling_importance() -> None:
    labelled = make_labels(sentences_of(), RESAMPLING)

    change, se = windowed_change(labelled, 1)

    known = np.isfinite(change)
    assert known.sum() == labelled.height - len(SIZES)
    np.testing.assert_allclose(change[known], labelled["importance_signed"].to_numpy()[known])
    np.testing.assert_allclose(
        se[known], importance_errors(labelled, RESAMPLING.field)[known], rtol=0.05
    )


def test_a_change_with_an_unknown_count_is_undefined(rows: pl.DataFrame) -> None:
    lost = rows.with_columns(
        n_correct=pl.when(pl.col("sentence_idx") != 7).then("n_correct"),
        n_rollouts=pl.when(pl.col("sentence_idx") == 11).then(0).otherwise("n_rollouts"),
    ).filter(pl.col("sentence_idx") != 15)

    target = target_values(lost, recipe("windowed_change", window=2), Labels())

    index, n = lost["sentence_idx"].to_numpy(), lost["n_sentences"].to_numpy()
    unknown = np.isin(index, [5, 7, 9, 11, 13]) | (index >= n - 2)
    assert is_sound(target, lost.height)
    assert target.is_defined.tolist() == (~unknown).tolist()
    assert target.is_positive is None
    assert target.value is target.y


def test_no_count_at_all_is_an_error_that_names_the_recipe(rows: pl.DataFrame) -> None:
    bare = rows.with_columns(
        n_rollouts=pl.lit(None, pl.Int64), importance_se=pl.lit(None, pl.Float64)
    )
    for tried in (
        recipe("windowed_change"),
        recipe("exceeds_threshold"),
        recipe("importance_signed", weights="inverse_variance"),
    ):
        with pytest.raises(LabelError, match=f"target {tried.target}.* for recipe 'tried'"):
            target_values(bare, tried, Labels())
    with pytest.raises(LabelError):
        target_values(rows, recipe("exceeds_threshold"), Labels(field="forced_importance_accuracy"))
    assert is_sound(target_values(bare, recipe("importance_signed"), Labels()), bare.height)


@pytest.mark.parametrize("target", ["windowed_change", "exceeds_threshold"])
def test_a_recipe_that_was_not_resolved_is_refused(rows: pl.DataFrame, target: str) -> None:
    bare = ProbeRecipe.model_validate(
        {"name": "tried", "features": ("position",), "target": target}
    )

    with pytest.raises(ConfigError, match=f"target {target} without"):
        target_values(rows, bare, Labels())


# --- standard errors


def test_errors_are_the_published_ones_where_both_samples_vary(rows: pl.DataFrame) -> None:
    se, plug_in = importance_errors(rows, Labels().field), rows["importance_se"].to_numpy()
    following = rows.select(pl.col("n_correct").shift(-1).over("problem_id")).to_series()
    varies = (
        rows["n_dissimilar_correct"].is_between(1, rows["n_dissimilar"] - 1)
        & following.is_between(1, rows["n_rollouts"] - 1)
    ).fill_null(False).to_numpy()  # fmt: skip

    assert varies.sum() > 20
    np.testing.assert_allclose(se[varies], plug_in[varies], rtol=1e-12)
    known = np.isfinite(se)
    assert known.tolist() == rows["importance_se"].is_not_null().to_list()
    assert (se[known] > 0).all()
    assert (se[known] >= plug_in[known] - 1e-12).all()


@pytest.mark.parametrize(
    ("nd", "kd", "n", "k", "following", "expected"),
    [
        # unanimous dissimilar rollouts, varied successor: Beta(1, 5) has variance 5/252
        (4, 0, 10, 5, 0.03, 5 / 252 + 0.03),
        (4, 4, 10, 5, 0.03, 5 / 252 + 0.03),
        # both unanimous: Beta(1, 11) for the successor
        (4, 4, 10, 10, 0.0, 5 / 252 + 11 / (144 * 13)),
        # one dissimilar rollout borrows 10 x p (1 - p) / 9
        (1, 0, 10, 5, 0.03, 10 * 0.25 / 9 + 0.03),
        # which says nothing where all rollouts ended alike: Beta(1, 2)
        (1, 1, 10, 10, 0.03, 2 / 36 + 0.03),
        (4, 1, 10, 5, 0.0, 3 / 16 / 3 + 11 / (144 * 13)),
    ],
)
def test_a_unanimous_sample_has_the_variance_of_its_posterior(
    nd: int, kd: int, n: int, k: int, following: float, expected: float
) -> None:
    own = kd * (nd - kd) / nd**2 / (nd - 1) if nd > 1 else n * (k * (n - k) / n**2) / (n - 1)
    row = pl.DataFrame(
        {
            "n_dissimilar": [nd],
            "n_dissimilar_correct": [kd],
            "n_rollouts": [n],
            "n_correct": [k],
            "importance_se": [np.sqrt(own + following)],
        }
    )

    (se,) = importance_errors(row, "counterfactual_importance_accuracy")

    assert se**2 == pytest.approx(expected)


# --- how likely an effect is large


def test_exceeding_is_the_posterior_of_measured_rows(rows: pl.DataFrame) -> None:
    se = importance_errors(rows, Labels().field)
    known, effect = np.isfinite(se), rows["importance_signed"].to_numpy()
    prior = fit_effects(effect[known], se[known])

    for threshold in (0.05, 0.2):
        target = target_values(rows, recipe("exceeds_threshold", threshold=threshold), Labels())

        assert is_sound(target, rows.height)
        assert target.is_defined.tolist() == known.tolist()
        assert 0 < (~known).sum() < rows.height
        expected = posterior(prior, effect[known], se[known]).exceeds(threshold)
        np.testing.assert_allclose(target.value[known], expected)
        assert target.y is target.value
    assert 0 <= target.y.min() <= target.y.max() <= 1


def test_the_prior_can_be_kept_from_tested_problems(rows: pl.DataFrame) -> None:
    tried, seen = recipe("exceeds_threshold"), (rows["problem_id"] != 9).to_numpy()
    changed = rows.with_columns(
        importance_signed=pl.when(pl.col("problem_id") == 9)
        .then(pl.col("importance_signed") * 0.1)
        .otherwise("importance_signed")
    )

    apart = [target_values(each, tried, Labels(), seen).y[seen] for each in (rows, changed)]
    joined = [target_values(each, tried, Labels()).y[seen] for each in (rows, changed)]

    assert apart[0].tolist() == apart[1].tolist()
    assert joined[0].tolist() != joined[1].tolist()
    # What it passes on is how much all effects are shrunk, not which of them are large.
    assert (
        np.corrcoef(np.argsort(np.argsort(joined[0])), np.argsort(np.argsort(apart[0])))[0, 1]
        > 0.99
    )
    with pytest.raises(LabelError):
        target_values(rows, tried, Labels(), np.zeros(rows.height, dtype=bool))


# --- weights


@pytest.mark.parametrize(
    "name", ["anchor_binary", "importance_abs", "importance_signed", "exceeds_threshold"]
)
def test_inverse_variance_weighs_by_how_well_importance_was_measured(
    rows: pl.DataFrame, name: str
) -> None:
    se = importance_errors(rows, Labels().field)
    known, effect = np.isfinite(se), rows["importance_signed"].to_numpy()
    tau2 = fit_effects(effect[known], se[known]).variance

    target = target_values(rows, recipe(name, weights="inverse_variance"), Labels())

    assert is_sound(target, rows.height)
    assert not target.weight[~known].any()
    ratio = target.weight[known] * (se[known] ** 2 + tau2)
    np.testing.assert_allclose(ratio, ratio[0])
    unweighted = target_values(rows, recipe(name), Labels())
    assert target.y.tolist() == unweighted.y.tolist()
    assert target.is_defined.tolist() == unweighted.is_defined.tolist()


def test_a_change_is_weighed_by_its_own_error(rows: pl.DataFrame) -> None:
    change, se = windowed_change(rows, 4)
    known = np.isfinite(change)
    tau2 = fit_effects(change[known], se[known]).variance

    target = target_values(rows, recipe("windowed_change", weights="inverse_variance"), Labels())

    assert is_sound(target, rows.height)
    ratio = target.weight[known] * (se[known] ** 2 + tau2)
    np.testing.assert_allclose(ratio, ratio[0])


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([2, 5, 100]))
def test_every_target_is_sound_on_any_labels(seed: int, n_rollouts: int) -> None:
    labelled = make_labels(sentences_of(seed, n_rollouts), Labels(drop_last_sentence=False))
    for name in (
        "anchor_binary", "importance_abs", "importance_signed", "exceeds_threshold",
        "windowed_change",
    ):  # fmt: skip
        for weights in ("none", "inverse_variance"):
            target = target_values(labelled, recipe(name, weights=weights), Labels())
            assert is_sound(target, labelled.height)


# --- the published dataset


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("name", "setting", "no_effect", "reliability"),
    [
        ("deepseek-r1-distill-llama-8b", "correct_base_solution", 0.97, (0.56, 0.72, 0.88)),
        ("deepseek-r1-distill-qwen-14b", "incorrect_base_solution", 0.97, (0.63, 0.89, 0.97)),
    ],
)
def test_published_labels_are_mostly_noise_and_longer_windows_less(
    real_rollouts: Path, name: str, setting: str, no_effect: float, reliability: tuple[float, ...]
) -> None:
    options = Rollouts(source=MirrorSource(kind="mirror", folder=str(real_rollouts)))
    checkpoint = StandInCheckpoint(kind="stand_in", architecture="qwen2")
    model = Model(rollouts_dir=name, checkpoint=checkpoint, n_layers=4)
    sentences = read_rollouts(FolderRollouts(real_rollouts), model, options, setting).sentences
    labelled = make_labels(sentences, Labels())
    se = importance_errors(labelled, Labels().field)
    known = np.isfinite(se)

    prior = fit_effects(labelled["importance_signed"].to_numpy()[known], se[known])

    assert prior.weight[0] == pytest.approx(no_effect, abs=0.01)
    for window, expected in zip((1, 4, 16), reliability, strict=True):
        change, noise = windowed_change(labelled, window)
        share = 1 - np.nanmean(noise**2) / np.nanvar(change)
        assert share == pytest.approx(expected, abs=0.01)
    target = target_values(labelled, recipe("exceeds_threshold"), Labels())
    anchor = labelled["is_anchor"].to_numpy()
    # Few of the anchors are likely to be large.
    assert (target.y[anchor] > 0.5).mean() < 0.25
    assert target.y[anchor].mean() > 5 * target.y[~anchor].mean()
