"""Deferral plans, evaluation and leaderboard: from scores to what a reader may conclude."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import polars as pl

from taprobe_core.deferral import plan_deferrals
from taprobe_core.evaluation import EvaluationTables, evaluate
from taprobe_core.keys import Site, Trial
from taprobe_core.leaderboard import build_leaderboard
from taprobe_core.pipeline.fit import read_control_scores, read_scores
from taprobe_core.pipeline.outcome import Outcome, commit_once
from taprobe_core.pipeline.plan import Plan
from taprobe_core.store import write_table

EVALUATION_TABLES = tuple(field.name for field in fields(EvaluationTables))


def _labels(plan: Plan, site: Site, setting: str) -> pl.DataFrame:
    return plan.store.open(plan.labels(site.model, setting)).read_table("labels.parquet")


def ensure_deferral_plans(plan: Plan, site: Site, trial: Trial) -> Outcome:
    """Tune and project one site and trial's deferral plans: tables `plans`, `decisions`.

    Only scores that rank anchors as they are can be cut by thresholds: recipes of a signed target,
    or fitted to residuals, get no plan.

    Raises:
        MissingArtifactError: the fits are not there yet.
        PlanError: no validation sentence to tune on.
    """
    fits = plan.probe_fits(site, trial)
    ranking = [recipe.name for recipe in plan.study.recipes if recipe.ranks_anchors]

    def write(folder: Path) -> None:
        plan.store.open(fits)
        tables = plan_deferrals(
            read_scores(plan, site, trial).filter(pl.col("recipe").is_in(ranking)),
            _labels(plan, site, trial.setting),
            plan.study.deferral,
        )
        write_table(folder / "plans.parquet", tables.plans)
        write_table(folder / "decisions.parquet", tables.decisions)

    provenance = {"site": str(site), "trial": str(trial)}
    return commit_once(plan, plan.deferral_plans(site, trial), write, provenance, [fits])


def ensure_evaluation(plan: Plan, site: Site, setting: str) -> Outcome:
    """Evaluate one site and setting over all seeds.

    The tables of `EvaluationTables`, and `plans`.

    Raises:
        MissingArtifactError: a trial's fits or plans are not there yet.
    """
    trials, recipes = [Trial(setting, seed) for seed in plan.study.seeds], plan.study.recipes
    upstream = [
        *(plan.probe_fits(site, trial) for trial in trials),
        *(plan.deferral_plans(site, trial) for trial in trials),
    ]

    def write(folder: Path) -> None:
        for key in upstream:
            plan.store.open(key)
        tables = evaluate(
            {trial.seed: read_scores(plan, site, trial) for trial in trials},
            _labels(plan, site, setting),
            plan.study.evaluation,
            {recipe.name: recipe.target or plan.study.probes.target for recipe in recipes},
            {recipe.name: recipe.residualize for recipe in recipes},
            {trial.seed: read_control_scores(plan, site, trial) for trial in trials},
        )
        plans = pl.concat(
            plan.store.open(plan.deferral_plans(site, trial))
            .read_table("plans.parquet")
            .with_columns(seed=pl.lit(trial.seed, pl.Int64))
            for trial in trials
        )
        for name in EVALUATION_TABLES:
            write_table(folder / f"{name}.parquet", getattr(tables, name))
        write_table(folder / "plans.parquet", plans)

    provenance = {"site": str(site), "setting": setting, "seeds": list(plan.study.seeds)}
    return commit_once(plan, plan.evaluation(site, setting), write, provenance, upstream)


def read_evaluation(plan: Plan, site: Site, setting: str) -> EvaluationTables:
    """Read one site and setting's evaluation.

    Raises:
        MissingArtifactError: it is not there yet.
    """
    artifact = plan.store.open(plan.evaluation(site, setting))
    return EvaluationTables(
        **{name: artifact.read_table(f"{name}.parquet") for name in EVALUATION_TABLES}
    )


def ensure_leaderboard(plan: Plan) -> Outcome:
    """Rank every recipe of the study: table `leaderboard`.

    Raises:
        MissingArtifactError: an evaluation is not there yet.
    """
    cells = [(site, setting) for site in plan.study.sites for setting in plan.study.settings]

    def write(folder: Path) -> None:
        board = build_leaderboard(
            [(site, setting, read_evaluation(plan, site, setting)) for site, setting in cells],
            recipes=plan.study.recipes,
        )
        write_table(folder / "leaderboard.parquet", board)

    return commit_once(
        plan,
        plan.leaderboard(),
        write,
        {"study": plan.study.name},
        [plan.evaluation(site, setting) for site, setting in cells],
    )
