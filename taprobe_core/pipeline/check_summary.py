"""What the checks of a study found, as tables for its report."""

from __future__ import annotations

import polars as pl

from taprobe_core.pipeline.cells import cells_of, stages_of
from taprobe_core.pipeline.checks import CHECKS
from taprobe_core.pipeline.gate import stage_verdicts
from taprobe_core.pipeline.plan import Plan
from taprobe_core.pipeline.verdicts import Verdict
from taprobe_core.report import CheckSummary


def summarise_checks(plan: Plan) -> CheckSummary:
    """Say what every check of a study finds in every cell that is stored."""
    counts, verdicts = [], []
    for stage in stages_of(plan.study):
        for name, check in CHECKS.get(stage, {}).items():
            found = stage_verdicts(plan, stage, name)
            states = [_state(each) for each in found]
            n_cells = sum(check.looks_at(plan, cell) for cell in cells_of(plan.study, stage))
            n_failed = sum(state in ("failed", "warning") for state in states)
            n_passed, n_waived = states.count("passed"), states.count("waived")
            counts.append(
                {
                    "asset": stage,
                    "check": name,
                    "a fault": "stops" if check.is_blocking else "warns",
                    "passed": n_passed,
                    "failed": n_failed,
                    "waived": n_waived,
                    "not run": n_cells - n_passed - n_failed - n_waived,
                }
            )
            verdicts += found
    return CheckSummary(
        pl.DataFrame(counts), _faults(verdicts), _waivers(plan, verdicts), _not_run(verdicts)
    )


def _state(verdict: Verdict) -> str:
    if verdict.status != "failed":
        return verdict.status
    if verdict.waiver is not None:
        return "waived"
    return "failed" if verdict.is_blocking else "warning"


def _faults(verdicts: list[Verdict]) -> pl.DataFrame:
    return pl.DataFrame(
        [
            {
                "state": _state(each),
                "check": each.check,
                "asset": each.stage,
                "cell": each.place,
                "what": "; ".join(each.faults),
                "artifact": each.artifact,
                "fix": each.fix,
                "reason": each.waiver.reason if each.waiver else None,
            }
            for each in verdicts
            if each.status == "failed"
        ],
        schema_overrides={"reason": pl.String},
    )


def _waivers(plan: Plan, verdicts: list[Verdict]) -> pl.DataFrame:
    failed = {(each.check, each.place) for each in verdicts if each.status == "failed"}
    return pl.DataFrame(
        [
            {
                "check": waiver.check,
                "cell": waiver.cell,
                "reason": waiver.reason,
                "state": "failed, goes on"
                if (waiver.check, waiver.cell) in failed
                else "not needed: nothing failed",
            }
            for waiver in plan.study.waivers
        ]
    )


def _not_run(verdicts: list[Verdict]) -> pl.DataFrame:
    return pl.DataFrame(
        [
            {"check": each.check, "cell": each.place, "reason": each.note}
            for each in verdicts
            if each.status == "not_run"
        ]
    )
