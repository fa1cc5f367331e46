from __future__ import annotations

import dataclasses
import io

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from taprobe_core.errors import NotEnoughDataError
from taprobe_core.evaluation.evaluate import EvaluationTables
from taprobe_core.evaluation.intervals import benjamini_hochberg
from taprobe_core.evaluation.selection import Cell
from taprobe_core.keys import Site
from taprobe_core.report.leaderboard import baselines_of, build_leaderboard, render_text
from taprobe_core.study.config import DEFAULT_RECIPES
from taprobe_core.tables import DELTAS, NULL_KINDS, NULLS, PROTOCOLS, SPLITS, schema_of

METRICS = {
    "recipe": pl.String,
    "protocol": pl.Enum(PROTOCOLS),
    "split": pl.Enum(SPLITS),
    "primary_metric": pl.String,
    "target": pl.String,
    "residualize": pl.String,
    "n_problems": pl.Int64,
    "n_seeds": pl.Int64,
    "primary": pl.Float64,
    "primary_std": pl.Float64,
    "n_undefined_primary": pl.Int64,
    "pr_auc": pl.Float64,
    "spearman": pl.Float64,
    "pooled_pr_auc": pl.Float64,
    "chance_pr_auc": pl.Float64,
}


def _cell(
    layer: int,
    values: dict[str, float | None],
    model="tiny",
    setting="correct",
    metric="pr_auc",
    chance=0.13,
) -> Cell:
    about = ("lopo", metric, "anchor_binary", "none", 8, 1)
    rows = [
        (recipe, about[0], split, *about[1:], value, None, 0, value, value, value, chance)
        for recipe, value in values.items()
        for split in ("val", "test")
    ]
    difference = (8, 6, 0.1, 0.02, 0.2, 0.01, 0.21, 0.03, 0.04, None)
    deltas = [
        (recipe, "position_baseline", "lopo", metric, *difference)
        for recipe in values
        if recipe != "position_baseline"
    ]
    tables = EvaluationTables(
        pl.DataFrame(rows, METRICS, orient="row"),
        pl.DataFrame(),
        pl.DataFrame(deltas, schema_of(DELTAS), orient="row"),
    )
    return Site(model, layer), setting, tables


def _with_nulls(cell: Cell, draws: dict[str, np.ndarray], p: dict[str, float]) -> Cell:
    site, setting, tables = cell
    rows = [
        (
            recipe,
            "lopo",
            "pr_auc",
            null,
            8,
            len(each),
            0.3,
            0.1,
            0.02,
            0.0,
            0.2,
            p[recipe],
            each.tolist(),
        )
        for recipe, each in draws.items()
        for null in NULL_KINDS
    ]
    nulls = pl.DataFrame(rows, schema_of(NULLS), orient="row")
    return site, setting, dataclasses.replace(tables, nulls=nulls)


def test_layer_free_recipes_stand_once_per_model_and_others_at_each_layer():
    cells = [
        _cell(layer, {"position_baseline": 0.3, "linear_probe": 0.2 + 0.1 * layer}, model)
        for model in ("tiny", "other")
        for layer in (0, 1, 2)
    ]
    board = build_leaderboard(cells, recipes=DEFAULT_RECIPES)
    assert board.filter(recipe="position_baseline").select("model", "layer").rows() == [
        ("other", None),
        ("tiny", None),
    ]
    assert board.filter(recipe="linear_probe").height == 6
    assert board["n_configurations"].unique().to_list() == [8]
    assert board["rank"].to_list() == list(range(1, 9))
    assert board["value"].is_sorted(descending=True)
    assert baselines_of(board) == ["position_baseline"]
    own = board.filter(recipe="position_baseline")
    assert own["delta_position_baseline"].to_list() == [None, None]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.one_of(st.none(), st.just(float("nan")), st.floats(0, 1, width=16)),
        min_size=1,
        max_size=8,
    )
)
def test_undefined_values_rank_last_and_have_no_rank(values):
    cells = [_cell(layer, {"linear_probe": value}) for layer, value in enumerate(values)]
    board = build_leaderboard(cells, recipes=DEFAULT_RECIPES)
    defined = sorted(
        (value for value in values if value is not None and value == value), reverse=True
    )
    assert board["value"].to_list() == [*defined, *[None] * (len(values) - len(defined))]
    n_none = len(values) - len(defined)
    assert board["rank"].to_list() == [*range(1, len(defined) + 1), *[None] * n_none]


def test_settings_and_protocols_are_ranked_apart():
    cells = [
        _cell(0, {"linear_probe": 0.9}, setting="incorrect"),
        _cell(0, {"linear_probe": 0.1}, setting="correct"),
    ]
    board = build_leaderboard(cells, recipes=DEFAULT_RECIPES)
    assert board.select("setting", "rank", "n_configurations").rows() == [
        ("correct", 1, 1),
        ("incorrect", 1, 1),
    ]


def test_rank_correlation_has_chance_zero():
    board = build_leaderboard(
        [_cell(0, {"linear_probe": 0.4}, metric="spearman")], recipes=DEFAULT_RECIPES
    )
    found = board.select("metric", "value", "chance", "skill").row(0)
    assert found == ("spearman", 0.4, 0.0, pytest.approx(0.4))


def test_metrics_are_ranked_apart_and_percentiles_by_skill():
    """0.2 at a chance of 0.05 is more than 0.25 at 0.15; 0.9 of another metric is neither."""
    cells = [
        _cell(0, {"linear_probe": 0.25}, chance=0.15),
        _cell(1, {"linear_probe": 0.2}, chance=0.05),
        _cell(2, {"linear_probe": None}, chance=0.05),
        _cell(3, {"linear_probe": 0.9}, metric="spearman"),
    ]
    board = build_leaderboard(cells, recipes=DEFAULT_RECIPES)
    assert board.select("metric", "rank", "layer").rows() == [
        ("pr_auc", 1, 1),
        ("pr_auc", 2, 0),
        ("pr_auc", None, 2),
        ("spearman", 1, 3),
    ]
    assert board["n_configurations"].unique().to_list() == [4]


def test_the_best_of_many_is_tested_against_the_best_of_many():
    rng = np.random.default_rng(0)
    draws = rng.normal(0.1, 0.02, size=(6, 400)).astype(np.float32)
    cells = [
        _with_nulls(
            _cell(layer, {"linear_probe": 0.3 if layer == 2 else 0.135}),
            {"linear_probe": draws[layer]},
            {"linear_probe": 1 / 401 if layer == 2 else 0.04},
        )
        for layer in range(6)
    ]
    board = build_leaderboard(cells, recipes=DEFAULT_RECIPES).sort("layer")
    assert board["p_max_t"][2] == pytest.approx(1 / 401)
    others = board.filter(pl.col("layer") != 2)
    assert (others["p_max_t"] > 2 * others["p_position"]).all()
    assert board["p_position_bh"].to_list() == pytest.approx(
        benjamini_hochberg(board["p_position"]).tolist()
    )
    assert board["p_shift"].to_list() == board["p_position"].to_list()
    assert "position_draws" not in board.columns


def test_without_draws_there_is_no_corrected_p():
    board = build_leaderboard([_cell(0, {"linear_probe": 0.4})], recipes=DEFAULT_RECIPES)
    assert board.select("p_position", "p_max_t", "p_shift").row(0) == (None, None, None)
    assert board["p_adjusted_position_baseline"].to_list() == [pytest.approx(0.03)]


def test_differences_are_corrected_over_every_row_of_the_block():
    cells = [_cell(layer, {"linear_probe": 0.1 * layer}) for layer in range(4)]
    board = build_leaderboard(cells, recipes=DEFAULT_RECIPES)
    p = board["p_sign_flip_position_baseline"]
    assert board["p_adjusted_position_baseline"].to_list() == pytest.approx(
        benjamini_hochberg(p).tolist()
    )


def test_the_oracle_belongs_to_the_metric():
    site, setting, tables = _cell(0, {"linear_probe": 0.4})
    known = tables.metrics.with_columns(
        oracle_pr_auc=pl.lit(0.7), oracle_spearman=pl.lit(0.5), true_pr_auc=pl.lit(0.6)
    )
    for metric, oracle, chance in (("pr_auc", 0.7, 0.13), ("spearman", 0.5, 0.0)):
        own = known.with_columns(primary_metric=pl.lit(metric))
        cell = (site, setting, dataclasses.replace(tables, metrics=own))
        row = build_leaderboard([cell], recipes=DEFAULT_RECIPES).row(0, named=True)
        assert (row["oracle"], row["true_pr_auc"]) == (oracle, 0.6)
        assert row["oracle_skill"] == pytest.approx((0.4 - chance) / (oracle - chance))


def test_nothing_to_rank_is_refused():
    with pytest.raises(NotEnoughDataError, match="no evaluation"):
        build_leaderboard([], recipes=DEFAULT_RECIPES)


def test_text_holds_the_top_rows_and_reads_no_markup():
    cells = [
        _cell(layer, {"linear_probe": 0.2 + 0.1 * layer}, setting="[red]x[/red]")
        for layer in range(4)
    ]
    cells.append(_cell(9, {"linear_probe": None}, setting="[red]x[/red]"))
    board = build_leaderboard(cells, recipes=DEFAULT_RECIPES)
    out = io.StringIO()
    Console(file=out, width=200, color_system=None).print(*render_text(board, top=3))
    text = out.getvalue()
    assert text.count("linear_probe") == 3
    assert "[red]x[/red]" in text
    assert "0.500" in text
    assert "+0.10 [+0.02, +0.20]" in text
    assert "0.200" not in text.replace("+0.20", "")
    assert render_text(board.clear()) == []


def test_a_difference_without_interval_is_written_alone():
    site, setting, tables = _cell(0, {"linear_probe": 0.4})
    bare = tables.deltas.with_columns(
        delta_low=pl.lit(None, pl.Float64), delta_high=pl.lit(None, pl.Float64)
    )
    cell = (site, setting, EvaluationTables(tables.metrics, tables.problem_metrics, bare))
    out = io.StringIO()
    board = build_leaderboard([cell], recipes=DEFAULT_RECIPES)
    Console(file=out, width=200, color_system=None).print(*render_text(board))
    assert "+0.10 " in out.getvalue()
