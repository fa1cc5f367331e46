from __future__ import annotations

import polars as pl
import pytest

from taprobe_core.evaluation.blocks import make_blocks
from taprobe_core.evaluation.contrasts import contrast_values, paired_deltas
from taprobe_core.evaluation.units import measure_units
from taprobe_core.metrics import pr_auc, spearman
from taprobe_core.study.config import Evaluation
from taprobe_core.tables import CONTRASTS, DELTAS, check_table

EVALUATION = Evaluation(baselines=("base",), n_bootstrap=100)


def _contrasts(scores, labels, targets, baselines=("base",)):
    scored = make_blocks(scores, labels)
    per_problem = measure_units(scored, (5,), targets, {})
    found = contrast_values(scored, per_problem, baselines, targets)
    return check_table(found, CONTRASTS, "test"), per_problem


def _set(scores, recipe, **columns):
    mine = pl.col("recipe") == recipe
    return {
        seed: frame.with_columns(
            pl.when(mine).then(value).otherwise(name).alias(name) for name, value in columns.items()
        )
        for seed, frame in scores.items()
    }


def test_with_one_target_the_baseline_is_worth_what_it_is_worth(make_scores):
    scores, labels = make_scores(recipes=("base", "probe"), seeds=(0, 1))
    found, per_problem = _contrasts(
        scores, labels, dict.fromkeys(("base", "probe"), "anchor_binary")
    )
    assert found.height == 2 * 7
    own = (
        per_problem.filter(split="test")
        .group_by("recipe", "problem_id")
        .agg(pl.col("primary").mean())
    )
    values = {(recipe, problem): value for recipe, problem, value in own.iter_rows()}
    for row in found.iter_rows(named=True):
        assert row["value"] == pytest.approx(values[row["recipe"], row["problem_id"]])
        assert row["baseline_value"] == pytest.approx(values["base", row["problem_id"]])


@pytest.mark.parametrize("target", ["anchor_binary", "importance_abs"])
def test_the_baseline_is_judged_by_the_recipes_target(make_scores, target):
    """The probe predicts a residual with anchors of its own; the baseline's scores rank those."""
    scores, labels = make_scores(recipes=("base", "probe"))
    residual = pl.col("target_value") - 0.01 * pl.col("sentence_idx")
    anchors = residual >= residual.quantile(0.7).over("recipe", "fold", "problem_id")
    scores = _set(scores, "probe", target_value=residual, is_positive=anchors)
    found, _ = _contrasts(scores, labels, {"base": "anchor_binary", "probe": target})
    for row in found.filter(recipe="probe").iter_rows(named=True):
        place = {"fold": row["fold"], "problem_id": row["problem_id"], "split": "test"}
        base, probe = (scores[0].filter(recipe=name, **place) for name in ("base", "probe"))
        side = ("is_positive", pr_auc) if target == "anchor_binary" else ("target_value", spearman)
        for name, own in (("value", probe), ("baseline_value", base)):
            assert row[name] == pytest.approx(side[1](probe[side[0]], own["score"]), abs=1e-12)


def test_a_target_of_fewer_sentences_is_compared_on_its_own_sentences(make_scores):
    """The baseline predicts less far than the recipe, and is asked about every sentence of it."""
    scores, labels = make_scores(recipes=("base", "probe"))
    to_end = pl.col("sentence_idx").max().over("problem_id") - pl.col("sentence_idx")
    for recipe, window in (("base", 6), ("probe", 2)):
        scores = _set(
            scores,
            recipe,
            target_value=pl.when((to_end >= window) & (pl.col("sentence_idx") > 0)).then(
                "target_value"
            ),
            is_positive=None,
        )
    found, _ = _contrasts(scores, labels, dict.fromkeys(("base", "probe"), "windowed_change"))
    for row in found.filter(recipe="probe").iter_rows(named=True):
        place = {"fold": row["fold"], "problem_id": row["problem_id"], "split": "test"}
        base, probe = (
            scores[0].filter(recipe=name, **place).sort("sentence_idx")
            for name in ("base", "probe")
        )
        n = probe.drop_nulls("target_value").height
        assert n == probe.height - 3
        expected = spearman(probe["target_value"][1 : n + 1], base["score"][1 : n + 1])
        assert row["baseline_value"] == pytest.approx(expected)


def test_signed_and_unsigned_targets_are_not_compared(make_scores):
    scores, labels = make_scores(recipes=("base", "probe"))
    scores = _set(scores, "probe", is_positive=None)
    targets = {"base": "anchor_binary", "probe": "importance_signed"}
    found, _ = _contrasts(scores, labels, targets)
    probe = found.filter(recipe="probe")
    assert probe["baseline_value"].null_count() == probe.height
    assert probe["value"].null_count() == 0
    deltas = check_table(paired_deltas(found, EVALUATION, targets), DELTAS, "test")
    (row,) = deltas.to_dicts()
    assert (row["n_problems"], row["delta"], row["p_sign_flip"]) == (0, None, None)
    assert "no order in common" in row["interval_note"]


def test_a_baseline_without_the_seed_or_fold_has_no_value(make_scores):
    scores, labels = make_scores(recipes=("base", "probe"))
    lost = ~((pl.col("recipe") == "base") & (pl.col("fold") == 2))
    found, _ = _contrasts(
        {0: scores[0].filter(lost)}, labels, dict.fromkeys(("base", "probe"), "anchor_binary")
    )
    missing = found.filter(pl.col("recipe") == "probe", pl.col("baseline_value").is_null())
    assert missing["fold"].to_list() == [2]
    deltas = paired_deltas(found, EVALUATION, dict.fromkeys(("base", "probe"), "anchor_binary"))
    assert deltas["n_problems"].to_list() == [6]


def test_without_baselines_there_is_nothing_to_contrast(make_scores):
    scores, labels = make_scores()
    targets = dict.fromkeys(("a", "b"), "anchor_binary")
    found, _ = _contrasts(scores, labels, targets, baselines=())
    assert found.is_empty()
    assert paired_deltas(found, EVALUATION, targets).is_empty()
