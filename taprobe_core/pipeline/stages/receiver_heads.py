"""Receiver heads of one model and setting: the heads that single out few sentences.

They are chosen fold by fold over all the layers that the study reads of a model, so another layer
list chooses them again.
"""

from __future__ import annotations

from typing import Any

import polars as pl

from taprobe_core.pipeline.commit import (
    Files,
    commit_cell,
    contract_faults,
    dataset_provenance,
)
from taprobe_core.pipeline.grid import Cell
from taprobe_core.pipeline.plan import Plan
from taprobe_core.pipeline.stage import (
    Check,
    Condition,
    Description,
    Found,
    Outcome,
    Stage,
    cell_by_cell,
    largest,
    present,
)
from taprobe_core.store import ArtifactKey

_SHOWN_HEADS = 10


def _config(plan: Plan, cell: Cell) -> dict[str, Any]:
    attention = plan.study.attention
    return {
        "proximity": list(attention.proximity),
        "depth_control": attention.depth_control,
        "n_receiver_heads": attention.n_receiver_heads,
        "folds": plan.folds_config(),
    }


def _layers(plan: Plan, cell: Cell) -> dict[int, Cell]:
    """Layer -> its cell of vertical attention."""
    model, setting = cell
    return {site.layer: (str(site), setting) for site in plan.sites(model)}


def _make(plan: Plan, cell: Cell) -> Outcome:
    """Choose heads fold by fold and score sentences by them, commit.

    Raises:
        MissingArtifactError: the vertical attention of a layer is not there yet.
        NotEnoughDataError: no head has a kurtosis in a fold's training problems.
        PlanError: a split side would be empty.
    """
    (model, setting), layers = cell, _layers(plan, cell)
    attention = plan.study.attention

    def compute() -> Files:
        from taprobe_core.attention.tables import receiver_tables
        from taprobe_core.pipeline.skips import folds_of

        kurtosis = read_kurtosis(plan, cell)
        folds = folds_of(plan, model, setting, tuple(kurtosis["problem_id"].unique()))
        return receiver_tables(
            kurtosis,
            lambda layer: plan.read("vertical_attention", layers[layer], "vertical"),
            folds,
            attention,
        )

    provenance = {
        **dataset_provenance(plan, *cell),
        "layers": list(layers),
        "proximity": attention.proximity[0],
        "depth_control": attention.depth_control,
    }
    return commit_cell(plan, "receiver_heads", cell, compute, provenance)


def read_kurtosis(plan: Plan, cell: Cell) -> pl.DataFrame:
    """Read the kurtosis of every head of a model and setting.

    Returns:
        `tables.HEAD_KURTOSIS` and column `layer`.

    Raises:
        MissingArtifactError: the vertical attention of a layer is not there yet.
    """
    return pl.concat(
        plan.read("vertical_attention", of_layer, "kurtosis").with_columns(
            layer=pl.lit(layer, pl.Int64)
        )
        for layer, of_layer in _layers(plan, cell).items()
    )


def _describe(plan: Plan, cell: Cell) -> Description:
    from taprobe_core.report import plots

    heads = plan.read("receiver_heads", cell, "heads")
    scores = plan.read("receiver_heads", cell, "receiver_scores")
    reliability = plan.read("receiver_heads", cell, "reliability")
    top = (
        heads.group_by("layer", "head")
        .agg(n_folds=pl.len(), mean_rank=pl.col("rank").mean(), kurtosis=pl.col("kurtosis").mean())
        .sort("n_folds", "mean_rank", "layer", "head", descending=[True, False, False, False])
    )
    metrics: dict[str, float | None] = {
        "n_folds": heads.select(pl.struct("protocol", "fold").n_unique()).item(),
        "n_heads": heads["rank"].max(),  # type: ignore[dict-item]
        "n_heads_in_any_fold": top.height,
        "top_kurtosis": largest(heads["kurtosis"]),
        "split_half_pearson": reliability["split_half_pearson"][0],
    }
    for row in reliability[1:].iter_rows(named=True):
        for name in ("top_heads_kept", "median_spearman"):
            metrics[f"{name}/proximity_{row['proximity']}"] = row[name]
    return Description(
        present(metrics),
        scores.height,
        plots.to_data_uri(_kurtosis_of_heads(plan, cell)),
        {"top_heads": top.head(_SHOWN_HEADS), "reliability": reliability},
    )


def _kurtosis_of_heads(plan: Plan, cell: Cell) -> bytes:
    """Mean kurtosis over all problems, layer by head."""
    import numpy as np

    from taprobe_core.report import plots

    grid = (
        read_kurtosis(plan, cell)
        .filter(proximity=plan.study.attention.proximity[0])
        .group_by("layer", "head")
        .agg(pl.col("kurtosis").mean().fill_null(float("nan")))
        .sort("layer", "head")
    )
    layers = grid["layer"].unique().sort().to_list()
    values = np.asarray(grid["kurtosis"], dtype=np.float64).reshape(len(layers), -1)
    title = f"{' · '.join(cell)} · mean kurtosis of vertical attention"
    return plots.kurtosis_map(values, layers, title=title)


def receiver_heads_from_training(plan: Plan, cell: Cell) -> Found:
    """Each fold's heads have the kurtosis of its training problems; no problem is on two sides."""
    from taprobe_core.splits import check_no_leakage, make_folds
    from taprobe_core.tables import SPLITS

    heads = plan.read("receiver_heads", cell, "heads")
    scores = plan.read("receiver_heads", cell, "receiver_scores")
    first = read_kurtosis(plan, cell).filter(proximity=plan.study.attention.proximity[0])
    on = ["layer", "head"]
    faults = [*contract_faults(plan, "receiver_heads", cell, "heads", "receiver_scores")]
    present_problems = first["problem_id"].unique()
    for fold in make_folds(plan.problem_ids(), plan.study.splits, present=present_problems):
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
    return Found(tuple(faults))


def _attention(plan: Plan, cell: Cell) -> list[ArtifactKey]:
    return plan.upstream("receiver_heads", cell)


RECEIVER_HEADS = Stage(
    name="receiver_heads",
    title="Heads that single out few sentences, chosen fold by fold, and their scores.",
    grid=("model", "setting"),
    reads=("vertical_attention",),
    code_version="2",
    config=_config,
    make=cell_by_cell(_make),
    describe=_describe,
    tables={
        "heads": "RECEIVER_HEADS",
        "receiver_scores": "RECEIVER_SCORES",
        "reliability": "RECEIVER_RELIABILITY",
    },
    checks={
        "receiver_heads_from_training": Check(
            receiver_heads_from_training,
            reads=_attention,
            settings=lambda plan: {"folds": plan.folds_config()},
        )
    },
    asked_by=Condition(lambda study: study.attention.mode == "full", "set attention.mode to full"),
    op="choose_receiver_heads",
    is_provenance=True,
)
