"""Rollouts of one model and setting: problems and sentences as published, read and checked."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import polars as pl

from taprobe_core.errors import PlanError
from taprobe_core.pipeline.commit import (
    Files,
    commit_cell,
    contract_faults,
    dataset_provenance,
    warn_of_skipped,
)
from taprobe_core.pipeline.grid import Cell
from taprobe_core.pipeline.plan import Plan
from taprobe_core.pipeline.stage import Check, Description, Found, Outcome, Stage, cell_by_cell

if TYPE_CHECKING:
    from taprobe_core.splits import Fold

_log = logging.getLogger(__name__)


def _config(plan: Plan, cell: Cell) -> dict[str, Any]:
    from taprobe_core.rollouts.parse import SHARES

    model, setting = cell
    rollouts, field = plan.study.rollouts, plan.study.labels.field
    return {
        "content": plan.dataset_version(model, setting),
        "rollouts_dir": plan.model(model).rollouts_dir,
        "setting": setting,
        "on_bad_problem": rollouts.on_bad_problem,
        # Where the label is a measure that is not read otherwise, it decides which are sound.
        **({} if field == SHARES[-1] else {"label_field": field}),
    }


def _make(plan: Plan, cell: Cell) -> Outcome:
    """Read, check, commit.

    Raises:
        DataError: a file that cannot be read, when the study says to fail on a bad problem.
        NotEnoughDataError: no problem can be read.
    """
    model, setting = cell

    def compute() -> Files:
        from taprobe_core.rollouts import read_rollouts

        study = plan.study
        plan.check_dataset(model, setting)
        tables = read_rollouts(
            plan.source, plan.model(model), study.rollouts, setting, study.labels.field
        )
        plan.check_dataset(model, setting)
        for problem_id, note in tables.notes.iter_rows():
            _log.info("rollouts %s/%s: problem %d, null: %s", model, setting, problem_id, note)
        return {
            "problems": tables.problems,
            "sentences": tables.sentences,
            "notes": tables.notes,
            "skipped": warn_of_skipped(tables.skipped, cell),
        }

    return commit_cell(plan, "rollouts", cell, compute, dataset_provenance(plan, model, setting))


def _describe(plan: Plan, cell: Cell) -> Description:
    sentences = plan.read("rollouts", cell, "sentences")
    # Said, word for word, in another problem too.
    n_problems = pl.col("problem_id").n_unique().over("sentence")
    return Description(
        {
            "n_problems": plan.read("rollouts", cell, "problems").height,
            "n_sentences": sentences.height,
            "n_repeated_sentences": int(sentences.select((n_problems > 1).sum()).item()),
            "n_skipped": plan.read("rollouts", cell, "skipped").height,
        },
        sentences.height,
    )


def rollouts_schema(plan: Plan, cell: Cell) -> Found:
    """Problems and sentences keep their contracts; every problem has its sentences."""
    problems = plan.read("rollouts", cell, "problems")
    sentences = plan.read("rollouts", cell, "sentences")
    counted = sentences.group_by("problem_id").agg(found=pl.len().cast(pl.Int64))
    wrong = problems.join(counted, on="problem_id", how="left").filter(
        pl.col("n_sentences") != pl.col("found").fill_null(0)
    )
    return Found(
        (
            *contract_faults(plan, "rollouts", cell, "problems", "sentences"),
            *(
                f"problem_{row['problem_id']}: {row['found']} sentences, "
                f"{row['n_sentences']} stated"
                for row in wrong.iter_rows(named=True)
            ),
        )
    )


def no_trace_on_two_sides(plan: Plan, cell: Cell) -> Found:
    """No two problems on different sides of a fold have the same trace, white space apart."""
    traces = (
        _sentences(plan, cell)
        .group_by("problem_id", maintain_order=True)
        .agg(pl.col("said").str.join(" ").alias("trace"))
    )
    copies = traces.group_by("trace", maintain_order=True).agg("problem_id")
    repeated = [same for same in copies["problem_id"].to_list() if len(same) > 1]
    try:
        folds = _folds(plan, traces["problem_id"].to_list())
    except PlanError as error:
        return Found(not_run=error.what)
    faults = [
        f"problems {', '.join(map(str, same))} have the same trace and stand on different sides of "
        f"{len(apart)} of {len(folds)} folds, first {apart[0]}"
        for same in repeated
        if (apart := [fold for fold in folds if _is_parted(fold, same)])
    ]
    return Found(tuple(faults), numbers={"n_copied_problems": sum(map(len, repeated))})


def passages_differ_across_problems(plan: Plan, cell: Cell) -> Found:
    """At most half of a held-out problem's passages stand word for word in a training problem."""
    from taprobe_core.evaluation.tripwires import duplicates_across_problems

    # Passages of three sentences: of single ones, formulas, the bundled reasoners share half.
    sentences = _sentences(plan, cell)
    try:
        folds = _folds(plan, sentences["problem_id"].unique().to_list())
    except PlanError as error:
        return Found(not_run=error.what)
    before = [pl.col("said").shift(n).over("problem_id").fill_null("") for n in (2, 1)]
    passages = sentences.select("problem_id", passage=pl.concat_str(*before, "said", separator=" "))
    verdict = duplicates_across_problems(
        passages["passage"].rank("dense").cast(pl.Int64).to_numpy(),
        passages["problem_id"].to_numpy(),
        folds,
    )
    numbers = {"n_found": verdict.n_found, "n_passages": verdict.n_rows}
    if verdict.passes:
        return Found(numbers=numbers)
    worst = verdict.worst
    shared = passages.filter(problem_id=worst.source)["passage"]
    copied = passages.filter(pl.col("passage").is_in(shared.implode()), problem_id=worst.problem_id)
    examples = ", ".join(repr(each.strip()[:_SHOWN]) for each in copied["passage"][:_EXAMPLES])
    fault = (
        f"{verdict.n_found} of {verdict.n_rows} held-out passages of three sentences stand in a "
        f"training problem. Most are in problem {worst.problem_id}, {worst.protocol} fold "
        f"{worst.fold}: {worst.n_found} of {worst.n_rows}, and problem {worst.source} has the most "
        f"of them, such as {examples}"
    )
    return Found((fault,), numbers=numbers)


_SHOWN, _EXAMPLES = 80, 2
"""Characters of an example, and how many there are."""


def _sentences(plan: Plan, cell: Cell) -> pl.DataFrame:
    """problem_id, sentence_idx and `said`: the sentence with single spaces, in reading order."""
    table = plan.read("rollouts", cell, "sentences")
    said = pl.col("sentence").str.strip_chars().str.replace_all(r"\s+", " ").alias("said")
    return table.sort("problem_id", "sentence_idx").select("problem_id", "sentence_idx", said)


def _folds(plan: Plan, present: list[int]) -> list[Fold]:
    """The study's folds of the problems that are there; PlanError where they are too few."""
    from taprobe_core.splits import make_folds

    return make_folds(plan.problem_ids(), plan.study.splits, present=present)


def _is_parted(fold: Fold, problems: list[int]) -> bool:
    """Whether a fold has some of the problems on one side, and others on another."""
    from taprobe_core.splits import SIDES

    return sum(not set(problems).isdisjoint(getattr(fold, side)) for side in SIDES) > 1


def _decided_by_folds(plan: Plan) -> dict[str, Any]:
    return {"folds": plan.folds_config()}


ROLLOUTS = Stage(
    name="rollouts",
    title="Problems and sentences of one model and setting, as published, checked.",
    grid=("model", "setting"),
    reads=(),
    code_version="3",
    config=_config,
    make=cell_by_cell(_make),
    describe=_describe,
    tables={
        "problems": "PROBLEMS",
        "sentences": "SENTENCES",
        "notes": "NOTES",
        "skipped": "SKIPPED",
    },
    checks={
        "rollouts_schema": Check(rollouts_schema),
        "no_trace_on_two_sides": Check(
            no_trace_on_two_sides,
            fix="keep one of the problems with rollouts.problem_ids",
            settings=_decided_by_folds,
        ),
        "passages_differ_across_problems": Check(
            passages_differ_across_problems,
            fix="look whether one of the two problems is a copy of the other in part",
            is_blocking=False,
            settings=_decided_by_folds,
        ),
    },
    op="read_rollouts",
    is_provenance=True,
)
