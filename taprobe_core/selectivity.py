"""How much of a probe's value is what it was told, and how much what it could memorise.

Selectivity is the metric on the task less the metric on a control task (`control_task`), which a
probe of the same capacity can learn by memorising alone. What does not
belong here: labels of a control, and fitting.

Invariant: task and control are compared on the same problems, by the same metric.

Source: Hewitt and Liang (2019), Designing and interpreting probes with control tasks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import polars as pl

from taprobe_core.aggregation import chance_levels
from taprobe_core.comparison import Comparison, compare_values
from taprobe_core.metrics import primary_metric
from taprobe_core.score_blocks import make_blocks
from taprobe_core.study.config import Evaluation, Target
from taprobe_core.tables import SELECTIVITY, schema_of
from taprobe_core.unit_metrics import measure_units

CONTROL_TARGET: Target = "anchor_binary"
"""What a control stands in the place of."""

_KEY = ["recipe", "protocol"]
_OF_PROBLEM = [*_KEY, "problem_id"]


def control_values(
    controls_by_seed: Mapping[int, pl.DataFrame], labels: pl.DataFrame
) -> pl.DataFrame:
    """Measure recipes on their control tasks, as `unit_metrics.measure_units` does on their tasks.

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
        task: units of recipes on their task (`unit_metrics.measure_units`).
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
        for (recipe, protocol), block in both.group_by(_KEY, maintain_order=True):
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
