"""What to show of vertical attention and of receiver heads, with what else explains them."""

from __future__ import annotations

import numpy as np
import polars as pl

from taprobe_core import plots
from taprobe_core.attention.scores import average_matrix
from taprobe_core.keys import parse_site
from taprobe_core.pipeline.attention import read_attention, read_kurtosis
from taprobe_core.pipeline.cells import Cell
from taprobe_core.pipeline.description import Description, largest, mean, median, present
from taprobe_core.pipeline.plan import Plan

_SHOWN_HEADS = 10

_SHARES = ("bos_share", "first_sentence_share", "near_diagonal_share", "distance_r_squared")


def describe_vertical_attention(plan: Plan, cell: Cell) -> Description:
    """Describe one site and setting's attention; `describe` says what is raised."""
    site, setting = parse_site(cell[0]), cell[1]
    artifact = plan.store.open(plan.vertical_attention(site, setting))
    scores = artifact.read_table("scores.parquet")
    metrics: dict[str, float | None] = {
        "n_problems": scores["problem_id"].n_unique(),
        "n_sentences": scores.height,
        "mean_attention_score": mean(scores["attention_score"]),
    }
    tables: dict[str, pl.DataFrame] = {}
    if plan.study.attention.mode == "full":
        heads = artifact.read_table("heads.parquet")
        kurtosis = artifact.read_table("kurtosis.parquet")
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
    problem_id, tensors = next(read_attention(plan, parse_site(cell[0]), cell[1]))
    title = f"{' · '.join(cell)} · problem {problem_id}, mean over heads"
    if "mass" in tensors:
        average = average_matrix(tensors["mass"].numpy(), tensors["n_tokens"].numpy())
        return plots.attention_map(average.mean(axis=0), y="sentence", title=title)
    tail = tensors["tail_mass"].double().mean(dim=0).numpy()
    return plots.attention_map(tail, y="last tokens, in text order", title=title)


def describe_receiver_heads(plan: Plan, cell: Cell) -> Description:
    """Describe one model and setting's receiver heads; `describe` says what is raised."""
    artifact = plan.store.open(plan.receiver_heads(*cell))
    heads = artifact.read_table("heads.parquet")
    scores = artifact.read_table("receiver_scores.parquet")
    reliability = artifact.read_table("reliability.parquet")
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
    grid = (
        read_kurtosis(plan, *cell)
        .filter(proximity=plan.study.attention.proximity[0])
        .group_by("layer", "head")
        .agg(pl.col("kurtosis").mean().fill_null(float("nan")))
        .sort("layer", "head")
    )
    layers = grid["layer"].unique().sort().to_list()
    values = np.asarray(grid["kurtosis"], dtype=np.float64).reshape(len(layers), -1)
    title = f"{' · '.join(cell)} · mean kurtosis of vertical attention"
    return plots.kurtosis_map(values, layers, title=title)
