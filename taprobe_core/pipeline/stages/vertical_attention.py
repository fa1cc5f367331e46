"""Vertical attention of one site and setting: how later sentences look back at each one.

The mass is measured by the same passes as the activations (`extract`); everything here follows from
it. The tables themselves are made in `attention.tables`.

Invariant: no pass is run for mass that is stored; a longer layer list adds its own layers alone.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import polars as pl

from taprobe_core.errors import attempted
from taprobe_core.keys import parse_site
from taprobe_core.pipeline.commit import (
    Files,
    checkpoint_provenance,
    commit_cell,
    contract_faults,
)
from taprobe_core.pipeline.grid import Cell
from taprobe_core.pipeline.plan import Plan
from taprobe_core.pipeline.stage import (
    Check,
    Condition,
    Description,
    Found,
    Made,
    Outcome,
    Part,
    Stage,
    largest,
    mean,
    median,
    present,
)
from taprobe_core.pipeline.stages.activations import spans_of_site
from taprobe_core.store import ArtifactKey


def _config(plan: Plan, cell: Cell) -> dict[str, Any]:
    site, attention = parse_site(cell[0]), plan.study.attention
    # Only the mode `full` makes figures head by head, and only they depend on these two.
    is_full = attention.mode == "full"
    return {
        **plan.text_config(PART.name, site.model),
        "layer": site.layer,
        "proximity": list(attention.proximity) if is_full else None,
        "depth_control": attention.depth_control if is_full else None,
    }


def _make(plan: Plan, cells: Sequence[Cell]) -> Iterator[tuple[Cell, Made]]:
    """Measure what the cells lack, and yield what became of each.

    Where a text's attention is missing, the pass that makes it also makes the activations that are
    missing. A problem that fails leaves the artifacts of the others committed.
    """
    from taprobe_core.pipeline.extract import cell_parts, extracted

    start = time.monotonic()
    sites = [(parse_site(site), setting) for site, setting in cells]
    for ready in extracted(plan, sites, [PART.name]):
        for site in ready.sites:
            cell = (str(site), ready.setting)
            parts = cell_parts(plan, PART.name, site, ready)
            made: Made
            if parts is None:
                made = ready.faults_at(site.layer)
            else:
                made = attempted(partial(_commit, plan, cell, parts), f"attention of {site}")
            if isinstance(made, Outcome):
                is_reused = made.is_reused and site.layer not in ready.new[PART.name]
                made = Outcome(made.artifact, is_reused, time.monotonic() - start)
            yield cell, made
            start = time.monotonic()


def _commit(plan: Plan, cell: Cell, parts: Mapping[int, Sequence[ArtifactKey]]) -> Outcome:
    site, setting = parse_site(cell[0]), cell[1]
    attention = plan.study.attention
    shards = {problem_id: keys[0] for problem_id, keys in parts.items()}

    def compute() -> Files:
        from taprobe_core.attention.tables import vertical_tables
        from taprobe_core.pipeline.inputs import attention_tensors

        index = {
            "problem_id": list(shards),
            "shard_fingerprint": [key.fingerprint for key in shards.values()],
        }
        masses = (
            (problem_id, attention_tensors(plan, key, site.layer))
            for problem_id, key in shards.items()
        )
        return {"shards": pl.DataFrame(index), **vertical_tables(masses, attention)}

    provenance = {
        **checkpoint_provenance(plan, site.model, setting),
        "layer": site.layer,
        "attention_mode": attention.mode,
    }
    return commit_cell(plan, "vertical_attention", cell, compute, provenance, list(shards.values()))


_SHOWN_HEADS = 10

_SHARES = ("bos_share", "first_sentence_share", "near_diagonal_share", "distance_r_squared")


def _describe(plan: Plan, cell: Cell) -> Description:
    from taprobe_core.report import plots

    scores = plan.read("vertical_attention", cell, "scores")
    metrics: dict[str, float | None] = {
        "n_problems": scores["problem_id"].n_unique(),
        "n_sentences": scores.height,
        "mean_attention_score": mean(scores["attention_score"]),
    }
    tables: dict[str, pl.DataFrame] = {}
    if plan.study.attention.mode == "full":
        heads = plan.read("vertical_attention", cell, "heads")
        kurtosis = plan.read("vertical_attention", cell, "kurtosis")
        top = _top_heads(heads, kurtosis.filter(proximity=plan.study.attention.proximity[0]))
        metrics |= {
            "n_heads": heads["head"].n_unique(),
            "top_kurtosis": largest(top["kurtosis"]),
            **{f"median_{name}": median(heads[name]) for name in _SHARES},
            "median_distance_slope": median(heads["distance_slope"]),
        }
        tables["top_heads"] = top
    picture = _attention_of_first_problem(plan, cell)
    return Description(present(metrics), scores.height, plots.to_data_uri(picture), tables)


def _top_heads(heads: pl.DataFrame, kurtosis: pl.DataFrame) -> pl.DataFrame:
    """The heads of highest mean kurtosis over problems, with the means of what explains it."""
    return (
        kurtosis.group_by("head")
        .agg(pl.col("kurtosis").mean(), n_problems=pl.col("kurtosis").count())
        .join(heads.group_by("head").agg(pl.col(_SHARES).mean()), on="head")
        .sort("kurtosis", "head", descending=[True, False], nulls_last=True)
        .head(_SHOWN_HEADS)
    )


def _attention_of_first_problem(plan: Plan, cell: Cell) -> bytes:
    from taprobe_core.attention.scores import average_matrix
    from taprobe_core.pipeline.inputs import read_attention
    from taprobe_core.report import plots

    problem_id, tensors = next(read_attention(plan, parse_site(cell[0]), cell[1]))
    title = f"{' · '.join(cell)} · problem {problem_id}, mean over heads"
    if "mass" in tensors:
        average = average_matrix(tensors["mass"].numpy(), tensors["n_tokens"].numpy())
        return plots.attention_map(average.mean(axis=0), y="sentence", title=title)
    tail = tensors["tail_mass"].double().mean(dim=0).numpy()
    return plots.attention_map(tail, y="last tokens, in text order", title=title)


def vertical_attention_sound(plan: Plan, cell: Cell) -> Found:
    """Attention is finite, looks back alone, is at most all of it, and has a row per sentence."""
    from taprobe_core.activations.pooling import mass_faults
    from taprobe_core.pipeline.inputs import read_attention

    site, setting = parse_site(cell[0]), cell[1]
    texts = plan.read("spans", (site.model, setting), "texts")
    n_tokens = dict(texts.select("problem_id", "n_tokens").rows())
    ranges = {
        problem_id: rows.select("start_token", "end_token").rows()
        for (problem_id,), rows in plan.read("spans", (site.model, setting), "spans")
        .sort("problem_id", "sentence_idx")
        .group_by("problem_id", maintain_order=True)
    }
    found = {
        problem_id: mass_faults(tensors, ranges.get(problem_id, []), n_tokens.get(problem_id, 0))
        for problem_id, tensors in read_attention(plan, site, setting)
    }
    return Found(
        (
            *(f"problem {problem_id}: no shard" for problem_id in sorted({*ranges} - {*found})),
            *(f"problem {each}: {fault}" for each in found for fault in found[each]),
            *contract_faults(plan, "vertical_attention", cell),
        )
    )


PART = Part("attention_shards", code_version="4")
"""The attention of all layers of one text that one pass made."""

VERTICAL_ATTENTION = Stage(
    name="vertical_attention",
    title="How later sentences look back at each one, at one layer, head by head.",
    grid=("site", "setting"),
    reads=("spans",),
    code_version="3",
    config=_config,
    part=PART,
    make=_make,
    describe=_describe,
    tables={
        "shards": "ATTENTION_SHARDS",
        "scores": "ATTENTION_SCORES",
        "vertical": "VERTICAL_SCORES",
        "heads": "ATTENTION_HEADS",
        "kurtosis": "HEAD_KURTOSIS",
    },
    checks={"vertical_attention_sound": Check(vertical_attention_sound, reads=spans_of_site)},
    asked_by=Condition(
        lambda study: study.attention.mode != "off", "set attention.mode to light or full"
    ),
    op="extract_activations",
    kinds=frozenset({"torch", "safetensors"}),
    is_on_accelerator=True,
    is_provenance=True,
)
