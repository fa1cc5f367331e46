"""Comparisons to sentences: does an activation probe beat the baselines, in plain words.

One finding per setting and model, from the choice that validation made over all activation probes
and layers (`selection.ANY_ACTIVATION_PROBE`), under the protocol with most test problems. What does
not belong here: computing intervals, and laying sentences out.

Invariant: "beats" is said only where the whole 95 % interval lies above zero and the sign-flip
test, corrected for every comparison that was planned with it, is at 0.05 or below; nothing is
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
    "cannot say": "No interval, so nothing can be said",
}
"""How a verdict is written for readers."""

LEVEL = 0.05
"""A corrected p at or below it counts."""

CORRECTION_LABELS = {
    "holm": "Holm",
    "benjamini_hochberg": "Benjamini-Hochberg",
    "none": "uncorrected",
}
"""How a correction is written for readers."""

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
    shown = headline_rows(selected)
    return [
        _finding(str(setting), str(model), group.to_dicts())
        for (setting, model), group in shown.group_by("setting", "model", maintain_order=True)
    ]


def verdict_of(row: Mapping[str, Any]) -> Verdict:
    """Return what one comparison shows.

    Args:
        row: with delta_low and delta_high, None where there is no interval, and p_adjusted.
    """
    low, high, p = row["delta_low"], row["delta_high"], row["p_adjusted"]
    if low is None or high is None:
        return "cannot say"
    if p is None or p > LEVEL or low <= 0 <= high:
        return "no evidence"
    return "beats" if low > 0 else "worse"


def interval_text(row: Mapping[str, Any]) -> str:
    """Write a difference with its interval, or without one, and its corrected test.

    Args:
        row: with delta, delta_low, delta_high and p_adjusted.
    """
    if row["delta"] is None:
        return "undefined"
    if row["delta_low"] is None:
        return f"{row['delta']:+.3f}, no interval"
    interval = f"95 % interval {row['delta_low']:+.3f} to {row['delta_high']:+.3f}"
    return f"{row['delta']:+.3f}, {interval}, {p_text(row['p_adjusted'])}"


def p_text(p: float | None) -> str:
    """Write a p-value: three digits, or that it is below them.

    Args:
        p: in [0, 1], or None.
    """
    if p is None:
        return "p undefined"
    return "p < 0.001" if p < 0.001 else f"p {p:.3f}"


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
    text = f"{opening} It {'; it '.join(clauses)}.{_corrected(first)}{reasons}"
    return Finding(setting, model, _together(verdicts), text)


def _corrected(row: Mapping[str, Any]) -> str:
    n = row["n_contrasts"]
    if not n or row["correction"] == "none":
        return ""
    name = CORRECTION_LABELS.get(row["correction"], row["correction"])
    planned = "planned comparison" if row["is_planned"] else "comparison"
    return f" p is corrected for {n} {planned}{'s' if n > 1 else ''} ({name})."


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
