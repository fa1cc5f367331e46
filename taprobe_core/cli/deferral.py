"""`taprobe plan`: one site and trial's deferral plan, as thresholds and as a list to relabel."""

from __future__ import annotations

from typing import Annotated

import typer

from taprobe_core.cli.app import JsonOption, StudyOption, app, checked_cell, print_frame
from taprobe_core.errors import ConfigError

_SHOWN = (
    "recipe",
    "objective",
    "objective_value",
    "deferral_rate",
    "accepted_error",
    "all_negative_error",
    "n_anchors",
    "n_missed_anchors",
    "n_banks",
    "n_banks_all",
    "meets_objective_on_test",
)
"""Columns for a reader; `--json` prints them all."""


@app.command(name="plan")
def plan_(
    site: Annotated[str, typer.Argument(help="model@Lnn")],
    trial: Annotated[str, typer.Argument(help="setting@snn")],
    recipe: Annotated[str, typer.Option(help="Whose plan to list sentence by sentence.")] = "",
    protocol: Annotated[str, typer.Option(help="holdout or lopo.")] = "holdout",
    study: StudyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show deferral plans; with --recipe, the runs of sentences to relabel."""
    import polars as pl

    from taprobe_core.deferral.plans import relabel_runs
    from taprobe_core.pipeline import key_of, open_plan

    plan = open_plan(study)
    key = key_of(plan, "deferral_plans", checked_cell(plan, "deferral_plans", (site, trial)))
    artifact = plan.store.open(key)
    if not recipe:
        plans = artifact.read_table("plans.parquet").filter(protocol=protocol)
        shown = plans if as_json else plans.select(_SHOWN)
        print_frame(shown, f"deferral plans of {site} {trial} ({protocol})", as_json)
        return
    decisions = artifact.read_table("decisions.parquet").filter(
        pl.col("recipe") == recipe, pl.col("protocol") == protocol
    )
    if decisions.is_empty():
        known = artifact.read_table("plans.parquet")["recipe"].unique().sort().to_list()
        raise ConfigError(
            f"no plan of recipe {recipe!r} under {protocol!r}",
            f"{site} {trial}",
            f"use one of the recipes {', '.join(known)} and a protocol of the study",
        )
    print_frame(relabel_runs(decisions), f"sentences to relabel: {recipe} ({protocol})", as_json)
