from __future__ import annotations

import dataclasses

import polars as pl
import pytest

from taprobe_core.evaluation.evaluate import evaluate
from taprobe_core.keys import Site
from taprobe_core.report.findings import diagnose
from taprobe_core.study.config import DEFAULT_RECIPES, Evaluation

EVALUATION = Evaluation(baselines=("position_baseline",), n_bootstrap=50, n_null=20, best_of_k=1)
NAMES = ("position_baseline", "linear_probe")
TARGETS = dict.fromkeys(NAMES, "anchor_binary")


@pytest.fixture(scope="module")
def cells(make_scores):
    found = []
    for layer, seeds in ((0, (0, 1)), (1, (2, 3))):
        scores, labels = make_scores(recipes=NAMES, seeds=seeds)
        tables = evaluate(scores, labels, EVALUATION, TARGETS)
        found.append((Site("tiny", layer), "correct", tables))
    return found


def test_each_recipe_stands_once_at_the_layer_that_validation_prefers(cells):
    table = diagnose(cells, recipes=DEFAULT_RECIPES)
    assert table["recipe"].to_list() == ["linear_probe", "position_baseline"]
    assert table["layer"].to_list()[1] is None
    on_val = [
        tables.metrics.filter(recipe="linear_probe", split="val")["primary"][0]
        for *_, tables in cells
    ]
    best = int(on_val[1] > on_val[0])
    row = table.row(0, named=True)
    tables = cells[best][2]
    assert (row["layer"], row["val_value"]) == (best, max(on_val))
    own = tables.nulls.filter(recipe="linear_probe", null="position_stratified")
    assert (row["null_mean"], row["p_position"]) == (own["null_mean"][0], own["p_null"][0])
    assert (
        row["p_shift"]
        == tables.nulls.filter(recipe="linear_probe", null="circular_shift")["p_null"][0]
    )
    bins = tables.position_bins.filter(recipe="linear_probe")
    assert row["fifths"] == bins["value"].to_list()
    assert row["n_defined"] == bins["n_defined"].to_list()
    assert row["slope"] == tables.calibration.filter(recipe="linear_probe")["slope"][0]
    assert row["best_seed"] == tables.best_seeds.filter(recipe="linear_probe")["best_seed"][0]


def test_what_was_not_computed_is_null_and_fifths_stay_five(cells):
    site, setting, tables = cells[0]
    bare = tables.position_bins.filter(pl.col("bin") != 2)
    less = dataclasses.replace(
        tables,
        position_bins=bare,
        nulls=tables.nulls.clear(),
        calibration=tables.calibration.clear(),
    )
    table = diagnose([(site, setting, less)], recipes=DEFAULT_RECIPES)
    row = table.row(0, named=True)
    assert len(row["fifths"]) == 5
    assert (row["fifths"][2], row["n_defined"][2]) == (None, 0)
    assert (row["null_mean"], row["slope"], row["p_shift"]) == (None, None, None)
