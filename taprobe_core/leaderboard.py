"""Evaluations of every cell to one ranking.

One row per model × layer × setting × protocol × recipe on test; a recipe that reads no activations
stands once per model, without a layer. What does not belong here: an honest single winner
(`selection`): the first row of a ranking is the best of `n_configurations` tries on test, and the
more there are, the higher it stands by chance.

Invariant: a value that is not defined ranks last and has no rank.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import polars as pl
from rich import box
from rich.table import Table
from rich.text import Text

from taprobe_core.aggregation import ROW
from taprobe_core.errors import NotEnoughDataError
from taprobe_core.keys import Site
from taprobe_core.selection import Cell
from taprobe_core.study.config import ProbeRecipe

_BLOCK = ["setting", "protocol"]
_CAPTION = (
    "Ranked on test, where the best of many tries is optimistic; 95 % intervals over problems."
)
TRUTH_LEVELS = {"oracle_pr_auc": "oracle", "true_pr_auc": "on truth"}
"""Columns that exist where the true importance is known, and how they are headed: what the true
importance itself reaches on the labels, and what the recipe reaches against the true anchors."""

_DELTA = ["delta", "delta_low", "delta_high", "p_sign_flip", "interval_note"]


def build_leaderboard(cells: Sequence[Cell], *, recipes: Sequence[ProbeRecipe]) -> pl.DataFrame:
    """Rank every configuration of a study.

    Args:
        cells: (site, setting, evaluation); the same metrics and baselines in each.
        recipes: the study's recipes, for whether they read activations.

    Returns:
        Columns: setting, protocol, rank, model, layer (null: reads no activations), recipe,
        metric, value (mean over test problems), value_std (over seeds), val_value, chance,
        n_problems, n_undefined, n_seeds, per baseline `delta_<b>`, `delta_low_<b>`,
        `delta_high_<b>`, `p_sign_flip_<b>`, `interval_note_<b>`, then every metric, pooled_pr_auc
        and n_configurations (rows ranked together). Ordered by setting, protocol, falling value,
        undefined last.

    Raises:
        NotEnoughDataError: no cells.
    """
    if not cells:
        raise NotEnoughDataError(
            "no evaluation to rank", "leaderboard", "materialize evaluation first"
        )
    layer_free = {recipe.name for recipe in recipes if not recipe.reads_activations}
    rows = pl.concat([_rows(cell, layer_free) for cell in cells], how="diagonal")
    identity = [*_BLOCK, "model", "layer", "recipe"]
    return (
        rows.sort(*_BLOCK, "model", "site_layer", "recipe")
        .unique(identity, keep="first", maintain_order=True)
        .sort(
            [*_BLOCK, "value", "model", "layer", "recipe"],
            descending=[False, False, True, False, False, False],
            nulls_last=True,
        )
        .with_columns(
            pl.when(pl.col("value").is_not_null())
            .then(pl.int_range(1, pl.len() + 1).over(_BLOCK))
            .alias("rank"),
            pl.len().over(_BLOCK).cast(pl.Int64).alias("n_configurations"),
        )
        .select(*_BLOCK, "rank", pl.exclude(*_BLOCK, "rank", "site_layer"))
    )


def render_text(leaderboard: pl.DataFrame, top: int = 5) -> list[Table]:
    """Lay the ranking out for a terminal: one table per setting and protocol.

    Args:
        leaderboard: from `build_leaderboard`.
        top: best rows of each table; recipes that read no activations stand below them in any case.

    Returns:
        Rich tables; nothing is printed and no markup is read from the values.
    """
    return [
        _block_table(block, top) for _, block in leaderboard.group_by(_BLOCK, maintain_order=True)
    ]


def _block_table(block: pl.DataFrame, top: int) -> Table:
    names = baselines_of(block)
    head = block.row(0, named=True)
    title = f"{head['setting']} · {head['protocol']} · {head['n_problems']} test problems"
    table = Table(
        title=Text(title, style="bold"),
        title_justify="left",
        caption=_CAPTION,
        caption_justify="left",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("#", justify="right")
    table.add_column("model@layer", no_wrap=True)
    table.add_column("recipe", no_wrap=True)
    levels = [name for name in TRUTH_LEVELS if name in block.columns]
    headings = [str(head["metric"]), "chance", *(TRUTH_LEVELS[name] for name in levels)]
    for heading in (*headings, *(f"minus {name}" for name in names)):
        table.add_column(heading, justify="right")
    shown = block.with_row_index("row").filter((pl.col("row") < top) | pl.col("layer").is_null())
    for row in shown.iter_rows(named=True):
        layer = row["layer"]
        cells = [
            row["rank"],
            row["model"] if layer is None else str(Site(row["model"], layer)),
            row["recipe"],
            *(_number(row[name]) for name in ("value", "chance", *levels)),
            *(_delta(row, name) for name in names),
        ]
        table.add_row(*(Text("–" if cell is None else str(cell)) for cell in cells))
    return table


def baselines_of(leaderboard: pl.DataFrame) -> list[str]:
    """Return the baselines that a leaderboard holds deltas of."""
    prefix = "delta_low_"
    return [name.removeprefix(prefix) for name in leaderboard.columns if name.startswith(prefix)]


def _rows(cell: Cell, layer_free: Collection[str]) -> pl.DataFrame:
    site, setting, tables = cell
    primary = str(tables.metrics["primary_metric"][0])
    key = ["recipe", "protocol"]
    on_val = tables.metrics.filter(pl.col("split") == "val").select(
        *key, pl.col(primary).alias("val_value")
    )
    board = tables.metrics.filter(pl.col("split") == "test").join(on_val, on=key, how="left")
    for (baseline,), deltas in tables.deltas.group_by("baseline", maintain_order=True):
        named = {name: f"{name}_{baseline}" for name in _DELTA}
        board = board.join(deltas.select(*key, *_DELTA).rename(named), on=key, how="left")
    per_baseline = [name for name in board.columns if name.startswith(tuple(_DELTA))]
    chance = pl.col("chance_pr_auc") if primary == "pr_auc" else pl.lit(0.0)
    layer = pl.lit(site.layer, pl.Int64)
    return board.select(
        pl.lit(setting).alias("setting"),
        "protocol",
        pl.lit(site.model).alias("model"),
        pl.when(~pl.col("recipe").is_in(layer_free)).then(layer).alias("layer"),
        "recipe",
        pl.lit(primary).alias("metric"),
        pl.col(primary).fill_nan(None).alias("value"),
        pl.col(f"{primary}_std").alias("value_std"),
        pl.col("val_value").fill_nan(None),
        chance.alias("chance"),
        "n_problems",
        pl.col(f"n_undefined_{primary}").alias("n_undefined"),
        "n_seeds",
        *per_baseline,
        *_other_metrics(tables.metrics),
        layer.alias("site_layer"),
    )


def _other_metrics(metrics: pl.DataFrame) -> list[str]:
    marks = ("n_", "chance_", "primary_")
    return [
        name
        for name in metrics.columns[len(ROW) :]
        if not name.startswith(marks) and not name.endswith("_std")
    ]


def _number(value: float | None) -> str | None:
    return None if value is None else f"{value:.3f}"


def _delta(row: dict[str, Any], baseline: str) -> str | None:
    delta, low, high = (row[f"{name}_{baseline}"] for name in ("delta", "delta_low", "delta_high"))
    if delta is None:
        return None
    return f"{delta:+.2f}" if low is None else f"{delta:+.2f} [{low:+.2f}, {high:+.2f}]"
