"""What must hold of a stored artifact: read it back, hash and all, and look.

Stages refuse to commit what breaks these, so a fault here means that something else changed the
store or that a stage is defective. Each check returns its faults in words; none is an empty list.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import polars as pl

from taprobe_core.errors import TaprobeError
from taprobe_core.keys import parse_site, parse_trial
from taprobe_core.pipeline.cells import Cell
from taprobe_core.pipeline.fit import read_activations, read_scores
from taprobe_core.pipeline.plan import Plan
from taprobe_core.spans import cover_faults
from taprobe_core.splits import check_no_leakage, make_folds
from taprobe_core.tables import LABELS, PROBLEMS, SENTENCES, SPANS, TEXTS, check_table

Check = Callable[[Plan, Cell], list[str]]


def rollouts_schema(plan: Plan, cell: Cell) -> list[str]:
    """Problems and sentences keep their contracts; every problem has its sentences."""
    artifact = plan.store.open(plan.rollouts(*cell))
    problems = artifact.read_table("problems.parquet")
    sentences = artifact.read_table("sentences.parquet")
    faults = [
        *_contract(problems, PROBLEMS, "problems"),
        *_contract(sentences, SENTENCES, "sentences"),
    ]
    counted = sentences.group_by("problem_id").agg(found=pl.len().cast(pl.Int64))
    wrong = problems.join(counted, on="problem_id", how="left").filter(
        pl.col("n_sentences") != pl.col("found").fill_null(0)
    )
    return faults + [
        f"problem_{row['problem_id']}: {row['found']} sentences, {row['n_sentences']} stated"
        for row in wrong.iter_rows(named=True)
    ]


def labels_schema(plan: Plan, cell: Cell) -> list[str]:
    """Labels keep their contract."""
    labels = plan.store.open(plan.labels(*cell)).read_table("labels.parquet")
    return _contract(labels, LABELS, "labels")


def spans_cover(plan: Plan, cell: Cell) -> list[str]:
    """Every sentence has its span, and the spans' text is the sentence, blanks apart."""
    artifact = plan.store.open(plan.spans(*cell))
    texts, spans = artifact.read_table("texts.parquet"), artifact.read_table("spans.parquet")
    sentences = plan.store.open(plan.rollouts(*cell)).read_table("sentences.parquet")
    return [
        *_contract(texts, TEXTS, "texts"),
        *_contract(spans, SPANS, "spans"),
        *cover_faults(texts, spans, sentences),
    ]


def activations_finite(plan: Plan, cell: Cell) -> list[str]:
    """Every pooled activation is a number, one row per sentence."""
    site, setting = parse_site(cell[0]), cell[1]
    spans = plan.store.open(plan.spans(site.model, setting)).read_table("spans.parquet")
    expected = dict(spans.group_by("problem_id").len().iter_rows())
    faults = []
    for problem_id, rows in read_activations(plan, site, setting).items():
        if len(rows) != expected[problem_id]:
            faults.append(f"problem_{problem_id}: {len(rows)} rows, {expected[problem_id]} spans")
        n_bad = int((rows != rows).sum() + (abs(rows) == float("inf")).sum())
        if n_bad:
            faults.append(f"problem_{problem_id}: {n_bad} values are NaN or infinite")
    return faults


def split_coverage(plan: Plan, cell: Cell) -> list[str]:
    """No problem stands on two sides; under LOPO every problem is test exactly once."""
    site, trial = parse_site(cell[0]), parse_trial(cell[1])
    spans = plan.store.open(plan.spans(site.model, trial.setting)).read_table("spans.parquet")
    problem_ids = spans["problem_id"].unique().sort().to_list()
    scores = read_scores(plan, site, trial)
    faults = []
    for fold in make_folds(problem_ids, plan.study.splits):
        check_no_leakage(fold)
        scored = scores.filter(protocol=fold.protocol, fold=fold.index)
        for split, side in (("val", fold.val), ("test", fold.test)):
            found = set(scored.filter(split=split)["problem_id"])
            if found != set(side):
                faults.append(
                    f"{fold.protocol} fold {fold.index}: {split} has problems {sorted(found)}, "
                    f"the split says {sorted(side)}"
                )
    tested = (
        scores.filter(protocol="lopo", split="test")
        .group_by("recipe")
        .agg(n=pl.col("problem_id").n_unique())
    )
    return faults + [
        f"recipe {recipe}: {n} of {len(problem_ids)} problems are test under LOPO"
        for recipe, n in tested.iter_rows()
        if n != len(problem_ids)
    ]


CHECKS: Mapping[str, Mapping[str, Check]] = {
    "rollouts": {"rollouts_schema": rollouts_schema},
    "labels": {"labels_schema": labels_schema},
    "spans": {"spans_cover": spans_cover},
    "activations": {"activations_finite": activations_finite},
    "probe_fits": {"split_coverage": split_coverage},
}
"""Stage -> check name -> check."""


def _contract(frame: pl.DataFrame, schema: object, name: str) -> list[str]:
    try:
        check_table(frame, schema, name)  # type: ignore[arg-type]
    except TaprobeError as error:
        return [str(error)]
    return []
