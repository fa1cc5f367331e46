"""From a leaderboard to the configurations that go on to the next stage.

Ranking belongs in `boards`, what the next stage makes of a list in `space`. Invariant: nothing
without a rank goes on, and values of different targets are never compared, unless the study asks
for the rule of the earlier script system.
"""

from __future__ import annotations

import polars as pl

from taprobe_core.errors import NotEnoughDataError
from taprobe_core.study.sweep import Shortlists
from taprobe_core.sweep.factors import Stage
from taprobe_core.tables.contract import check_table
from taprobe_core.tables.sweep import SWEEP_SHORTLIST


def shortlist_stage2(board: pl.DataFrame, shortlists: Shortlists) -> pl.DataFrame:
    """Return the best `to_stage2` configurations of stage 1 for each target.

    Args:
        board: `tables.SWEEP_LEADERBOARD`, ranked by `shortlists.rank_by`.
        shortlists: the rule.

    Returns:
        `tables.SWEEP_SHORTLIST`: the best of every target first, then the second, and so on.

    Raises:
        NotEnoughDataError: no configuration of stage 1 has a rank.
    """
    ranked = _ranked(board, "stage1").filter(pl.col("target_rank") <= shortlists.to_stage2)
    return _listed(ranked.sort("target_rank", "target"), shortlists)


def shortlist_stage3(board: pl.DataFrame, shortlists: Shortlists) -> pl.DataFrame:
    """Return the best `to_stage3` configurations of stage 2.

    Targets take turns: the best of each, then the second of each. Under `test_primary` all are
    compared with one another, as the earlier script system did.

    Args:
        board: `tables.SWEEP_LEADERBOARD`, ranked by `shortlists.rank_by`.
        shortlists: the rule.

    Returns:
        `tables.SWEEP_SHORTLIST`.

    Raises:
        NotEnoughDataError: no configuration of stage 2 has a rank.
    """
    ranked = _ranked(board, "stage2")
    if shortlists.rank_by == "test_primary":
        ranked = ranked.sort(["score", "config_id"], descending=[True, False])
    else:
        ranked = ranked.sort("target_rank", "target")
    return _listed(ranked.head(shortlists.to_stage3), shortlists)


def _ranked(board: pl.DataFrame, stage: Stage) -> pl.DataFrame:
    mine = board.filter(pl.col("stage") == stage).with_columns(
        (pl.col("status") == "missing").sum().over("target").cast(pl.Int64).alias("n_missing")
    )
    ranked = mine.filter(pl.col("rank").is_not_null()).rename({"rank": "target_rank"})
    if ranked.is_empty():
        raise NotEnoughDataError(
            f"none of {mine.height} configurations has a rank",
            f"{stage} of the sweep",
            f"fit and evaluate {stage} first",
        )
    return ranked


def _listed(ranked: pl.DataFrame, shortlists: Shortlists) -> pl.DataFrame:
    reason = pl.format(
        "{} of {} by {} ({}) for {}{}",
        "target_rank",
        "n_tried",
        pl.lit(shortlists.rank_by),
        pl.col("score").round(4),
        "target",
        pl.when(pl.col("n_missing") > 0)
        .then(pl.format("; {} not there to compare", "n_missing"))
        .otherwise(pl.lit("")),
    )
    listed = ranked.with_columns(
        pl.int_range(1, pl.len() + 1).alias("rank"),
        pl.lit(shortlists.rank_by).alias("rank_by"),
        reason.alias("reason"),
    )
    return check_table(
        listed.select(*SWEEP_SHORTLIST.columns), SWEEP_SHORTLIST, "a sweep's leaderboard"
    )
