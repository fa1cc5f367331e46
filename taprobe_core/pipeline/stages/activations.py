"""Activations of one site and setting: an index of artifacts, each of one problem's text.

An artifact of a text holds more layers than a cell reads (which ones, depends on what was asked for
when), so the index says for each text which artifact has this layer.

How they are extracted (which texts lack what, one pass each) is in `extract`.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import polars as pl

from taprobe_core.errors import attempted
from taprobe_core.keys import parse_site
from taprobe_core.pipeline.commit import Files, checkpoint_provenance, commit_cell
from taprobe_core.pipeline.grid import Cell
from taprobe_core.pipeline.plan import Plan
from taprobe_core.pipeline.stage import (
    Check,
    Description,
    Found,
    Made,
    Outcome,
    Part,
    Stage,
    largest,
    present,
)
from taprobe_core.store import DTYPE_NAMES, ArtifactKey

if TYPE_CHECKING:
    import torch


def _config(plan: Plan, cell: Cell) -> dict[str, Any]:
    site = parse_site(cell[0])
    return {**plan.text_config(PART.name, site.model), "layer": site.layer}


def _make(plan: Plan, cells: Sequence[Cell]) -> Iterator[tuple[Cell, Made]]:
    """Extract what the cells lack and yield what became of each, as it becomes complete.

    Where the study asks for vertical attention, it comes from the same passes. A problem that fails
    leaves the artifacts of the others committed.
    """
    from taprobe_core.pipeline.extract import cell_parts, extracted, shard_kinds

    start = time.monotonic()
    sites = [(parse_site(site), setting) for site, setting in cells]
    for ready in extracted(plan, sites, shard_kinds(plan)):
        for site in ready.sites:
            cell = (str(site), ready.setting)
            parts = cell_parts(plan, PART.name, site, ready)
            made: Made
            if parts is None:
                made = ready.faults_at(site.layer)
            else:
                where = f"index of {'/'.join(cell)}"
                made = attempted(partial(_commit_index, plan, cell, parts), where)
            if isinstance(made, Outcome):
                is_reused = made.is_reused and site.layer not in ready.new[PART.name]
                made = Outcome(made.artifact, is_reused, time.monotonic() - start)
            yield cell, made
        start = time.monotonic()


def _commit_index(plan: Plan, cell: Cell, parts: Mapping[int, Sequence[ArtifactKey]]) -> Outcome:
    from taprobe_core.activations.tasks import ACTIVATIONS_FILE, tensor_name

    site, setting = parse_site(cell[0]), cell[1]
    poolings = plan.study.activations.poolings

    def compute() -> Files:
        rows: list[tuple[int, str, str, str, float]] = []
        for problem_id, keys in parts.items():
            for pooling, key in zip(poolings, keys, strict=True):
                artifact, name = plan.store.inspect(key), tensor_name(site.layer, pooling)
                low, high = artifact.manifest.provenance["ranges"][name]
                dtype = DTYPE_NAMES[artifact.tensors(ACTIVATIONS_FILE)[name].dtype]
                rows.append((problem_id, key.fingerprint, pooling, dtype, max(-low, high)))
        return {"shards": pl.DataFrame(rows, schema=_COLUMNS, orient="row")}

    provenance = {
        **checkpoint_provenance(plan, site.model, setting),
        "layer": site.layer,
        "poolings": list(poolings),
    }
    read = [key for keys in parts.values() for key in keys]
    return commit_cell(plan, "activations", cell, compute, provenance, read)


_COLUMNS = {
    "problem_id": pl.Int64,
    "shard_fingerprint": pl.String,
    "pooling": pl.String,
    "dtype": pl.String,
    "max_abs": pl.Float64,
}


def _describe(plan: Plan, cell: Cell) -> Description:
    import numpy as np

    from taprobe_core.pipeline.inputs import read_activations
    from taprobe_core.report import plots

    index = plan.read("activations", cell, "shards")
    poolings = plan.study.activations.poolings
    rows = read_activations(plan, parse_site(cell[0]), cell[1], poolings[0])
    first = next(iter(rows))
    norms = {problem_id: np.linalg.norm(each, axis=1) for problem_id, each in rows.items()}
    n_rows = sum(len(each) for each in rows.values())
    metrics = {
        "n_texts": index["problem_id"].n_unique(),
        "n_tokens" if poolings[0] == "tokens" else "n_sentences": n_rows,
        "d_model": rows[first].shape[1],
        "max_abs": largest(index["max_abs"]),
        "mean_norm": float(np.concatenate(list(norms.values())).mean()),
        "n_widened": int((index["dtype"] != plan.study.activations.storage).sum()),
    }
    picture = plots.activation_norms(
        norms[first].astype(np.float64), title=f"{' · '.join(cell)} · problem {first}"
    )
    return Description(present(metrics), n_rows, plots.to_data_uri(picture))


def activations_finite(plan: Plan, cell: Cell) -> Found:
    """Every activation that is kept is a number, one row per sentence (or token) of every text."""
    from taprobe_core.activations.pooling import finite_faults, shape_faults
    from taprobe_core.pipeline.inputs import read_shards

    site, setting = parse_site(cell[0]), cell[1]
    spans = plan.read("spans", (site.model, setting), "spans")
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
    return Found(tuple(faults))


def _unit(pooling: str) -> str:
    return "token" if pooling == "tokens" else "sentence"


def spans_of_site(plan: Plan, cell: Cell) -> list[ArtifactKey]:
    """Key of the spans that a cell of site and setting was made from."""
    return [plan.key("spans", (parse_site(cell[0]).model, cell[1]))]


PART = Part("activation_shards", code_version="5")
"""All layers and poolings of one text that one pass made."""

ACTIVATIONS = Stage(
    name="activations",
    title="Pooled activations per sentence at one layer: where they stand for each problem.",
    grid=("site", "setting"),
    reads=("spans",),
    code_version="4",
    config=_config,
    part=PART,
    make=_make,
    describe=_describe,
    tables={"shards": "ACTIVATION_SHARDS"},
    checks={"activations_finite": Check(activations_finite, reads=spans_of_site)},
    op="extract_activations",
    kinds=frozenset({"torch", "safetensors"}),
    is_on_accelerator=True,
    is_provenance=True,
)
