"""How much of a probe's value is what it was told, and how much what it could memorise.

Selectivity is the metric on the task less the metric on a control task (`control_task`), which a
probe of the same capacity can learn by memorising alone. Beside it, the online code: how many bits
the labels take if each block of problems is coded by a probe that learnt the blocks before. What
does not belong here: labels of a control, and fitting.

Invariant: task and control are compared on the same problems, by the same metric.

Source: Hewitt and Liang (2019), Designing and interpreting probes with control tasks; Voita and
Titov (2020), Information-theoretic probing with minimum description length, section 3.2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import polars as pl
from numpy.typing import ArrayLike

from taprobe_core.aggregation import chance_levels
from taprobe_core.comparison import Comparison, compare_values
from taprobe_core.errors import DataError
from taprobe_core.metrics import primary_metric
from taprobe_core.score_blocks import make_blocks
from taprobe_core.study.config import Evaluation, Target
from taprobe_core.tables import SELECTIVITY, schema_of
from taprobe_core.unit_metrics import measure_units

CONTROL_TARGET: Target = "anchor_binary"
"""What a control stands in the place of."""

_EDGE = 1e-7
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


class OnlineCode(NamedTuple):
    """What labels cost when told block by block.

    Attributes:
        bits: length of the online code.
        uniform_bits: length of the code that knows the share of positives alone.
        compression: uniform_bits / bits; 1 is no better than the share of positives.
    """

    bits: float
    uniform_bits: float
    compression: float


def online_code(
    n_first: int, blocks: Sequence[tuple[ArrayLike, ArrayLike]], prevalence: float
) -> OnlineCode:
    """Return the length of the online (prequential) code of binary labels.

    L = n_1 H - sum over later blocks b of log2 p_{b-1}(y_b | x_b), with p_{b-1} from a probe that
    was fitted on the blocks before b and H the entropy of the prevalence in bits; the code to
    compare with is n H. Voita and Titov code the first block, and the comparison, with one bit a
    label; with one anchor in ten that would flatter every probe.

    Args:
        n_first: labels of the first block, which nothing could be learnt from.
        blocks: of each later block, labels [row] bool and probabilities of a positive [row], cut to
            [1e-7, 1 - 1e-7]. Blocks hold whole problems.
        prevalence: share of positives over all blocks, in (0, 1).

    Returns:
        Bits and compression.

    Raises:
        DataError: labels and probabilities of a block differ in number, or a prevalence of 0 or 1.
    """
    if not 0 < prevalence < 1:
        raise DataError(f"prevalence {prevalence}", "online code", "give labels of both classes")
    entropy = -(
        prevalence * np.log2(prevalence) + (1 - prevalence) * np.log2(1 - prevalence)
    ).item()
    bits, n = n_first * entropy, n_first
    for place, (labels, probabilities) in enumerate(blocks):
        y, p = np.asarray(labels, dtype=bool), np.asarray(probabilities, dtype=np.float64)
        if y.shape != p.shape:
            raise DataError(
                f"{y.size} labels and {p.size} probabilities",
                f"online code, block {place + 1}",
                "score every sentence of the block",
            )
        cut = np.clip(p, _EDGE, 1 - _EDGE)
        bits -= float(np.log2(np.where(y, cut, 1 - cut)).sum())
        n += y.size
    return OnlineCode(bits, n * entropy, n * entropy / bits)
