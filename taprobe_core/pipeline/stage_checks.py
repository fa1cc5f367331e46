"""What must hold of a stored artifact: read it back, hash and all, and look.

Stages refuse to commit what breaks most of these, so a fault there means that something else
changed the store or that a stage is defective. What a failed check stops is in `gate`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import polars as pl
import torch

from taprobe_core.activations.faults import finite_faults, mass_faults, shape_faults
from taprobe_core.attention_tables import VERTICAL_TABLES
from taprobe_core.errors import TaprobeError
from taprobe_core.keys import parse_site, parse_trial
from taprobe_core.pipeline.attention import read_attention, read_kurtosis
from taprobe_core.pipeline.cells import Cell
from taprobe_core.pipeline.fit import read_scores
from taprobe_core.pipeline.inputs import read_shards
from taprobe_core.pipeline.looking import Found
from taprobe_core.pipeline.plan import Plan
from taprobe_core.spans import cover_faults
from taprobe_core.splits import check_no_leakage, make_folds
from taprobe_core.store import Artifact
from taprobe_core.tables import (
    LABELS,
    PROBLEMS,
    RECEIVER_HEADS,
    RECEIVER_SCORES,
    SENTENCES,
    SPANS,
    SPLITS,
    TEXTS,
    check_table,
)


def rollouts_schema(plan: Plan, cell: Cell) -> Found:
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
    faults += [
        f"problem_{row['problem_id']}: {row['found']} sentences, {row['n_sentences']} stated"
        for row in wrong.iter_rows(named=True)
    ]
    return _found(faults)


def labels_schema(plan: Plan, cell: Cell) -> Found:
    """Labels keep their contract."""
    labels = plan.store.open(plan.labels(*cell)).read_table("labels.parquet")
    return _found(_contract(labels, LABELS, "labels"))


def spans_cover(plan: Plan, cell: Cell) -> Found:
    """Every sentence has its span, and the spans' text is the sentence, blanks apart."""
    artifact = plan.store.open(plan.spans(*cell))
    texts, spans = artifact.read_table("texts.parquet"), artifact.read_table("spans.parquet")
    sentences = plan.store.open(plan.rollouts(*cell)).read_table("sentences.parquet")
    return _found(
        [
            *_contract(texts, TEXTS, "texts"),
            *_contract(spans, SPANS, "spans"),
            *cover_faults(texts, spans, sentences),
        ]
    )


def activations_finite(plan: Plan, cell: Cell) -> Found:
    """Every activation that is kept is a number, one row per sentence (or token) of every text."""
    site, setting = parse_site(cell[0]), cell[1]
    spans = plan.store.open(plan.spans(site.model, setting)).read_table("spans.parquet")
    of_problem = spans.group_by("problem_id").agg(sentence=pl.len(), token=pl.col("n_tokens").sum())
    shapes: dict[str, dict[int, torch.Tensor]] = defaultdict(dict)
    faults: list[str] = []
    for problem_id, tensors in read_shards(plan, site, setting):
        for pooling in plan.study.activations.poolings:
            rows = tensors[pooling]
            found = finite_faults({problem_id: rows}, _unit(pooling))
            faults += [f"{pooling}: {fault}" for fault in found]
            shapes[pooling][problem_id] = rows.to("meta")
    for name, rows_of in shapes.items():
        expected = dict(of_problem.select("problem_id", _unit(name)).iter_rows())
        found = shape_faults(rows_of, expected, _unit(name))
        faults += [f"{name}: {fault}" for fault in found]
    return _found(faults)


def _unit(pooling: str) -> str:
    return "token" if pooling == "tokens" else "sentence"


def vertical_attention_sound(plan: Plan, cell: Cell) -> Found:
    """Attention is finite, looks back alone, is at most all of it, and has a row per sentence."""
    site, setting = parse_site(cell[0]), cell[1]
    artifact = plan.store.open(plan.spans(site.model, setting))
    n_tokens = dict(artifact.read_table("texts.parquet").select("problem_id", "n_tokens").rows())
    ranges = {
        problem_id: rows.select("start_token", "end_token").rows()
        for (problem_id,), rows in artifact.read_table("spans.parquet")
        .sort("problem_id", "sentence_idx")
        .group_by("problem_id", maintain_order=True)
    }
    found = {
        problem_id: mass_faults(tensors, ranges.get(problem_id, []), n_tokens.get(problem_id, 0))
        for problem_id, tensors in read_attention(plan, site, setting)
    }
    return _found(
        [
            *(f"problem {problem_id}: no shard" for problem_id in sorted({*ranges} - {*found})),
            *(f"problem {each}: {fault}" for each in found for fault in found[each]),
            *_vertical_tables(plan.store.open(plan.vertical_attention(site, setting))),
        ]
    )


def _vertical_tables(artifact: Artifact) -> list[str]:
    """Every table that there is keeps its contract."""
    return [
        fault
        for name, contract in VERTICAL_TABLES.items()
        if f"{name}.parquet" in artifact.manifest.files
        for fault in _contract(artifact.read_table(f"{name}.parquet"), contract, name)
    ]


def receiver_heads_from_training(plan: Plan, cell: Cell) -> Found:
    """Each fold's heads have the kurtosis of its training problems; no problem is on two sides."""
    model, setting = cell
    artifact = plan.store.open(plan.receiver_heads(model, setting))
    heads = artifact.read_table("heads.parquet")
    scores = artifact.read_table("receiver_scores.parquet")
    kurtosis = read_kurtosis(plan, model, setting)
    first = kurtosis.filter(proximity=plan.study.attention.proximity[0])
    on = ["layer", "head"]
    faults = [
        *_contract(heads, RECEIVER_HEADS, "heads"),
        *_contract(scores, RECEIVER_SCORES, "receiver_scores"),
    ]
    present = first["problem_id"].unique()
    for fold in make_folds(plan.problem_ids(), plan.study.splits, present=present):
        check_no_leakage(fold)
        mine = heads.filter(protocol=fold.protocol, fold=fold.index)
        trained = (
            first.filter(pl.col("problem_id").is_in(fold.train))
            .group_by(on)
            .agg(expected=pl.col("kurtosis").mean())
        )
        wrong = mine.join(trained, on=on, how="left").filter(
            ((pl.col("kurtosis") - pl.col("expected")).abs() > 1e-9).fill_null(value=True)
        )
        if wrong.height or mine.is_empty():
            faults.append(f"{fold}: {wrong.height} of {mine.height} heads are not of its training")
        sides = scores.filter(protocol=fold.protocol, fold=fold.index)
        for split in SPLITS:
            found = set(sides.filter(split=split)["problem_id"])
            if found != set(getattr(fold, split)):
                faults.append(f"{fold}: {split} has problems {sorted(found)}")
    return _found(faults)


def split_coverage(plan: Plan, cell: Cell) -> Found:
    """No problem stands on two sides; under LOPO every problem is test exactly once."""
    site, trial = parse_site(cell[0]), parse_trial(cell[1])
    of_trial = (site.model, trial.setting)
    spans = plan.store.open(plan.spans(*of_trial)).read_table("spans.parquet")
    labels = plan.store.open(plan.labels(*of_trial)).read_table("labels.parquet")
    problem_ids = sorted({*spans["problem_id"]} & {*labels["problem_id"]})
    scores = read_scores(plan, site, trial)
    faults = []
    splits = plan.study.splits
    for fold in make_folds(plan.problem_ids(), splits, present=problem_ids):
        check_no_leakage(fold)
        scored = scores.filter(protocol=fold.protocol, fold=fold.index)
        val = fold.train if splits.inner_folds else fold.val
        for split, side in (("val", val), ("test", fold.test)):
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
    faults += [
        f"recipe {recipe}: {n} of {len(problem_ids)} problems are test under LOPO"
        for recipe, n in tested.iter_rows()
        if n != len(problem_ids)
    ]
    return _found(faults)


def _found(faults: Iterable[str]) -> Found:
    return Found(tuple(faults))


def _contract(frame: pl.DataFrame, schema: object, name: str) -> list[str]:
    try:
        check_table(frame, schema, name)  # type: ignore[arg-type]
    except TaprobeError as error:
        return [str(error)]
    return []
