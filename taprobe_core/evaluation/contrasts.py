"""Recipes beside baselines judged by one target, problem by problem; recipes beside their control.

One rule: both are judged by the *recipe's* target, with its primary metric, on the sentences where
that target is defined. Where the two predict the same, this is the baseline's own value; a baseline
of another percentile, of raw instead of residual importance, or of another unsigned target is asked
what it says about the recipe's. A signed and an unsigned target have no order in common, so
neither is judged by the other: such a pair has no value, and a note says so.

Selectivity is the metric on the task less the metric on a control task (`probes.control_task`),
which a probe of the same capacity can learn by memorising alone.

What does not belong here: the statistics of the differences (`intervals`), and labels of a control.
Invariant: a pair of values is of the same problem, fold, seeds and sentences, and the same metric.

Source: Hewitt and Liang (2019), Designing and interpreting probes with control tasks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from taprobe_core.evaluation.blocks import ScoreBlocks, make_blocks
from taprobe_core.evaluation.intervals import Comparison, compare_values, no_comparison
from taprobe_core.evaluation.summary import chance_levels
from taprobe_core.evaluation.units import measure_units
from taprobe_core.metrics import (
    centred_rank_rows,
    pr_auc_rows,
    primary_metric,
    rank_rows,
    spearman_rows,
)
from taprobe_core.study.config import Evaluation
from taprobe_core.study.targets import TARGETS, Target
from taprobe_core.tables import CONTRASTS, DELTAS, SELECTIVITY, schema_of

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
    contrasts: pl.DataFrame,
    evaluation: Evaluation,
    targets: Mapping[str, Target],
    place: Sequence[str] = (),
) -> pl.DataFrame:
    """Compare every recipe with every baseline over test problems.

    Args:
        contrasts: `tables.CONTRASTS`, behind the columns of `place`.
        evaluation: bootstrap settings.
        targets: recipe -> what its scores predict. A baseline without one, such as chance, may
            stand beside any recipe.
        place: columns that tell sites and settings apart where the table holds many.

    Returns:
        `place`, then `tables.DELTAS`: one row per recipe × baseline (another one) × protocol.
    """
    rows = []
    key = [*place, "recipe", "baseline", "protocol"]
    groups = (
        contrasts.filter(pl.col("recipe") != pl.col("baseline"))
        .group_by(*key, "problem_id", maintain_order=True)
        .agg(pl.col("value", "baseline_value").mean())
        .group_by(key, maintain_order=True)
    )
    for values, pair in groups:
        named: dict[str, Any] = dict(zip(key, values, strict=True))
        ours = targets[named["recipe"]]
        theirs = targets.get(named["baseline"], ours)
        if _is_comparable(ours, theirs):
            other = pair.select("problem_id", pl.col("baseline_value").alias("value"))
            found = compare_values(pair.select("problem_id", "value"), other, evaluation)
        else:
            found = no_comparison(f"{ours} and {theirs} have no order in common")
        rows.append({**named, "metric": primary_metric(ours), **found._asdict()})
    schema = {name: contrasts.schema[name] for name in place} | schema_of(DELTAS)
    return pl.DataFrame(rows, schema).sort(*place, "recipe", "protocol", "baseline")


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


CONTROL_TARGET: Target = "anchor_binary"
"""What a control stands in the place of."""

_SELECTIVITY_KEY = ["recipe", "protocol"]
_OF_PROBLEM = [*_SELECTIVITY_KEY, "problem_id"]


def control_values(
    controls_by_seed: Mapping[int, pl.DataFrame], labels: pl.DataFrame
) -> pl.DataFrame:
    """Measure recipes on their control tasks, as `units.measure_units` does on their tasks.

    Args:
        controls_by_seed: seed -> `tables.SCORES` of the control tasks, under the names of the
            recipes that they control.
        labels: `tables.LABELS`.

    Returns:
        One row per unit; without rows or columns where no control was scored.
    """
    if not any(scores.height for scores in controls_by_seed.values()):
        return pl.DataFrame()
    scored = make_blocks(controls_by_seed, labels)
    targets = dict.fromkeys(scored.units["recipe"].unique(), CONTROL_TARGET)
    return measure_units(scored, (), targets, {})


def selectivity(task: pl.DataFrame, control: pl.DataFrame, evaluation: Evaluation) -> pl.DataFrame:
    """Compare each recipe on its task with the same recipe on the control task.

    Both are PR-AUC on the same test problems. A problem without a positive of the control, which
    labels whole kinds, defines no value of it: it is left out of both means and counted.

    Args:
        task: units of recipes on their task (`units.measure_units`).
        control: units of the same recipes on the control task (`control_values`).
        evaluation: bootstrap settings.

    Returns:
        `tables.SELECTIVITY`, one row per recipe × protocol of both.
    """
    rows: list[dict[str, Any]] = []
    if control.width:
        both = _in_problem(task).join(
            _in_problem(control), on=_OF_PROBLEM, suffix="_control", maintain_order="left"
        )
        for (recipe, protocol), block in both.group_by(_SELECTIVITY_KEY, maintain_order=True):
            paired = block.drop_nulls(["value", "value_control"])
            other = paired.select("problem_id", value=pl.col("value_control"))
            found = compare_values(paired.select("problem_id", "value"), other, evaluation)
            rows.append(
                {
                    "recipe": recipe,
                    "protocol": protocol,
                    "metric": primary_metric(CONTROL_TARGET),
                    "task_value": paired["value"].mean(),
                    "task_chance": paired["chance"].mean(),
                    "control_value": paired["value_control"].mean(),
                    "control_chance": paired["chance_control"].mean(),
                    **_named(found),
                    "n_undefined": block.height - paired.height,
                }
            )
    table = pl.DataFrame(rows, infer_schema_length=None) if rows else None
    schema = schema_of(SELECTIVITY)
    return schema.to_frame() if table is None else table.select(schema.names()).cast(schema)


def _in_problem(units: pl.DataFrame) -> pl.DataFrame:
    """Average seeds inside each test problem, and say what a random ranking reaches there."""
    test = units.filter(pl.col("split") == "test")
    sizes = test.select(pl.col("n_sentences", "n_anchors").fill_null(0)).to_numpy().T
    chance = pl.Series("chance", chance_levels(*sizes)).fill_nan(None)
    means = pl.col("primary").mean().alias("value"), pl.col("chance").mean()
    return test.with_columns(chance).group_by(_OF_PROBLEM).agg(*means).sort(_OF_PROBLEM)


def _named(found: Comparison) -> dict[str, Any]:
    """The comparison, its difference called what it is here."""
    return {name.replace("delta", "selectivity"): value for name, value in found._asdict().items()}
