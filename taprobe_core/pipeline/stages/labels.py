"""Labels of one model and setting: which sentences are anchors, how important, and how surely."""

from __future__ import annotations

import polars as pl

from taprobe_core.pipeline.commit import (
    Files,
    commit_cell,
    contract_faults,
    dataset_provenance,
    warn_of_skipped,
)
from taprobe_core.pipeline.grid import Cell
from taprobe_core.pipeline.plan import Plan
from taprobe_core.pipeline.stage import (
    Check,
    Description,
    Found,
    Outcome,
    Stage,
    cell_by_cell,
    mean,
    median,
    present,
)


def _make(plan: Plan, cell: Cell) -> Outcome:
    """Make labels of the sentences' published measures, commit.

    Raises:
        MissingArtifactError: the rollouts are not there yet.
        LabelError: a sentence has no published measure to label it by, when the study says to fail
            on a bad problem.
        NotEnoughDataError: no problem can be labelled.
    """

    def compute() -> Files:
        from taprobe_core.labels.make import make_labels, unlabelled
        from taprobe_core.rollouts import max_rollouts

        sentences = plan.read("rollouts", cell, "sentences")
        rollouts, labels = plan.study.rollouts, plan.study.labels
        made = make_labels(sentences, labels, max_rollouts(rollouts), rollouts.on_bad_problem)
        return {"labels": made, "skipped": warn_of_skipped(unlabelled(sentences, labels), cell)}

    provenance = {
        **dataset_provenance(plan, *cell),
        **plan.study.labels.model_dump(mode="json"),
    }
    return commit_cell(plan, "labels", cell, compute, provenance)


def _describe(plan: Plan, cell: Cell) -> Description:
    from taprobe_core.report import plots

    labels = plan.read("labels", cell, "labels")
    metrics = {
        "n_sentences": labels.height,
        "n_skipped": plan.read("labels", cell, "skipped").height,
        "n_anchors": int(labels["is_anchor"].sum()),
        "mean_importance_abs": mean(labels["importance_abs"]),
        "median_importance_se": median(labels["importance_se"]),
        **{
            f"n_{status}": count
            for status, count in labels["label_status"].cast(pl.String).value_counts().iter_rows()
        },
    }
    picture = plots.importance_by_position(labels, title=" · ".join(cell))
    return Description(present(metrics), labels.height, plots.to_data_uri(picture))


def labels_schema(plan: Plan, cell: Cell) -> Found:
    """Labels keep their contract."""
    return Found(tuple(contract_faults(plan, "labels", cell, "labels")))


LABELS = Stage(
    name="labels",
    title="Anchors and importance per sentence, with counts, standard error and status.",
    grid=("model", "setting"),
    reads=("rollouts",),
    code_version="2",
    config=lambda plan, cell: plan.study.labels.model_dump(mode="json"),
    make=cell_by_cell(_make),
    describe=_describe,
    tables={"labels": "LABELS", "skipped": "SKIPPED"},
    checks={"labels_schema": Check(labels_schema)},
    op="read_rollouts",
    is_provenance=True,
)
