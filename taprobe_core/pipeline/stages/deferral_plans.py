"""Deferral plans of one site and trial: which sentences the probe decides, which are deferred."""

from __future__ import annotations

import polars as pl

from taprobe_core.keys import parse_site, parse_trial
from taprobe_core.pipeline.commit import Files, commit_cell
from taprobe_core.pipeline.grid import Cell
from taprobe_core.pipeline.plan import Plan
from taprobe_core.pipeline.stage import Description, Outcome, Stage, cell_by_cell, present
from taprobe_core.pipeline.stages.probe_fits import read_scores


def _make(plan: Plan, cell: Cell) -> Outcome:
    """Tune thresholds on validation and project them onto test, commit.

    Only scores that rank anchors as they are can be cut by thresholds: recipes of a signed target,
    or fitted to residuals, get no plan.

    Raises:
        MissingArtifactError: the fits are not there yet.
        PlanError: no validation sentence to tune on.
    """
    site, trial = parse_site(cell[0]), parse_trial(cell[1])

    def compute() -> Files:
        from taprobe_core.deferral.plans import plan_deferrals

        ranking = [recipe.name for recipe in plan.study.recipes if recipe.ranks_anchors]
        plan.open("probe_fits", cell)
        tables = plan_deferrals(
            read_scores(plan, site, trial).filter(pl.col("recipe").is_in(ranking)),
            plan.read("labels", (site.model, trial.setting), "labels"),
            plan.study.deferral,
        )
        return {"plans": tables.plans, "decisions": tables.decisions}

    return commit_cell(plan, "deferral_plans", cell, compute, {"site": cell[0], "trial": cell[1]})


def _describe(plan: Plan, cell: Cell) -> Description:
    plans = plan.read("deferral_plans", cell, "plans")
    if plans.is_empty():
        return Description({}, 0)
    first = plans.filter(
        protocol=plans["protocol"][0],
        objective=plans["objective"][0],
        objective_value=plans["objective_value"][0],
    )
    metrics: dict[str, float | None] = {}
    for row in first.iter_rows(named=True):
        metrics[f"deferral_rate/{row['recipe']}"] = row["deferral_rate"]
        metrics[f"accepted_error/{row['recipe']}"] = row["accepted_error"]
    return Description(present(metrics), plans.height)


DEFERRAL_PLANS = Stage(
    name="deferral_plans",
    title="Which sentences the probe decides and which go to expensive labelling.",
    grid=("site", "trial"),
    reads=("probe_fits",),
    code_version="1",
    config=lambda plan, cell: plan.study.deferral.model_dump(mode="json"),
    make=cell_by_cell(_make),
    describe=_describe,
    tables={"plans": "PLANS", "decisions": "DECISIONS"},
    op="fit_probes",
)
