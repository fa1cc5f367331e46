"""Comparisons to sentences: does an activation probe beat the baselines, in plain words.

One finding per setting and model, from the choice that validation made over all activation probes
and layers (`selection.ANY_ACTIVATION_PROBE`), under the protocol with most test problems. What does
not belong here: computing intervals, and laying sentences out.

Invariant: "beats" is said only where the whole 95 % interval lies above zero, and nothing is
concluded where there is no interval.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import polars as pl

from taprobe_core.selection import ANY_ACTIVATION_PROBE

Verdict = Literal["beats", "mixed", "no evidence", "worse", "cannot say"]

VERDICT_LABELS: Mapping[Verdict, str] = {
    "beats": "Beats every baseline",
    "mixed": "Beats some baselines, not all",
    "no evidence": "No evidence of beating the baselines",
    "worse": "Beats no baseline, stays below at least one",
    "cannot say": "Too few problems to say",
}
"""How a verdict is written for readers."""

METRIC_LABELS = {"pr_auc": "PR-AUC", "spearman": "Spearman"}
"""How a metric is written for readers."""


@dataclass(frozen=True)
class Finding:
    """What one setting and model show.

    Attributes:
        setting: setting.
        model: model key.
        verdict: against all baselines together.
        text: the sentences.
    """

    setting: str
    model: str
    verdict: Verdict
    text: str


def main_protocol(rows: pl.DataFrame) -> str | None:
    """Return the protocol that tests most problems; None without rows.

    Args:
        rows: with protocol and n_problems.
    """
    most = rows.group_by("protocol").agg(pl.col("n_problems").max()).sort("n_problems", "protocol")
    return most["protocol"][-1] if most.height else None


def headline_rows(selected: pl.DataFrame) -> pl.DataFrame:
    """Return the comparisons that the findings speak of, in table order.

    Args:
        selected: from `selection.select_on_validation`.
    """
    rows = selected.filter(pl.col("recipe") == ANY_ACTIVATION_PROBE)
    return rows.filter(pl.col("protocol").cast(pl.String) == pl.lit(main_protocol(rows)))


def findings(selected: pl.DataFrame) -> list[Finding]:
    """Say what the comparisons show.

    Args:
        selected: from `selection.select_on_validation`.

    Returns:
        One finding per setting × model, in table order; empty without activation probes.
    """
    headline = selected.filter(pl.col("recipe") == ANY_ACTIVATION_PROBE)
    most = (
        headline.group_by("protocol").agg(pl.col("n_problems").max()).sort("n_problems", "protocol")
    )
    if not most.height:
        return []
    shown = headline.filter(pl.col("protocol") == most["protocol"][-1])
    return [
        _finding(str(setting), str(model), group.to_dicts())
        for (setting, model), group in shown.group_by("setting", "model", maintain_order=True)
    ]


def verdict_of(row: Mapping[str, Any]) -> Verdict:
    """Return what one comparison shows.

    Args:
        row: with delta_low and delta_high, None where there is no interval.
    """
    low, high = row["delta_low"], row["delta_high"]
    if low is None or high is None:
        return "cannot say"
    if low > 0:
        return "beats"
    return "worse" if high < 0 else "no evidence"


def interval_text(row: Mapping[str, Any]) -> str:
    """Write a difference with its interval, or without one.

    Args:
        row: with delta, delta_low and delta_high.
    """
    if row["delta"] is None:
        return "undefined"
    if row["delta_low"] is None:
        return f"{row['delta']:+.3f}, no interval"
    return f"{row['delta']:+.3f}, 95 % interval {row['delta_low']:+.3f} to {row['delta_high']:+.3f}"


def _finding(setting: str, model: str, rows: Sequence[Mapping[str, Any]]) -> Finding:
    first = rows[0]
    metric = METRIC_LABELS.get(first["metric"], first["metric"])
    verdicts = [verdict_of(row) for row in rows]
    reached = "undefined" if first["value"] is None else f"{first['value']:.3f}"
    levels = [
        f"{name} {first[name]:.3f}" for name in ("chance", "oracle") if first[name] is not None
    ]
    between = f" ({', '.join(levels)})" if levels else ""
    opening = (
        f"The activation probe that validation chose, fold by fold, out of {first['n_candidates']} "
        f"candidates reaches {metric} {reached}{between} under {first['protocol']}."
    )
    if first["true_value"] is not None:
        opening += f" Against the true anchors the same scores reach {first['true_value']:.3f}."
    clauses = [
        f"{_VERBS[verdict_of(row)]} {row['baseline']} ({interval_text(row)})" for row in rows
    ]
    notes = sorted({row["interval_note"] for row in rows if row["interval_note"]})
    reasons = f" No interval: {'; '.join(notes)}." if notes else ""
    return Finding(
        setting, model, _together(verdicts), f"{opening} It {'; it '.join(clauses)}.{reasons}"
    )


_VERBS: Mapping[Verdict, str] = {
    "beats": "beats",
    "worse": "stays below",
    "no evidence": "cannot be told apart from",
    "cannot say": "cannot be judged against",
}


def _together(verdicts: Sequence[Verdict]) -> Verdict:
    distinct = set(verdicts)
    if len(distinct) == 1:
        return verdicts[0]
    if "beats" in distinct:
        return "mixed"
    return "worse" if "worse" in distinct else "no evidence"
