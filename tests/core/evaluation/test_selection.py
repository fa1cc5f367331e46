from __future__ import annotations

import dataclasses

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from taprobe_core.evaluation.evaluate import EvaluationTables
from taprobe_core.evaluation.intervals import benjamini_hochberg, holm
from taprobe_core.evaluation.selection import ANY_ACTIVATION_PROBE, Cell, select_on_validation
from taprobe_core.keys import Site
from taprobe_core.study.config import DEFAULT_RECIPES, Evaluation
from taprobe_core.tables import CONTRASTS, PROTOCOLS, SPLITS

RECIPES = tuple(
    recipe
    for recipe in DEFAULT_RECIPES
    if recipe.name in ("position_baseline", "linear_probe", "mlp_probe")
)
EVALUATION = Evaluation(baselines=("position_baseline",), n_bootstrap=200)
N_FOLDS = 7


def _cell(layer: int, values: dict[tuple[str, str], list[float | None]], seeds=(0,)) -> Cell:
    """(recipe, split) -> pr_auc per fold; fold f validates on problem 100 + f and tests f."""
    rows = [
        (recipe, "lopo", split, fold, seed, fold + (100 if split == "val" else 0), value, 40, 4)
        for (recipe, split), by_fold in values.items()
        for fold, value in enumerate(by_fold)
        for seed in seeds
    ]
    schema = {
        "recipe": pl.String,
        "protocol": pl.Enum(PROTOCOLS),
        "split": pl.Enum(SPLITS),
        "fold": pl.Int32,
        "seed": pl.Int64,
        "problem_id": pl.Int64,
        "primary": pl.Float64,
        "n_sentences": pl.Int64,
        "n_anchors": pl.Int64,
    }
    per_problem = pl.DataFrame(rows, schema, orient="row")
    metrics = per_problem.select("recipe", pl.lit("pr_auc").alias("primary_metric")).unique()
    return Site("tiny", layer), "correct", _tables(metrics, per_problem)


def _tables(metrics: pl.DataFrame, per_problem: pl.DataFrame) -> EvaluationTables:
    """All recipes predict the same, so every baseline is worth its own value."""
    key = ["protocol", "fold", "problem_id"]
    means = (
        per_problem.filter(pl.col("split") == "test")
        .group_by("recipe", *key, maintain_order=True)
        .agg(pl.col("primary").mean().alias("value"))
    )
    other = means.rename({"recipe": "baseline", "value": "baseline_value"})
    contrasts = means.join(other, on=key, maintain_order="left").select(list(CONTRASTS.columns))
    return EvaluationTables(metrics, per_problem, pl.DataFrame(), contrasts)


def _two_layers(val: list[float], test: list[float]) -> list[Cell]:
    base = {("position_baseline", split): [0.2] * N_FOLDS for split in ("val", "test")}
    return [
        _cell(
            layer,
            {
                **base,
                ("linear_probe", "val"): [val[layer]] * N_FOLDS,
                ("linear_probe", "test"): [test[layer]] * N_FOLDS,
            },
        )
        for layer in range(len(val))
    ]


def _select(cells: list[Cell], evaluation: Evaluation = EVALUATION) -> dict[str, dict]:
    frame = select_on_validation(cells, recipes=RECIPES, evaluation=evaluation)
    return {row["recipe"]: row for row in frame.to_dicts()}


def test_validation_chooses_although_another_layer_is_better_on_test():
    row = _select(_two_layers(val=[0.5, 0.4], test=[0.3, 0.9]))["linear_probe"]
    assert row["chosen"] == ["linear_probe@L00"]
    assert row["value"] == pytest.approx(0.3)
    assert row["delta"] == pytest.approx(0.1)
    assert (row["n_candidates"], row["n_problems"], row["n_better"]) == (2, 7, 7)
    assert row["baseline_value"] == pytest.approx(0.2)
    assert row["chance"] == pytest.approx(0.1762, abs=1e-3)


def test_each_fold_chooses_for_itself():
    first = [0.9 if fold < 3 else 0.1 for fold in range(N_FOLDS)]
    cells = [
        _cell(
            layer,
            {
                ("position_baseline", "val"): [0.2] * N_FOLDS,
                ("position_baseline", "test"): [0.2] * N_FOLDS,
                ("linear_probe", "val"): val,
                ("linear_probe", "test"): [float(layer)] * N_FOLDS,
            },
        )
        for layer, val in enumerate((first, [0.5] * N_FOLDS))
    ]
    row = _select(cells)["linear_probe"]
    assert row["value"] == pytest.approx(4 / 7)
    assert row["chosen"] == ["linear_probe@L00", "linear_probe@L01"]


def test_ties_go_to_the_lower_layer_and_undefined_validation_is_last():
    assert _select(_two_layers([0.4, 0.4], [0.1, 0.2]))["linear_probe"]["chosen"] == [
        "linear_probe@L00"
    ]
    undefined = _two_layers([0.4, 0.1], [0.1, 0.2])
    site, setting, tables = undefined[0]
    is_probe_val = (pl.col("recipe") == "linear_probe") & (pl.col("split") == "val")
    lost = tables.problem_metrics.with_columns(
        pl.when(~is_probe_val).then("primary").alias("primary")
    )
    undefined[0] = (site, setting, _tables(tables.metrics, lost))
    assert _select(undefined)["linear_probe"]["chosen"] == ["linear_probe@L01"]


def test_any_probe_chooses_among_recipes_and_layers():
    cells = [
        _cell(
            layer,
            {
                (recipe, split): [value] * N_FOLDS
                for recipe, value in (
                    ("position_baseline", 0.9),
                    ("linear_probe", 0.3 + 0.1 * layer),
                    ("mlp_probe", 0.2 + 0.3 * layer),
                )
                for split in ("val", "test")
            },
        )
        for layer in range(2)
    ]
    row = _select(cells)[ANY_ACTIVATION_PROBE]
    assert row["chosen"] == ["mlp_probe@L01"]
    assert row["n_candidates"] == 4
    assert row["delta"] == pytest.approx(-0.4)


def test_a_baseline_that_reads_activations_is_chosen_likewise():
    cells = _two_layers([0.5, 0.4], [0.3, 0.9])
    found = _select(cells, Evaluation(baselines=("linear_probe",), n_bootstrap=10))
    assert set(found) == {ANY_ACTIVATION_PROBE}
    assert found[ANY_ACTIVATION_PROBE]["delta"] == 0.0


def test_a_baseline_is_judged_by_the_chosen_recipes_target():
    """The contrast table, not the baseline's own metric, stands beside the choice."""
    cells = []
    for site, setting, tables in _two_layers(val=[0.5, 0.4], test=[0.3, 0.9]):
        judged = tables.contrasts.with_columns(
            pl.when(pl.col("recipe") == "linear_probe").then(0.05).alias("baseline_value")
        )
        cells.append((site, setting, dataclasses.replace(tables, contrasts=judged)))
    row = _select(cells)["linear_probe"]
    assert (row["baseline_value"], row["delta"]) == (pytest.approx(0.05), pytest.approx(0.25))


def test_the_joint_choice_takes_the_first_baselines_target_alone():
    other = RECIPES[-1].model_copy(update={"percentile": 80.0})
    cells = [
        _cell(
            0,
            {
                (recipe, split): [value] * N_FOLDS
                for recipe, value in (
                    ("position_baseline", 0.2),
                    ("linear_probe", 0.3),
                    ("mlp_probe", 0.9),
                )
                for split in ("val", "test")
            },
        )
    ]
    frame = select_on_validation(cells, recipes=(*RECIPES[:-1], other), evaluation=EVALUATION)
    joint = frame.filter(recipe=ANY_ACTIVATION_PROBE).to_dicts()[0]
    assert (joint["chosen"], joint["n_candidates"]) == (["linear_probe@L00"], 1)
    assert set(frame["recipe"]) == {ANY_ACTIVATION_PROBE, "linear_probe", "mlp_probe"}


def test_planned_comparisons_are_corrected_together_and_the_rest_apart():
    rng = np.random.default_rng(0)
    cells = []
    for model in ("tiny", "other"):
        values = {
            (recipe, split): list(rng.normal(level, 0.1, N_FOLDS))
            for recipe, level in (
                ("position_baseline", 0.2),
                ("linear_probe", 0.3),
                ("mlp_probe", 0.25),
            )
            for split in ("val", "test")
        }
        _, setting, tables = _cell(0, values)
        cells.append((Site(model, 0), setting, tables))
    frame = select_on_validation(cells, recipes=RECIPES, evaluation=EVALUATION)
    planned = frame.filter("is_planned")
    assert set(planned["recipe"]) == {ANY_ACTIVATION_PROBE}
    assert planned["n_contrasts"].to_list() == [2, 2]
    assert planned["correction"].unique().to_list() == ["holm"]
    assert planned["p_adjusted"].to_list() == pytest.approx(holm(planned["p_sign_flip"]).tolist())
    rest = frame.filter(~pl.col("is_planned"))
    assert rest["n_contrasts"].unique().to_list() == [4]
    assert rest["p_adjusted"].to_list() == pytest.approx(
        benjamini_hochberg(rest["p_sign_flip"]).tolist()
    )
    own = Evaluation(
        baselines=("position_baseline",), n_bootstrap=0, planned=("mlp_probe",), correction="none"
    )
    frame = select_on_validation(cells, recipes=RECIPES, evaluation=own)
    assert frame.filter("is_planned")["recipe"].unique().to_list() == ["mlp_probe"]
    assert frame.filter(
        pl.col("is_planned") & (pl.col("p_adjusted") != pl.col("p_sign_flip"))
    ).is_empty()


def test_without_activation_recipes_there_is_nothing_to_choose():
    values = {("position_baseline", split): [0.2] * N_FOLDS for split in ("val", "test")}
    frame = select_on_validation([_cell(0, values)], recipes=RECIPES, evaluation=EVALUATION)
    assert frame.height == 0
    assert "delta_low" in frame.columns


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000))
def test_no_test_value_influences_a_choice(seed):
    rng = np.random.default_rng(seed)
    cells = _two_layers(val=[0.1, 0.3, 0.2], test=[0.0, 0.0, 0.0])
    noisy = []
    for site, setting, tables in cells:
        noise = pl.Series("noise", rng.random(tables.problem_metrics.height))
        changed = tables.problem_metrics.with_columns(
            pl.when(pl.col("split") == "test").then(noise).otherwise("primary").alias("primary")
        )
        noisy.append((site, setting, _tables(tables.metrics, changed)))
    for name in ("linear_probe", ANY_ACTIVATION_PROBE):
        assert _select(noisy)[name]["chosen"] == _select(cells)[name]["chosen"]
