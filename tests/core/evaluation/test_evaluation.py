from __future__ import annotations

from dataclasses import fields

import numpy as np
import polars as pl
import pytest

from taprobe_core.errors import DataError, LabelError, NotEnoughDataError
from taprobe_core.evaluation.evaluate import EvaluationTables, evaluate, primary_metric
from taprobe_core.metrics import pr_auc, spearman
from taprobe_core.study.config import Evaluation
from taprobe_core.tables import DELTAS, PROTOCOLS, SPLITS, check_table, results

N = 12
SCHEMA = {
    "problem_id": pl.Int64,
    "sentence_idx": pl.Int64,
    "recipe": pl.String,
    "protocol": pl.Enum(PROTOCOLS),
    "fold": pl.Int32,
    "split": pl.Enum(SPLITS),
    "score": pl.Float32,
    "target_value": pl.Float64,
    "is_positive": pl.Boolean,
}
NAMES = ("position_baseline", "linear_probe", "copy_of_it")
ANCHORS, ABSOLUTE, SIGNED = (
    dict.fromkeys(NAMES, target)
    for target in ("anchor_binary", "importance_abs", "importance_signed")
)
ONE_BASELINE = Evaluation(
    baselines=("position_baseline",), recall_at=(3,), n_bootstrap=400, n_null=50
)


@pytest.fixture(scope="module")
def labels() -> pl.DataFrame:
    rng = np.random.default_rng(0)
    signed = rng.normal(0, 0.2, size=(8, N)).clip(-1, 1)
    rows = [
        (problem, index, float(signed[problem, index]), float(abs(signed[problem, index])))
        for problem in range(8)
        for index in range(N)
    ]
    names = ["problem_id", "sentence_idx", "importance_signed", "importance_abs"]
    frame = pl.DataFrame(rows, names, orient="row")
    rank = pl.col("importance_abs").rank("ordinal", descending=True).over("problem_id")
    return frame.with_columns(
        (rank <= 2).alias("is_anchor"),
        pl.lit(None, pl.Float64).alias("true_importance"),
        pl.lit(None, pl.Boolean).alias("is_true_anchor"),
    )


def _with_truth(labels: pl.DataFrame) -> pl.DataFrame:
    """The truth: half the labels' signed importance, but nothing on even sentences."""
    is_odd = pl.col("sentence_idx") % 2 == 1
    true = pl.when(is_odd).then(pl.col("importance_signed") / 2).otherwise(0.0)
    frame = labels.with_columns(true.alias("true_importance"))
    rank = pl.col("true_importance").abs().rank("ordinal", descending=True).over("problem_id")
    return frame.with_columns((rank <= 2).alias("is_true_anchor"))


def _fold(labels, recipe, protocol, fold, sides, noise, seed=0) -> pl.DataFrame:
    """Scores of one fold: importance plus seeded noise; the target is absolute importance."""
    rng = np.random.default_rng([seed, fold, len(recipe)])
    parts = []
    for split, problems in sides.items():
        for problem in problems:
            own = labels.filter(problem_id=problem)
            importance, anchors = own["importance_abs"].to_numpy(), own["is_anchor"].to_list()
            score = importance + noise * rng.normal(size=N)
            parts += [
                (problem, index, recipe, protocol, fold, split, float(each), target, anchor)
                for index, (each, target, anchor) in enumerate(
                    zip(score, importance.tolist(), anchors, strict=True)
                )
            ]
    return pl.DataFrame(parts, SCHEMA, orient="row")


def _lopo(labels, recipe, noise, seed=0) -> pl.DataFrame:
    return pl.concat(
        _fold(labels, recipe, "lopo", fold, {"val": [(fold + 1) % 8], "test": [fold]}, noise, seed)
        for fold in range(8)
    )


def _both(labels, seed=0) -> pl.DataFrame:
    return pl.concat(
        [_lopo(labels, "position_baseline", 0.5, seed), _lopo(labels, "linear_probe", 0.1, seed)]
    )


def _row(frame: pl.DataFrame, **where: str) -> dict:
    (row,) = frame.filter(**where).to_dicts()
    return row


def test_numbers_equal_a_recount_by_problem(labels):
    by_seed = {seed: _both(labels, seed) for seed in (3, 4, 5)}
    tables = evaluate(by_seed, labels, ONE_BASELINE, ANCHORS)
    joined = {
        seed: scores.filter(recipe="linear_probe", split="test").join(
            labels, on=["problem_id", "sentence_idx"]
        )
        for seed, scores in by_seed.items()
    }
    measured = np.array(
        [
            [
                pr_auc(group["is_anchor"], group["score"])
                for _, group in frame.group_by("problem_id", maintain_order=True)
            ]
            for frame in joined.values()
        ]
    )
    row = _row(tables.metrics, recipe="linear_probe", split="test")
    assert row["pr_auc"] == pytest.approx(measured.mean())
    assert row["pr_auc_std"] == pytest.approx(measured.mean(axis=1).std(ddof=1))
    assert (row["n_problems"], row["n_seeds"], row["n_undefined_pr_auc"]) == (8, 3, 0)
    pooled = [pr_auc(frame["is_anchor"], frame["score"]) for frame in joined.values()]
    assert row["pooled_pr_auc"] == pytest.approx(np.mean(pooled))
    assert row["primary_metric"] == "pr_auc"


def test_one_seed_has_no_spread(labels):
    tables = evaluate({0: _both(labels)}, labels, ONE_BASELINE, ANCHORS)
    assert tables.metrics["pr_auc_std"].null_count() == tables.metrics.height


def test_a_problem_weighs_the_same_however_many_folds_validate_on_it(labels):
    folds = [
        _fold(labels, "position_baseline", "lopo", fold, {"val": val, "test": [fold]}, 0.3)
        for fold, val in enumerate([[7], [7], [7], [6]])
    ]
    tables = evaluate({0: pl.concat(folds)}, labels, ONE_BASELINE, ANCHORS)
    on_val = tables.problem_metrics.filter(split="val")
    by_problem = on_val.group_by("problem_id").agg(pl.col("spearman").mean())
    row = _row(tables.metrics, split="val")
    assert row["n_problems"] == 2
    assert row["spearman"] == pytest.approx(by_problem["spearman"].mean())
    assert row["spearman"] != pytest.approx(on_val["spearman"].mean())


def test_the_better_recipe_is_found_with_its_interval(labels):
    tables = evaluate({0: _both(labels)}, labels, ONE_BASELINE, ANCHORS)
    delta = _row(check_table(tables.deltas, DELTAS, "test"))
    assert (delta["recipe"], delta["baseline"]) == ("linear_probe", "position_baseline")
    assert delta["n_problems"] == 8
    assert 0 < delta["delta_low"] <= delta["delta"] <= delta["delta_high"]
    assert delta["interval_note"] is None


def test_a_recipe_with_the_baselines_scores_differs_by_zero(labels):
    base = _lopo(labels, "position_baseline", 0.5)
    copy = base.with_columns(recipe=pl.lit("copy_of_it"))
    tables = evaluate({0: pl.concat([base, copy])}, labels, ONE_BASELINE, ANCHORS)
    delta = _row(tables.deltas)
    assert (delta["delta"], delta["delta_low"], delta["t_low"]) == (0.0, None, None)
    assert (delta["n_better"], delta["p_sign_flip"], delta["p_wilcoxon"]) == (0, 1.0, 1.0)
    assert "all 8 differences are equal" in delta["interval_note"]


def test_three_test_problems_get_no_interval(labels):
    sides = {"val": [0], "test": [1, 2, 3]}
    scores = pl.concat(
        _fold(labels, recipe, "holdout", 0, sides, 0.3)
        for recipe in ("position_baseline", "linear_probe")
    )
    tables = evaluate({0: scores}, labels, ONE_BASELINE, ANCHORS)
    delta = _row(tables.deltas)
    assert (delta["delta_low"], delta["delta_high"]) == (None, None)
    assert delta["interval_note"] == "3 problems have only 10 distinct resamples"


def test_undefined_is_null_counted_and_left_out(labels):
    flat = pl.when(pl.col("problem_id") == 2).then(0.5).otherwise(pl.col("score"))
    scores = _both(labels).with_columns(flat.cast(pl.Float32).alias("score"))
    scores = scores.with_columns(pl.col("is_positive") & (pl.col("problem_id") != 3))
    tables = evaluate({0: scores}, labels, ONE_BASELINE, ABSOLUTE)
    row = _row(tables.metrics, recipe="linear_probe", split="test")
    assert row["n_undefined_spearman"] == 1
    assert row["n_undefined_pr_auc"] == 1
    assert row["n_problems"] == 8
    test = tables.problem_metrics.filter(recipe="linear_probe", split="test")
    assert test.filter(problem_id=2)["spearman"].to_list() == [None]
    assert row["spearman"] == pytest.approx(test.drop_nulls("spearman")["spearman"].mean())
    delta = _row(tables.deltas)
    assert (delta["metric"], delta["n_problems"]) == ("spearman", 7)
    floats = tables.metrics.select(pl.col(pl.Float64).is_nan().any())
    assert not any(floats.row(0))


def _signed(labels) -> pl.DataFrame:
    """Scores of signed importance that are exact, with the target to match."""
    scores = pl.concat(
        _fold(labels, "position_baseline", "lopo", fold, {"val": [7], "test": [fold]}, 0.0)
        for fold in range(7)
    )
    signed = labels.select("problem_id", "sentence_idx", signed=pl.col("importance_signed"))
    return scores.join(signed, on=["problem_id", "sentence_idx"]).select(
        *list(SCHEMA)[:-3],
        pl.col("signed").cast(pl.Float32).alias("score"),
        pl.col("signed").alias("target_value"),
        pl.lit(None, pl.Boolean).alias("is_positive"),
    )


def test_signed_scores_rank_signed_importance_and_no_anchors(labels):
    tables = evaluate({0: _signed(labels)}, labels, ONE_BASELINE, SIGNED)
    row = _row(tables.metrics, split="test")
    assert row["spearman"] == pytest.approx(1.0)
    assert (row["primary"], row["label_spearman"]) == (row["spearman"], pytest.approx(1.0))
    assert (row["pr_auc"], row["pooled_pr_auc"], row["recall_at_3"]) == (None, None, None)
    assert (row["label_pr_auc"], row["chance_pr_auc"]) == (None, None)
    assert row["n_undefined_pr_auc"] == row["n_problems"]
    assert primary_metric("importance_signed") == "spearman"


def test_anchors_that_are_predicted_and_not_named_are_refused(labels):
    with pytest.raises(DataError, match="predict anchors and name none"):
        evaluate({0: _signed(labels)}, labels, ONE_BASELINE, ANCHORS)
    with pytest.raises(DataError, match=r"no target given of the recipes \['linear_probe'\]"):
        evaluate({0: _both(labels)}, labels, ONE_BASELINE, {"position_baseline": "anchor_binary"})


def test_every_table_keeps_its_contract_and_holds_no_nan(labels):
    share = (1 / (1 + (-pl.col("score")).exp())).alias("score")
    by_seed = {seed: _both(labels, seed).with_columns(share) for seed in (0, 1)}
    controls = {
        seed: scores.filter(recipe="linear_probe").with_columns(
            is_positive=pl.col("sentence_idx") % 4 == 0
        )
        for seed, scores in by_seed.items()
    }
    tables = evaluate(by_seed, labels, ONE_BASELINE, ANCHORS, controls_by_seed=controls)
    for name in fields(EvaluationTables):
        frame = getattr(tables, name.name)
        contract = getattr(results, name.name.upper(), None)
        if contract is not None:
            check_table(frame, contract, name.name)
        assert frame.height, name.name
        assert not any(frame.select(pl.col(pl.Float64).is_nan().any()).row(0)), name.name


def test_selectivity_stands_on_the_value_that_is_ranked(labels):
    by_seed = {seed: _both(labels, seed) for seed in (0, 1)}
    controls = {
        seed: scores.filter(recipe="linear_probe").with_columns(
            is_positive=pl.col("sentence_idx") % 4 == 0
        )
        for seed, scores in by_seed.items()
    }
    tables = evaluate(by_seed, labels, ONE_BASELINE, ANCHORS, controls_by_seed=controls)
    on = ["recipe", "protocol"]
    test = tables.metrics.filter(split="test").select(*on, "pr_auc", "chance_pr_auc")
    both = tables.selectivity.join(test, on=on)
    assert set(both["recipe"]) == {"linear_probe"}
    assert both["task_value"].to_list() == pytest.approx(both["pr_auc"].to_list())
    assert both["task_chance"].to_list() == pytest.approx(both["chance_pr_auc"].to_list())
    # Scores that follow importance know nothing of every fourth sentence.
    assert (both["selectivity"] > 0.2).all()
    assert evaluate(by_seed, labels, ONE_BASELINE, ANCHORS).selectivity.is_empty()


def test_mixed_targets_are_each_judged_by_their_own(labels):
    base = _lopo(labels, "position_baseline", 0.3)
    signed = _signed(labels).with_columns(recipe=pl.lit("linear_probe"))
    scores = pl.concat([base.filter(pl.col("fold") < 7), signed])
    targets = {"position_baseline": "anchor_binary", "linear_probe": "importance_signed"}
    tables = evaluate({0: scores}, labels, ONE_BASELINE, targets, {"linear_probe": "position"})
    test = tables.metrics.filter(split="test")
    assert dict(test.select("recipe", "primary_metric").iter_rows()) == {
        "linear_probe": "spearman",
        "position_baseline": "pr_auc",
    }
    assert _row(test, recipe="linear_probe")["residualize"] == "position"
    delta = _row(tables.deltas)
    assert (delta["metric"], delta["n_problems"], delta["delta"]) == ("spearman", 0, None)
    assert delta["interval_note"] == "importance_signed and anchor_binary have no order in common"
    assert tables.calibration["recipe"].unique().to_list() in ([], ["position_baseline"])


def test_tables_do_not_depend_on_row_order(labels):
    # Coarse scores tie, and recall breaks ties by sentence order.
    scores = _both(labels).with_columns(pl.col("score").round(0))
    shuffled = scores.sample(fraction=1.0, shuffle=True, seed=1)
    one, other = (
        evaluate({0: each, 1: each}, labels, ONE_BASELINE, ANCHORS) for each in (scores, shuffled)
    )
    assert one.problem_metrics.equals(other.problem_metrics)
    assert one.deltas.equals(other.deltas)
    assert one.metrics["pr_auc"].to_list() == pytest.approx(other.metrics["pr_auc"].to_list())


def test_scores_must_cover_problems_whole(labels):
    scores = _both(labels)
    partial = scores.filter(~((pl.col("problem_id") == 3) & (pl.col("sentence_idx") == 5)))
    with pytest.raises(LabelError, match=r"11 scores match 11 of 12 labels of problem 3 \(4 such"):
        evaluate({0: partial}, labels, ONE_BASELINE, ANCHORS)
    with pytest.raises(LabelError, match="12 scores match 0 of 0 labels of problem 3"):
        evaluate(
            {0: scores}, labels.filter(pl.col("problem_id") != 3), ONE_BASELINE, "anchor_binary"
        )


def test_missing_scores_and_baselines_are_refused(labels):
    with pytest.raises(NotEnoughDataError, match="no scores"):
        evaluate({}, labels, ONE_BASELINE, ANCHORS)
    with pytest.raises(DataError, match=r"text_only_baseline.*\nFix: "):
        evaluate({0: _both(labels)}, labels, Evaluation(), ANCHORS)


def test_spearman_of_the_frame_is_the_metric_itself(labels):
    tables = evaluate({0: _both(labels)}, labels, ONE_BASELINE, ANCHORS)
    scores = _both(labels).filter(recipe="linear_probe", split="test", problem_id=4)
    expected = spearman(labels.filter(problem_id=4)["importance_abs"], scores["score"])
    found = _row(tables.problem_metrics, recipe="linear_probe", split="test", problem_id=4)
    assert found["spearman"] == pytest.approx(expected)
    assert (found["n_sentences"], found["n_anchors"]) == (12, 2)


def test_where_the_truth_is_known_scores_are_measured_against_it_too(labels):
    true = _with_truth(labels)
    tables = evaluate({0: _both(true)}, true, ONE_BASELINE, ANCHORS)
    scores = _both(true).filter(recipe="linear_probe", split="test")
    joined = scores.join(true, on=["problem_id", "sentence_idx"])
    on_truth, oracle = [], []
    for _, group in joined.group_by("problem_id", maintain_order=True):
        on_truth.append(pr_auc(group["is_true_anchor"], group["score"]))
        oracle.append(pr_auc(group["is_anchor"], group["true_importance"].abs()))
    row = _row(tables.metrics, recipe="linear_probe", split="test")
    assert row["true_pr_auc"] == pytest.approx(np.mean(on_truth))
    assert row["oracle_pr_auc"] == pytest.approx(np.mean(oracle))
    assert (
        row["oracle_pr_auc"]
        == _row(tables.metrics, recipe="position_baseline", split="test")["oracle_pr_auc"]
    )
    without = evaluate({0: _both(labels)}, labels, ONE_BASELINE, ANCHORS)
    assert not {"true_pr_auc", "oracle_pr_auc"} & set(without.metrics.columns)
    assert without.deltas.equals(tables.deltas)


def test_signed_scores_are_not_measured_against_true_anchors(labels):
    true = _with_truth(labels)
    tables = evaluate({0: _signed(true)}, true, ONE_BASELINE, SIGNED)
    for name in ("true_pr_auc", "oracle_pr_auc"):
        assert tables.metrics[name].null_count() == tables.metrics.height
    expected = [
        spearman(group["true_importance"], group["importance_signed"])
        for _, group in true.filter(pl.col("problem_id") < 7).group_by("problem_id")
    ]
    row = _row(tables.metrics, split="test")
    assert row["oracle_spearman"] == pytest.approx(np.mean(expected))


def test_the_oracle_of_a_residual_is_not_known(labels):
    true = _with_truth(labels)
    tables = evaluate({0: _both(true)}, true, ONE_BASELINE, ANCHORS, {"linear_probe": "position"})
    probe = _row(tables.metrics, recipe="linear_probe", split="test")
    assert (probe["oracle_pr_auc"], probe["oracle_spearman"]) == (None, None)
    assert probe["label_pr_auc"] is not None
