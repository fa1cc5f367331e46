"""What a whole sweep is worth: choose fold by fold on validation, measure the choice on test.

The best of many configurations on test is optimistic, and so is a shortlist's, whose validation
problems are test problems of other folds. Here each fold chooses by its own validation problems
alone. Who goes on to the next stage belongs in `shortlist`.

Invariant: no test value influences a choice, and no fold sees another's validation values.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl

from taprobe_core.sweep.skills import SkillMatrix, skill_matrix, winner
from taprobe_core.sweep.values import PLACE, over_seeds, problem_values
from taprobe_core.tables.contract import check_table
from taprobe_core.tables.results import PROTOCOLS, schema_of
from taprobe_core.tables.sweep import SWEEP_CHOICES

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
            pl.col("excess", "room").mean()
        )
    )


def _best(matrix: SkillMatrix) -> float | None:
    skills = matrix.skill()[0]
    return float(np.nanmax(skills)) if np.isfinite(skills).any() else None
