"""From a leaderboard to the configurations that go on, and what a whole sweep is worth.

The best of many configurations on test is optimistic, and so is a shortlist's, whose validation
problems are test problems of other folds. What a sweep is worth is therefore measured fold by fold:
each fold chooses by its own validation problems alone, and the choice is read on its test problems.
Ranking belongs in `boards`, what the next stage makes of a list in `space`.

Invariants: nothing without a rank goes on, and values of different targets are never compared,
unless the study asks for the rule of the earlier script system. No test value influences a fold's
choice, and no fold sees another's validation values.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl

from taprobe_core.errors import NotEnoughDataError
from taprobe_core.study.sweep import Shortlists
from taprobe_core.sweep.recipes import Stage
from taprobe_core.sweep.values import (
    PLACE,
    SkillMatrix,
    over_seeds,
    problem_values,
    skill_matrix,
    winner,
)
from taprobe_core.tables.contract import check_table, schema_of
from taprobe_core.tables.results import PROTOCOLS
from taprobe_core.tables.sweep import SWEEP_CHOICES, SWEEP_SHORTLIST


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


_GROUP = ["stage", "target", "setting"]


def sweep_choices(
    configurations: pl.DataFrame, recipes: pl.DataFrame, results: pl.DataFrame, *, protocol: str
) -> pl.DataFrame:
    """Measure the choice among all candidates of a stage, target and setting.

    A candidate is a configuration with one of its kinds; a fold takes the one with the highest
    skill on its validation problems (ties: the lower name). Skills of different percentiles are
    compared as they are on the leaderboard.

    Args:
        configurations: `tables.SWEEP_CONFIGURATIONS`; duplicates are left out.
        recipes: `tables.SWEEP_RECIPES` of the same.
        results: `tables.SWEEP_RESULTS`.
        protocol: whose folds choose.

    Returns:
        `tables.SWEEP_CHOICES`; without a fold that has both sides there is no row.
    """
    own = configurations.filter(pl.col("duplicate_of").is_null()).select("config_id", "target")
    candidates = (
        recipes.filter(pl.col("role") == "candidate")
        .join(own, on="config_id", maintain_order="left")
        .select("stage", "target", *PLACE, "recipe")
        .unique(maintain_order=True)
    )
    mine = results.filter(pl.col("protocol") == protocol)
    folds = [
        over_seeds(problem_values(part, protocol)).with_columns(fold=pl.lit(fold, pl.Int32))
        for (fold,), part in mine.group_by("fold", maintain_order=True)
    ]
    if not folds:
        return schema_of(SWEEP_CHOICES).to_frame()
    values = candidates.join(pl.concat(folds), on=[*PLACE, "recipe"]).with_columns(
        pl.format("{}@L{} {}", "model", "layer", "recipe").alias("config_id")
    )
    rows = []
    for key, part in values.sort(*_GROUP, "config_id", "fold").group_by(
        _GROUP, maintain_order=True
    ):
        found = _chosen(part)
        if found is not None:
            about = dict(zip(_GROUP, key, strict=True)) | {"protocol": protocol}
            rows.append(about | found)
    frame = pl.DataFrame(rows, schema_of(SWEEP_CHOICES) | {"protocol": pl.Enum(PROTOCOLS)})
    return check_table(frame, SWEEP_CHOICES, "results of a sweep")


def _chosen(values: pl.DataFrame) -> dict[str, Any] | None:
    taken: list[str] = []
    parts = []
    for _, own in values.group_by("fold", maintain_order=True):
        sides = {split: own.filter(pl.col("split") == split) for split in ("val", "test")}
        if any(side.is_empty() for side in sides.values()):
            continue
        matrix = skill_matrix(sides["val"])
        best = int(winner(matrix.skill())[0])
        if best >= 0:
            taken.append(matrix.ids[best])
            parts.append(sides["test"].filter(pl.col("config_id") == matrix.ids[best]))
    if not taken:
        return None
    tested = pl.concat(parts).with_columns(pl.lit("the choice").alias("config_id"))
    counted = {name: taken.count(name) for name in sorted(set(taken))}
    test = values.filter(pl.col("split") == "test")
    return {
        "n_candidates": values["config_id"].n_unique(),
        "n_folds": len(taken),
        "n_chosen": len(counted),
        "most_chosen": max(counted, key=lambda name: counted[name]),
        "skill": _best(_over_folds(tested)),
        "best_skill": _best(_over_folds(test)),
        "n_problems": tested["problem_id"].n_unique(),
    }


def _over_folds(values: pl.DataFrame) -> SkillMatrix:
    return skill_matrix(
        values.group_by("config_id", "problem_id", maintain_order=True).agg(
            pl.col("value_above_chance", "ceiling_above_chance").mean()
        )
    )


def _best(matrix: SkillMatrix) -> float | None:
    skills = matrix.skill()[0]
    return float(np.nanmax(skills)) if np.isfinite(skills).any() else None
