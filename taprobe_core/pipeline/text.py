"""Rollouts, labels and spans of one model and setting: read, check, commit."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import polars as pl

from taprobe_core.checkpoints import load_tokenizer
from taprobe_core.labels import make_labels, unlabelled
from taprobe_core.pipeline.outcome import Outcome, commit_once
from taprobe_core.pipeline.plan import Plan
from taprobe_core.pipeline.sources import NO_BOS
from taprobe_core.rollouts import max_rollouts, read_rollouts
from taprobe_core.spans import make_spans
from taprobe_core.store import write_table

_log = logging.getLogger(__name__)


def dataset_provenance(plan: Plan, model: str, setting: str) -> dict[str, Any]:
    """Which dataset, at which revision or content digest, a result descends from."""
    return {
        **{f"dataset_{name}": value for name, value in plan.source.identity().items()},
        "rollouts_dir": plan.model(model).rollouts_dir,
        "sampling": plan.study.rollouts.sampling,
        "setting": setting,
    }


def ensure_rollouts(plan: Plan, model: str, setting: str) -> Outcome:
    """Read one model and setting's rollouts: tables `problems`, `sentences`, `skipped`, `notes`.

    Raises:
        DataError: a file that cannot be read, when the study says to fail on a bad problem.
        NotEnoughDataError: no problem can be read.
    """

    def write(folder: Path) -> None:
        study = plan.study
        plan.check_dataset(model, setting)
        tables = read_rollouts(
            plan.source, plan.model(model), study.rollouts, setting, study.labels.field
        )
        plan.check_dataset(model, setting)
        write_table(folder / "problems.parquet", tables.problems)
        write_table(folder / "sentences.parquet", tables.sentences)
        write_table(folder / "notes.parquet", tables.notes)
        _write_skipped(folder, tables.skipped, model, setting)
        for problem_id, note in tables.notes.iter_rows():
            _log.info("rollouts %s/%s: problem %d, null: %s", model, setting, problem_id, note)

    key = plan.rollouts(model, setting)
    return commit_once(plan, key, write, dataset_provenance(plan, model, setting))


def ensure_labels(plan: Plan, model: str, setting: str) -> Outcome:
    """Make one model and setting's labels: tables `labels`, `skipped`.

    Raises:
        MissingArtifactError: the rollouts are not there yet.
        LabelError: a sentence has no published measure to label it by, when the study says to fail
            on a bad problem.
        NotEnoughDataError: no problem can be labelled.
    """
    rollouts = plan.rollouts(model, setting)

    def write(folder: Path) -> None:
        sentences = plan.store.open(rollouts).read_table("sentences.parquet")
        chosen = plan.study.rollouts
        labels = make_labels(
            sentences, plan.study.labels, max_rollouts(chosen), chosen.on_bad_problem
        )
        write_table(folder / "labels.parquet", labels)
        _write_skipped(folder, unlabelled(sentences, plan.study.labels), model, setting)

    provenance = {
        **dataset_provenance(plan, model, setting),
        **plan.study.labels.model_dump(mode="json"),
    }
    return commit_once(plan, plan.labels(model, setting), write, provenance, [rollouts])


def ensure_spans(plan: Plan, model: str, setting: str) -> Outcome:
    """Place one model and setting's sentences: tables `texts`, `spans`, `skipped`.

    Raises:
        MissingArtifactError: the rollouts are not there yet.
        SpanError: a sentence cannot be placed, or a text is too long for the model, when the study
            says to fail on a bad problem.
        NotEnoughDataError: no problem is left.
        ModelError: the tokenizer cannot be used.
    """
    rollouts = plan.rollouts(model, setting)

    def write(folder: Path) -> None:
        source = plan.store.open(rollouts)
        tokenizer, _ = load_tokenizer(plan.model(model))
        plan.check_model(model)
        tables = make_spans(
            source.read_table("problems.parquet"),
            source.read_table("sentences.parquet"),
            tokenizer,
            text_view=plan.study.spans.text_view,
            on_bad_problem=plan.study.rollouts.on_bad_problem,
            max_tokens=plan.context_length(model),
        )
        write_table(folder / "texts.parquet", tables.texts)
        write_table(folder / "spans.parquet", tables.spans)
        _write_skipped(folder, tables.skipped, model, setting)

    provenance = {
        **dataset_provenance(plan, model, setting),
        "text_view": plan.study.spans.text_view,
        "tokenizer_sha256": plan.checkpoint(model)["tokenizer_sha256"],
        "bos": plan.bos_token(model) or NO_BOS,
    }
    return commit_once(plan, plan.spans(model, setting), write, provenance, [rollouts])


def _write_skipped(folder: Path, skipped: pl.DataFrame, model: str, setting: str) -> None:
    write_table(folder / "skipped.parquet", skipped)
    for row in skipped.iter_rows(named=True):
        place = f"{row['stage']} {model}/{setting}"
        _log.warning("%s: problem %d left out: %s", place, row["problem_id"], row["what"])
