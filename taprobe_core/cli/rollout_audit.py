"""`taprobe audit-rollouts`: what is wrong with a study's rollouts and the labels beside them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from taprobe_core.cli.app import (
    EXIT_UNSOUND,
    JsonOption,
    StudyArgument,
    app,
    out,
    print_frame,
)

if TYPE_CHECKING:
    from taprobe_core.labels.audit import RolloutAudit

_SHOWN = 50
"""Findings for a reader; `--json` prints them all."""


@app.command(name="audit-rollouts")
def audit_rollouts_(
    study: StudyArgument = None,
    trigram: Annotated[
        bool,
        typer.Option(
            help="The labels were made with the demo's similarity: recompute counterfactual "
            "measures too. Always on where the study's source is the demo or its policy."
        ),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Read all rollouts of a study; name failed, empty and missing ones, and labels that differ."""
    from taprobe_core.labels.audit import INFORMATIONAL, audit_rollouts
    from taprobe_core.labels.measures import trigram_masked_dissimilar
    from taprobe_core.pipeline import open_plan

    plan = open_plan(study)
    chosen = plan.study.rollouts
    is_own = trigram or chosen.source.kind in {"demo", "policy"}
    model_dirs = sorted({model.rollouts_dir for model in plan.study.models.values()})
    audit = audit_rollouts(
        plan.source,
        chosen,
        model_dirs,
        plan.study.settings,
        trigram_masked_dissimilar if is_own else None,
        plan.study.labels.field,
    )
    if as_json:
        parts = {name: frame.to_dicts() for name, frame in audit._asdict().items()}
        out.print_json(json.dumps(parts))
    else:
        _print(audit)
    if not set(audit.findings["kind"]) <= INFORMATIONAL:
        raise typer.Exit(EXIT_UNSOUND)


def _print(audit: RolloutAudit) -> None:
    import polars as pl

    findings, coverage = audit
    print_frame(coverage, "rollouts read")
    if coverage["n_banks"].min() == 0:
        out.print("note: where n_banks is 0, the folder holds labels without rollouts")
    for row in findings.head(_SHOWN).iter_rows(named=True):
        out.print(f"[red]{row['kind']}[/] {escape(row['file'])}\n  {escape(row['detail'])}")
    if len(findings) > _SHOWN:
        out.print(f"... and {len(findings) - _SHOWN} more, all of them with --json")
        counts = findings.group_by("kind").agg(
            pl.len().alias("n_findings"), pl.struct("model", "setting", "problem_id").n_unique()
        )
        print_frame(counts.rename({"model": "n_problems"}).sort("kind"), "findings by kind")
    out.print(f"{len(findings)} findings in {coverage['n_problems'].sum()} problems")
