from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from taprobe_core.evaluation import EvaluationTables
from taprobe_core.keys import Site
from taprobe_core.selection import ANY_ACTIVATION_PROBE, Cell, select_on_validation
from taprobe_core.study.config import DEFAULT_RECIPES, Evaluation
from taprobe_core.tables import PROTOCOLS, SPLITS

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
        "pr_auc": pl.Float64,
        "n_sentences": pl.Int64,
        "n_anchors": pl.Int64,
    }
    per_problem = pl.DataFrame(rows, schema, orient="row")
    metrics = per_problem.select("recipe", pl.lit("pr_auc").alias("primary_metric")).unique()
    return Site("tiny", layer), "correct", EvaluationTables(metrics, per_problem, pl.DataFrame())


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
        pl.when(~is_probe_val).then("pr_auc").alias("pr_auc")
    )
    undefined[0] = (site, setting, EvaluationTables(tables.metrics, lost, tables.deltas))
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
            pl.when(pl.col("split") == "test").then(noise).otherwise("pr_auc").alias("pr_auc")
        )
        noisy.append((site, setting, EvaluationTables(tables.metrics, changed, tables.deltas)))
    for name in ("linear_probe", ANY_ACTIVATION_PROBE):
        assert _select(noisy)[name]["chosen"] == _select(cells)[name]["chosen"]
