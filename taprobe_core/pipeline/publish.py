"""The study report: everything a study found, gathered from the store onto one page."""

from __future__ import annotations

from pathlib import Path

import polars as pl

from taprobe_core import plots
from taprobe_core.diagnostics import diagnose
from taprobe_core.keys import Site, Trial
from taprobe_core.pipeline.cells import cells_of, key_of
from taprobe_core.pipeline.check_summary import summarise_checks
from taprobe_core.pipeline.fit import read_scores
from taprobe_core.pipeline.judge import read_evaluation
from taprobe_core.pipeline.outcome import Outcome, commit_once
from taprobe_core.pipeline.plan import Plan
from taprobe_core.report import Example, ReportData, render_report
from taprobe_core.selection import select_on_validation
from taprobe_core.store import library_versions
from taprobe_core.study import StandInCheckpoint

_FINGERPRINTED = (
    "rollouts",
    "labels",
    "spans",
    "activations",
    "vertical_attention",
    "receiver_heads",
    "leaderboard",
)
"""Stages whose fingerprints the report lists, as far as the study has them."""


def ensure_study_report(plan: Plan) -> Outcome:
    """Write the study's report: file `report.html`.

    Raises:
        MissingArtifactError: the leaderboard, or what it ranks, is not there yet.
    """

    def write(folder: Path) -> None:
        page = render_report(_gather(plan))
        (folder / "report.html").write_text(page, encoding="utf-8")

    provenance = {"study": plan.study.name}
    return commit_once(plan, plan.study_report(), write, provenance, [plan.leaderboard()])


def _gather(plan: Plan) -> ReportData:
    study = plan.study
    cells = [(site, setting) for site in study.sites for setting in study.settings]
    evaluations = [(site, setting, read_evaluation(plan, site, setting)) for site, setting in cells]
    selected = select_on_validation(evaluations, recipes=study.recipes, evaluation=study.evaluation)
    return ReportData(
        study=study.name,
        description=study.description,
        target=study.probes.target,
        dataset=plan.source.identity(),
        settings=study.settings,
        models=_models(plan),
        untrained_models=tuple(
            key
            for key, model in study.models.items()
            if isinstance(model.checkpoint, StandInCheckpoint)
        ),
        leaderboard=plan.store.open(plan.leaderboard()).read_table("leaderboard.parquet"),
        selected=selected,
        plans=_plans(plan, cells),
        skipped=_skipped(plan),
        example=_example(plan, selected),
        figures=_figures(plan),
        diagnostics=diagnose(evaluations, recipes=study.recipes),
        versions=library_versions(),
        fingerprints=_fingerprints(plan),
        checks=summarise_checks(plan),
    )


def _models(plan: Plan) -> pl.DataFrame:
    return pl.DataFrame(
        [
            {
                "model": key,
                "checkpoint": model.checkpoint.description,
                "layers": model.n_layers,
                "layers read": len(model.layer_indices),
                "tokenizer": plan.checkpoint(key)["tokenizer_sha256"][:12],
            }
            for key, model in plan.study.models.items()
        ]
    )


def _plans(plan: Plan, cells: list[tuple[Site, str]]) -> pl.DataFrame:
    return pl.concat(
        plan.store.open(plan.evaluation(site, setting))
        .read_table("plans.parquet")
        .with_columns(
            setting=pl.lit(setting),
            model=pl.lit(site.model),
            layer=pl.lit(site.layer, pl.Int64),
        )
        for site, setting in cells
    )


def _skipped(plan: Plan) -> pl.DataFrame:
    """Problems left out by rollouts, labels and spans."""
    return pl.concat(
        plan.store.open(key_of(plan, stage, cell))
        .read_table("skipped.parquet")
        .with_columns(model=pl.lit(cell[0]), setting=pl.lit(cell[1]))
        for stage in ("rollouts", "labels", "spans")
        for cell in cells_of(plan.study, stage)
    )


def _example(plan: Plan, selected: pl.DataFrame) -> Example | None:
    """The first test problem, scored by a probe that validation chose."""
    if selected.is_empty():
        return None
    row = selected.row(0, named=True)
    recipe, _, layer = str(row["chosen"][0]).rpartition("@L")
    site, setting, protocol = Site(row["model"], int(layer)), row["setting"], row["protocol"]
    scores = read_scores(plan, site, Trial(setting, plan.study.seeds[0])).filter(
        recipe=recipe, protocol=protocol, split="test"
    )
    problem_id = scores["problem_id"].min()
    labels = plan.store.open(plan.labels(site.model, setting)).read_table("labels.parquet")
    rollouts = plan.store.open(plan.rollouts(site.model, setting))
    on = ["problem_id", "sentence_idx"]
    sentences = (
        rollouts.read_table("sentences.parquet")
        .filter(problem_id=problem_id)
        .select(*on, "sentence")
        .join(labels.drop("function_tag"), on=on, maintain_order="left")
        .join(scores.select(*on, "score"), on=on, how="left", maintain_order="left")
    )
    problem = rollouts.read_table("problems.parquet").filter(problem_id=problem_id)["problem"][0]
    return Example(
        title=f"{site.model}, {setting}, problem {problem_id!s}",
        recipe=f"{recipe}@L{site.layer:02d}",
        problem=problem,
        sentences=sentences,
    )


def _figures(plan: Plan) -> dict[str, bytes]:
    return {
        f"labels of {model}, {setting}": plots.importance_histogram(
            plan.store.open(plan.labels(model, setting)).read_table("labels.parquet"),
            title=f"{model} · {setting}",
        )
        for model in plan.study.models
        for setting in plan.study.settings
    }


def _fingerprints(plan: Plan) -> pl.DataFrame:
    rows = [
        key_of(plan, stage, cell)
        for stage in _FINGERPRINTED
        for cell in cells_of(plan.study, stage)
    ]
    return pl.DataFrame(
        {
            "stage": [key.stage for key in rows],
            "partition": ["/".join(key.partition) for key in rows],
            "fingerprint": [key.fingerprint for key in rows],
        }
    )
