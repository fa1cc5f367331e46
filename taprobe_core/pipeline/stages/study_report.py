"""Study report: everything a study found, gathered from the store onto one page."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import polars as pl

from taprobe_core.errors import TaprobeError, attempted
from taprobe_core.keys import Site, Trial
from taprobe_core.pipeline.commit import Files, commit_cell
from taprobe_core.pipeline.grid import Cell
from taprobe_core.pipeline.plan import Plan
from taprobe_core.pipeline.stage import Description, Outcome, Stage, cell_by_cell
from taprobe_core.pipeline.stages.evaluation import read_evaluation
from taprobe_core.pipeline.stages.probe_fits import FITS, read_scores, unconverged
from taprobe_core.store import library_versions
from taprobe_core.study import SPEED_ONLY, StandInCheckpoint

if TYPE_CHECKING:
    from taprobe_core.pipeline.verdicts import Verdict
    from taprobe_core.report.page import CheckSummary, Example, ReportData

_FILE = "report.html"


def _config(plan: Plan, cell: Cell) -> dict[str, Any]:
    return {
        **plan.study.model_dump(mode="json", exclude={"activations": set(SPEED_ONLY)}),
        "checks": plan.stages.check_versions(),
    }


def _make(plan: Plan, cell: Cell) -> Outcome:
    """Write the page, commit.

    Raises:
        MissingArtifactError: the leaderboard, or what it ranks, is not there yet.
    """

    def compute() -> Files:
        from taprobe_core.report.page import render_report

        return {_FILE: render_report(_gather(plan))}

    return commit_cell(plan, "study_report", cell, compute, {"study": plan.study.name})


def _describe(plan: Plan, cell: Cell) -> Description:
    artifact = plan.open("study_report", cell)
    return Description({"size_bytes": artifact.manifest.files[_FILE].size_bytes})


def _gather(plan: Plan) -> ReportData:
    from taprobe_core.evaluation.selection import select_on_validation
    from taprobe_core.report.findings import diagnose
    from taprobe_core.report.page import ReportData

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
        leaderboard=plan.read("leaderboard", (), "leaderboard"),
        selected=selected,
        plans=_plans(plan, cells),
        skipped=_skipped(plan),
        example=_example(plan, selected),
        figures=_figures(plan),
        diagnostics=diagnose(evaluations, recipes=study.recipes),
        versions=library_versions(),
        fingerprints=_fingerprints(plan),
        checks=_checks(plan),
        failed=_failed(plan),
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
        plan.read("evaluation", (str(site), setting), "plans").with_columns(
            setting=pl.lit(setting),
            model=pl.lit(site.model),
            layer=pl.lit(site.layer, pl.Int64),
        )
        for site, setting in cells
    )


def _skipped(plan: Plan) -> pl.DataFrame:
    """Problems left out, by whichever stage."""
    return pl.concat(
        plan.read(stage, cell, "skipped").with_columns(
            model=pl.lit(cell[0]), setting=pl.lit(cell[1])
        )
        for stage in plan.stages.that_skip()
        for cell in plan.stages.cells(plan.study, stage)
    )


def _example(plan: Plan, selected: pl.DataFrame) -> Example | None:
    """The first test problem, scored by a probe that validation chose."""
    from taprobe_core.report.page import Example

    if selected.is_empty():
        return None
    row = selected.row(0, named=True)
    recipe, _, layer = str(row["chosen"][0]).rpartition("@L")
    site, setting, protocol = Site(row["model"], int(layer)), row["setting"], row["protocol"]
    scores = read_scores(plan, site, Trial(setting, plan.study.seeds[0])).filter(
        recipe=recipe, protocol=protocol, split="test"
    )
    problem_id = scores["problem_id"].min()
    of_model = (site.model, setting)
    labels = plan.read("labels", of_model, "labels")
    on = ["problem_id", "sentence_idx"]
    sentences = (
        plan.read("rollouts", of_model, "sentences")
        .filter(problem_id=problem_id)
        .select(*on, "sentence")
        .join(labels.drop("function_tag"), on=on, maintain_order="left")
        .join(scores.select(*on, "score"), on=on, how="left", maintain_order="left")
    )
    problems = plan.read("rollouts", of_model, "problems")
    return Example(
        title=f"{site.model}, {setting}, problem {problem_id!s}",
        recipe=f"{recipe}@L{site.layer:02d}",
        problem=problems.filter(problem_id=problem_id)["problem"][0],
        sentences=sentences,
    )


def _figures(plan: Plan) -> dict[str, bytes]:
    from taprobe_core.report import plots

    return {
        f"labels of {model}, {setting}": plots.importance_histogram(
            plan.read("labels", (model, setting), "labels"),
            title=f"{model} · {setting}",
        )
        for model in plan.study.models
        for setting in plan.study.settings
    }


def _fingerprints(plan: Plan) -> pl.DataFrame:
    rows = [
        plan.key(name, cell)
        for name, stage in plan.stages.items()
        if stage.is_provenance
        for cell in plan.stages.cells(plan.study, name)
    ]
    return pl.DataFrame(
        {
            "stage": [key.stage for key in rows],
            "partition": ["/".join(key.partition) for key in rows],
            "fingerprint": [key.fingerprint for key in rows],
        }
    )


def _failed(plan: Plan) -> pl.DataFrame:
    """What failed beside the report's own inputs, for example cells of a sweep."""
    from taprobe_core.pipeline.failures import kept_failures

    return pl.DataFrame(
        [
            {"stage": each.stage, "cell": each.place, "what": each.details, "fix": each.fix}
            for each in kept_failures(plan)
            if each.stage != "study_report"
        ]
    )


def _checks(plan: Plan) -> CheckSummary:
    """Say what every check of a study finds in every cell that is stored."""
    from taprobe_core.pipeline.run import stage_verdicts
    from taprobe_core.report.page import CheckSummary

    counts, verdicts = [], []
    for stage in plan.stages.of(plan.study):
        for name, check in plan.stages[stage].checks.items():
            found = stage_verdicts(plan, stage, name)
            states = [_state(each) for each in found]
            n_cells = sum(
                check.looks_at(plan, cell) for cell in plan.stages.cells(plan.study, stage)
            )
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
        pl.DataFrame(counts),
        pl.concat([_faults(verdicts), *_unconverged(plan)], how="diagonal"),
        _waivers(plan, verdicts),
        _not_run(verdicts),
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


def _unconverged(plan: Plan) -> list[pl.DataFrame]:
    """Linear models that are not within their tolerance, as warnings, a row for each cell."""
    found = []
    for name in plan.stages.of(plan.study):
        if plan.stages[name].part is not FITS:
            continue
        for cell in plan.stages.cells(plan.study, name):
            key = attempted(partial(plan.key, name, cell), name)
            index = None if isinstance(key, TaprobeError) else plan.store.find(key)
            if index is None:
                continue
            for table in unconverged(plan, index).tables.values():
                what = table.select(
                    pl.format(
                        "{}, {}: relative error up to {}",
                        "recipe",
                        "fold",
                        pl.col("error_bound").round_sig_figs(2),
                    )
                ).to_series()
                row = {
                    "state": "warning",
                    "check": "convergence",
                    "asset": name,
                    "cell": "/".join(cell),
                    "what": "; ".join(what),
                    "artifact": str(index.key),
                    "fix": "their scores are used; raise regularization, or leave them out",
                }
                found.append(pl.DataFrame([row]))
    return found


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


STUDY_REPORT = Stage(
    name="study_report",
    title="One self-contained page: results, pictures, skipped problems, provenance.",
    grid=(),
    reads=("leaderboard",),
    code_version="6",
    config=_config,
    make=cell_by_cell(_make),
    describe=_describe,
    tables={},
    op="publish_study",
)
