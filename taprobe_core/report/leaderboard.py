"""Evaluations of every cell to one ranking.

One row per model × layer × setting × protocol × recipe on test; a recipe that reads no activations
stands once per model, without a layer. Rows of one metric are ranked together, by skill: the share
of the way from chance to a perfect ranking, so that targets with other base rates are not ranked by
their base rates. What does not belong here: an honest single winner (`selection`): the first row of
a ranking is the best of `n_configurations` tries on test, and the more there are, the higher it
stands by chance; `p_max_t` says how often the best of as many tries would stand so high.

Invariant: a value that is not defined ranks last and has no rank.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray
from rich import box
from rich.table import Table
from rich.text import Text

from taprobe_core.errors import NotEnoughDataError
from taprobe_core.evaluation.intervals import benjamini_hochberg, max_t
from taprobe_core.evaluation.selection import Cell
from taprobe_core.evaluation.summary import ROW, normalised_skill
from taprobe_core.keys import Site
from taprobe_core.study.config import ProbeRecipe

_BLOCK = ["setting", "protocol"]
_CAPTION = (
    "Ranked on test, where the best of many tries is optimistic; 95 % intervals over problems; p: "
    "the best of as many tries, labels permuted within fifths of the trace."
)
TRUTH_LEVELS = {"oracle": "oracle", "true_pr_auc": "on truth"}
"""Columns that exist where the true importance is known, and how they are headed: what the true
importance itself reaches on the labels, and what the recipe reaches against the true anchors."""

_DELTA = ["delta", "delta_low", "delta_high", "p_sign_flip", "p_adjusted", "interval_note"]
_NULL_P = {"circular_shift": "p_shift", "position_stratified": "p_position"}
_DRAWS = "position_draws"


def build_leaderboard(cells: Sequence[Cell], *, recipes: Sequence[ProbeRecipe]) -> pl.DataFrame:
    """Rank every configuration of a study.

    Args:
        cells: (site, setting, evaluation); the same metrics and baselines in each.
        recipes: the study's recipes, for whether they read activations.

    Returns:
        Columns: setting, protocol, rank, model, layer (null: reads no activations), recipe,
        target, residualize, metric (the recipe's primary one), value (mean over test problems),
        value_std (over seeds), val_value, chance, skill (`normalised_skill` of a perfect ranking),
        with the truth oracle and oracle_skill (of what the true importance reaches), n_problems,
        n_undefined, n_seeds; p_shift and p_position (`tables.NULLS`: labels turned along the trace,
        or permuted within its fifths), p_position_bh (p_position corrected by Benjamini-Hochberg
        over the block) and p_max_t (the best of the block's tries, labels permuted within fifths);
        per baseline `delta_<b>`, `delta_low_<b>`, `delta_high_<b>`, `p_sign_flip_<b>`,
        `p_adjusted_<b>` (Benjamini-Hochberg over the block's comparisons with every baseline),
        `interval_note_<b>`; then every metric, pooled_pr_auc and n_configurations (tried in the
        block, defined or not). A block is a setting and protocol. Ordered by setting, protocol,
        metric, falling skill, undefined last; ranks are within a metric.

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
    distinct = rows.sort(*_BLOCK, "model", "site_layer", "recipe").unique(
        identity, keep="first", maintain_order=True
    )
    blocks = distinct.group_by(_BLOCK, maintain_order=True)
    ranked = pl.concat(_corrected(block) for _, block in blocks)
    return (
        ranked.sort(
            [*_BLOCK, "metric", "skill", "value", "model", "layer", "recipe"],
            descending=[False, False, False, True, True, False, False, False],
            nulls_last=True,
        )
        .with_columns(
            pl.when(pl.col("value").is_not_null())
            .then(pl.int_range(1, pl.len() + 1).over([*_BLOCK, "metric"]))
            .alias("rank"),
            pl.len().over(_BLOCK).cast(pl.Int64).alias("n_configurations"),
        )
        .select(*_BLOCK, "rank", pl.exclude(*_BLOCK, "rank", "site_layer", _DRAWS))
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
    levels = {name: text for name, text in TRUTH_LEVELS.items() if name in block.columns}
    several = block["metric"].n_unique() > 1
    headings = ["value" if several else str(head["metric"]), "chance", *levels.values(), "p"]
    for heading in (*headings, *(f"minus {name}" for name in names)):
        table.add_column(heading, justify="right")
    place = pl.int_range(pl.len()).over("metric")
    shown = block.with_columns(place.alias("row")).filter(
        (pl.col("row") < top) | pl.col("layer").is_null()
    )
    for row in shown.iter_rows(named=True):
        layer = row["layer"]
        cells = [
            row["rank"],
            row["model"] if layer is None else str(Site(row["model"], layer)),
            f"{row['recipe']} ({row['metric']})" if several else row["recipe"],
            *(_number(row[name]) for name in ("value", "chance", *levels, "p_max_t")),
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
    key = ["recipe", "protocol"]
    on_val = tables.metrics.filter(pl.col("split") == "val").select(
        *key, pl.col("primary").fill_nan(None).alias("val_value")
    )
    board = tables.metrics.filter(pl.col("split") == "test").join(on_val, on=key, how="left")
    for null, column in _NULL_P.items():
        own = tables.nulls.filter(pl.col("null") == null)
        kept = [pl.col("draws").alias(_DRAWS)] if column == "p_position" else []
        board = board.join(
            own.select(*key, pl.col("p_null").alias(column), *kept), on=key, how="left"
        )
    for (baseline,), deltas in tables.deltas.group_by("baseline", maintain_order=True):
        named = {name: f"{name}_{baseline}" for name in _DELTA if name != "p_adjusted"}
        board = board.join(deltas.select(*key, *named).rename(named), on=key, how="left")
        board = board.with_columns(pl.lit(None, pl.Float64).alias(f"p_adjusted_{baseline}"))
    value, by_precision = pl.col("primary").fill_nan(None), pl.col("primary_metric") == "pr_auc"
    chance = pl.when(by_precision).then("chance_pr_auc").otherwise(0.0)
    levels = {"skill": normalised_skill(value, chance)}
    if "oracle_pr_auc" in board.columns:
        oracle = pl.when(by_precision).then("oracle_pr_auc").otherwise("oracle_spearman")
        levels |= {"oracle": oracle, "oracle_skill": normalised_skill(value, chance, oracle)}
    layer = pl.lit(site.layer, pl.Int64)
    return board.select(
        pl.lit(setting).alias("setting"),
        "protocol",
        pl.lit(site.model).alias("model"),
        pl.when(~pl.col("recipe").is_in(layer_free)).then(layer).alias("layer"),
        *("recipe", "target", "residualize"),
        pl.col("primary_metric").alias("metric"),
        value.alias("value"),
        pl.col("primary_std").alias("value_std"),
        "val_value",
        chance.alias("chance"),
        *(expression.alias(name) for name, expression in levels.items()),
        "n_problems",
        pl.col("n_undefined_primary").alias("n_undefined"),
        "n_seeds",
        *(*_NULL_P.values(), _DRAWS),
        *(pl.lit(None, pl.Float64).alias(name) for name in ("p_position_bh", "p_max_t")),
        *(name for name in board.columns if name.startswith(tuple(f"{each}_" for each in _DELTA))),
        *_other_metrics(tables.metrics),
        layer.alias("site_layer"),
    )


def _corrected(block: pl.DataFrame) -> pl.DataFrame:
    """Correct the tests of one setting and protocol for one another."""
    draws = block[_DRAWS]
    n_draws = {n for n in draws.list.len().drop_nulls() if n}
    table = np.full((block.height, n_draws.pop() if len(n_draws) == 1 else 0), np.nan)
    if table.size:
        has_draws = (draws.list.len().fill_null(0) > 0).to_numpy()
        table[has_draws] = np.stack(draws.filter(has_draws).to_list())
    columns = {
        "p_position_bh": benjamini_hochberg(_floats(block["p_position"])),
        "p_max_t": max_t(_floats(block["value"]), table),
    }
    names = [name for name in block.columns if name.startswith("p_sign_flip_")]
    if names:
        p = np.concatenate([_floats(block[name]) for name in names])
        for name, adjusted in zip(names, np.split(benjamini_hochberg(p), len(names)), strict=True):
            columns[name.replace("p_sign_flip", "p_adjusted", 1)] = adjusted
    return block.with_columns(
        pl.Series(name, values, pl.Float64).fill_nan(None) for name, values in columns.items()
    )


def _floats(values: pl.Series) -> NDArray[np.float64]:
    return values.cast(pl.Float64).fill_null(float("nan")).to_numpy()


def _other_metrics(metrics: pl.DataFrame) -> list[str]:
    marks = ("n_", "chance_", "primary")
    return [
        name
        for name in metrics.columns[len(ROW) :]
        if not name.startswith(marks)
        and not name.endswith("_std")
        and name not in ("target", "residualize")
    ]


def _number(value: float | None) -> str | None:
    return None if value is None else f"{value:.3f}"


def _delta(row: dict[str, Any], baseline: str) -> str | None:
    delta, low, high = (row[f"{name}_{baseline}"] for name in ("delta", "delta_low", "delta_high"))
    if delta is None:
        return None
    return f"{delta:+.2f}" if low is None else f"{delta:+.2f} [{low:+.2f}, {high:+.2f}]"
