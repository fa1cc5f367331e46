from __future__ import annotations

import io

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from taprobe_core.errors import NotEnoughDataError
from taprobe_core.evaluation import EvaluationTables
from taprobe_core.keys import Site
from taprobe_core.leaderboard import baselines_of, build_leaderboard, render_text
from taprobe_core.selection import Cell
from taprobe_core.study.config import DEFAULT_RECIPES
from taprobe_core.tables import DELTAS, PROTOCOLS, SPLITS

METRICS = {
    "recipe": pl.String,
    "protocol": pl.Enum(PROTOCOLS),
    "split": pl.Enum(SPLITS),
    "primary_metric": pl.String,
    "n_problems": pl.Int64,
    "n_seeds": pl.Int64,
    "pr_auc": pl.Float64,
    "pr_auc_std": pl.Float64,
    "n_undefined_pr_auc": pl.Int64,
    "pooled_pr_auc": pl.Float64,
    "chance_pr_auc": pl.Float64,
}


def _cell(layer: int, values: dict[str, float | None], model="tiny", setting="correct") -> Cell:
    rows = [
        (recipe, "lopo", split, "pr_auc", 8, 1, value, None, 0, value, 0.13)
        for recipe, value in values.items()
        for split in ("val", "test")
    ]
    deltas = [
        (recipe, "position_baseline", "lopo", "pr_auc", 8, 6, 0.1, 0.02, 0.2, 0.03, None)
        for recipe in values
        if recipe != "position_baseline"
    ]
    schema = {name: column.dtype.type for name, column in DELTAS.columns.items()}
    tables = EvaluationTables(
        pl.DataFrame(rows, METRICS, orient="row"),
        pl.DataFrame(),
        pl.DataFrame(deltas, schema, orient="row"),
    )
    return Site(model, layer), setting, tables


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
    site, setting, tables = _cell(0, {"linear_probe": 0.4})
    renamed = tables.metrics.rename(
        {name: name.replace("pr_auc", "spearman", 1) for name in METRICS if name.endswith("pr_auc")}
        | {"pr_auc_std": "spearman_std"}
    ).rename({"chance_spearman": "chance_pr_auc", "pooled_spearman": "pooled_pr_auc"})
    metrics = renamed.with_columns(primary_metric=pl.lit("spearman"))
    cell = (site, setting, EvaluationTables(metrics, tables.problem_metrics, tables.deltas))
    board = build_leaderboard([cell], recipes=DEFAULT_RECIPES)
    assert board.select("metric", "value", "chance").row(0) == ("spearman", 0.4, 0.0)


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
