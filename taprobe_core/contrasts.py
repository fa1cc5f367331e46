"""Recipes and baselines judged by one target, problem by problem.

One rule: both are judged by the *recipe's* target, with its primary metric, on the sentences where
that target is defined. Where the two predict the same, this is the baseline's own value; a baseline
of another percentile, of raw instead of residual importance, or of another unsigned target is asked
what it says about the recipe's. A signed and an unsigned target have no order in common, so
neither is judged by the other: such a pair has no value, and a note says so.

What does not belong here: the statistics of the differences (`comparison`). Invariant: a pair of
values is of the same problem, fold, seeds and sentences.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import polars as pl
from numpy.typing import NDArray

from taprobe_core.batched_metrics import centred_rank_rows, pr_auc_rows, rank_rows, spearman_rows
from taprobe_core.comparison import compare_values, no_comparison
from taprobe_core.metrics import primary_metric
from taprobe_core.score_blocks import ScoreBlocks
from taprobe_core.study.config import Evaluation
from taprobe_core.study.targets import TARGETS, Target
from taprobe_core.tables import CONTRASTS, DELTAS, schema_of

_PAIR = ["protocol", "fold", "seed", "problem_id"]
_KEY = ["recipe", "baseline", "protocol", "fold", "problem_id"]


def contrast_values(
    scored: ScoreBlocks,
    per_problem: pl.DataFrame,
    baselines: tuple[str, ...],
    targets: Mapping[str, Target],
) -> pl.DataFrame:
    """Judge recipe and baseline alike on every test problem.

    Args:
        scored: from `make_blocks`.
        per_problem: from `measure_units`, for the recipes' own values.
        baselines: recipes to compare with.
        targets: recipe -> what its scores predict.

    Returns:
        `tables.CONTRASTS`, seeds averaged; `value` is null where either side is not defined in any
        seed, `baseline_value` too where the two have no order in common.
    """
    own = per_problem.with_row_index("unit").filter(pl.col("split") == "test")
    parts = []
    for baseline in baselines:
        alike = [name for name in targets if _is_comparable(targets[name], targets[baseline])]
        pairs = own.join(
            own.filter(recipe=baseline).select(*_PAIR, pl.col("unit").alias("other")),
            on=_PAIR,
            how="left",
            maintain_order="left",
        )
        judged = np.full(per_problem.height, np.nan)
        partner = np.full(per_problem.height, -1, dtype=np.int64)
        wanted = pairs.filter(pl.col("recipe").is_in(alike) & pl.col("other").is_not_null())
        partner[wanted["unit"].to_numpy()] = wanted["other"].to_numpy()
        _judge(scored, partner, judged, _ranks_by_precision(scored, targets))
        parts.append(
            pairs.select(
                "recipe",
                pl.lit(baseline).alias("baseline"),
                *_PAIR,
                pl.col("primary").alias("value"),
                pl.Series("baseline_value", judged[pairs["unit"].to_numpy()]).fill_nan(None),
            )
        )
    if not parts:
        return schema_of(CONTRASTS).to_frame()
    means = pl.col("value", "baseline_value").mean()
    return pl.concat(parts).group_by(_KEY, maintain_order=True).agg(means).sort(_KEY)


def paired_deltas(
    contrasts: pl.DataFrame, evaluation: Evaluation, targets: Mapping[str, Target]
) -> pl.DataFrame:
    """Compare every recipe with every baseline over test problems.

    Args:
        contrasts: `tables.CONTRASTS`.
        evaluation: bootstrap settings.
        targets: recipe -> what its scores predict.

    Returns:
        `tables.DELTAS`: one row per recipe × baseline (another one) × protocol.
    """
    rows = []
    groups = (
        contrasts.filter(pl.col("recipe") != pl.col("baseline"))
        .group_by("recipe", "baseline", "protocol", "problem_id", maintain_order=True)
        .agg(pl.col("value", "baseline_value").mean())
        .group_by("recipe", "baseline", "protocol", maintain_order=True)
    )
    for (recipe, baseline, protocol), pair in groups:
        ours, theirs = targets[str(recipe)], targets[str(baseline)]
        if _is_comparable(ours, theirs):
            other = pair.select("problem_id", pl.col("baseline_value").alias("value"))
            found = compare_values(pair.select("problem_id", "value"), other, evaluation)
        else:
            found = no_comparison(f"{ours} and {theirs} have no order in common")
        key = {"recipe": recipe, "baseline": baseline, "protocol": protocol}
        rows.append({**key, "metric": primary_metric(ours), **found._asdict()})
    return pl.DataFrame(rows, schema_of(DELTAS)).sort("recipe", "protocol", "baseline")


def _is_comparable(target: Target, other: Target) -> bool:
    return TARGETS[target].ranks_anchors == TARGETS[other].ranks_anchors


def _ranks_by_precision(scored: ScoreBlocks, targets: Mapping[str, Target]) -> NDArray[np.bool_]:
    metric = {name: primary_metric(target) == "pr_auc" for name, target in targets.items()}
    return scored.units["recipe"].replace_strict(metric, return_dtype=pl.Boolean).to_numpy()


def _judge(
    scored: ScoreBlocks,
    partner: NDArray[np.int64],
    judged: NDArray[np.float64],
    by_precision: NDArray[np.bool_],
) -> None:
    """Fill `judged` [unit] with the metric of the partner's scores by the unit's own target."""
    for block in scored.blocks:
        rows = np.flatnonzero(partner[block.units] >= 0)
        if not rows.size:
            continue
        units = block.units[rows]
        # Many recipes share a target, and all share the baseline: each pair is measured once.
        pair = np.stack([partner[units], block.target_of[1][rows], by_precision[units]], axis=1)
        _, first, back = np.unique(pair, axis=0, return_index=True, return_inverse=True)
        start = scored.start[partner[units[first]]]
        ranking = rank_rows(scored.score[start[:, None] + block.columns])
        own = rows[first]
        values = np.where(
            by_precision[units[first]],
            pr_auc_rows(block.positive[own], ranking),
            spearman_rows(centred_rank_rows(block.target[own]), ranking),
        )
        judged[units] = values[back.ravel()]
