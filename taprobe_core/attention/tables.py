"""Stored attention mass to tables: scores of sentences, figures of heads, receiver heads by fold.

In: the mass of each problem at one layer; later the tables of every layer. Out: tables under the
contracts of `tables.attention`. The attention variants of a sweep are simple scores (`scores`) of
the same stored mass: no pass is run for one.

What does not belong here: the definitions (`scores`, `receivers`), which variants there are
(`study.sweep`), and where shards and tables are kept (`pipeline`).

Invariant: everything follows from the mass; a fold's heads are chosen on its training problems
alone; a value that a definition leaves open is null.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import torch

from taprobe_core.attention.receivers import (
    ReceiverHead,
    ReceiverHeads,
    choose_receiver_heads,
    distance_law,
    near_diagonal_share,
    receiver_scores,
    sink_share,
    split_half_reliability,
)
from taprobe_core.attention.scores import (
    average_matrix,
    full_scores,
    light_scores,
    proximity_sensitivity,
    vertical_scores,
)
from taprobe_core.errors import ConfigError, NotEnoughDataError
from taprobe_core.splits import Fold
from taprobe_core.study import Attention
from taprobe_core.study.sweep import AttentionVariant
from taprobe_core.tables import (
    ATTENTION_HEADS,
    ATTENTION_SCORES,
    HEAD_KURTOSIS,
    PROTOCOLS,
    RECEIVER_HEADS,
    RECEIVER_RELIABILITY,
    RECEIVER_SCORES,
    SPLITS,
    VERTICAL_SCORES,
    check_table,
    schema_of,
)

__all__ = ["VERTICAL_TABLES", "receiver_tables", "variant_scores", "vertical_tables"]


def long_rows(problem_id: int, dimensions: Sequence[str], **values: Any) -> pl.DataFrame:
    """Lay arrays of equal shape out as rows.

    Args:
        problem_id: fills column `problem_id`.
        dimensions: a column for each dimension, which holds the index along it.
        values: a column for each array.
    """
    indices = np.indices(next(iter(values.values())).shape)
    return pl.DataFrame(
        {
            "problem_id": np.full(indices[0].size, problem_id, dtype=np.int64),
            **{name: at.ravel() for name, at in zip(dimensions, indices, strict=True)},
            **{name: each.ravel() for name, each in values.items()},
        }
    )


def joined(frames: Iterable[pl.DataFrame]) -> pl.DataFrame:
    """Stack frames; NaN, which says that there is no value, becomes null.

    Args:
        frames: of one schema.
    """
    return pl.concat(frames).with_columns(pl.col(pl.Float64).fill_nan(None))


Tensors = Mapping[str, torch.Tensor]

VERTICAL_TABLES = {
    "scores": ATTENTION_SCORES,
    "vertical": VERTICAL_SCORES,
    "heads": ATTENTION_HEADS,
    "kurtosis": HEAD_KURTOSIS,
}
"""Table -> its contract; mode `light` has the first alone."""


def vertical_tables(
    masses: Iterable[tuple[int, Tensors]], attention: Attention
) -> dict[str, pl.DataFrame]:
    """Make the tables of one layer.

    Args:
        masses: problem id and the tensors of its attention shard; read once, one at a time.
        attention: mode, proximity and depth control. Mode `light` has the simple scores alone.

    Returns:
        `scores` (`ATTENTION_SCORES`); in mode `full` also `vertical` (`VERTICAL_SCORES`), `heads`
        (`ATTENTION_HEADS`) and `kurtosis` (`HEAD_KURTOSIS`).

    Raises:
        NonFiniteError: a mass is NaN or infinite, or a sentence has no tokens.
        SchemaError: the tables break their contracts.
    """
    parts = [_of_problem(problem_id, tensors, attention) for problem_id, tensors in masses]
    return {
        name: check_table(
            joined(part[name] for part in parts), VERTICAL_TABLES[name], "attention mass"
        )
        for name in parts[0]
    }


def _of_problem(problem_id: int, tensors: Tensors, attention: Attention) -> dict[str, pl.DataFrame]:
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    if attention.mode == "light":
        simple = light_scores(arrays["tail_mass"], arrays["is_after"])
        return {"scores": long_rows(problem_id, ("sentence_idx",), attention_score=simple)}
    mass, n_tokens = arrays["mass"], arrays["n_tokens"]
    average = average_matrix(mass, n_tokens)
    first, control = attention.proximity[0], attention.depth_control
    plain = vertical_scores(average, proximity=first)
    vertical = (
        plain
        if control == "none"
        else vertical_scores(average, proximity=first, depth_control=control)
    )
    sensitivity = proximity_sensitivity(
        average, proximities=attention.proximity, reference=first, depth_control=control
    )
    sink = sink_share(mass, arrays["bos_mass"], n_tokens)
    law = distance_law(plain, n_tokens, proximity=first)
    kurtosis = long_rows(
        problem_id,
        ("head", "proximity"),
        kurtosis=sensitivity.kurtosis.T,
        spearman_with_first=sensitivity.spearman.T,
    )
    proximity_at = dict(enumerate(attention.proximity))
    return {
        "scores": long_rows(
            problem_id, ("sentence_idx",), attention_score=full_scores(mass, n_tokens)
        ),
        "vertical": long_rows(problem_id, ("head", "sentence_idx"), vertical_score=vertical),
        "heads": long_rows(
            problem_id,
            ("head",),
            bos_share=sink.bos,
            first_sentence_share=sink.first_sentence,
            near_diagonal_share=near_diagonal_share(mass),
            distance_slope=law.slope_distance,
            length_slope=law.slope_length,
            distance_intercept=law.intercept,
            distance_r_squared=law.r_squared,
            n_scores=law.n_sentences,
        ),
        "kurtosis": kurtosis.with_columns(pl.col("proximity").replace_strict(proximity_at)),
    }


FloatArray = npt.NDArray[np.float64]
Kurtosis = dict[int, FloatArray]
"""Problem id -> [layer, head]."""


def receiver_tables(
    kurtosis: pl.DataFrame,
    read_vertical: Callable[[int], pl.DataFrame],
    folds: Sequence[Fold],
    attention: Attention,
) -> dict[str, pl.DataFrame]:
    """Choose receiver heads fold by fold and score every problem's sentences by them.

    Args:
        kurtosis: `HEAD_KURTOSIS` of every layer, with its layer as column `layer`.
        read_vertical: returns the `VERTICAL_SCORES` of a layer; asked once for each layer that has
            a chosen head.
        folds: heads are chosen on the training side of each.
        attention: proximities, of which the first chooses, and the number of heads.

    Returns:
        `heads` (`RECEIVER_HEADS`), `receiver_scores` (`RECEIVER_SCORES`) and `reliability`
        (`RECEIVER_RELIABILITY`).

    Raises:
        NotEnoughDataError: no head has a kurtosis in any training problem of a fold.
        SchemaError: the tables break their contracts.
    """
    by_problem, layers = _by_problem(kurtosis, attention.proximity[0])
    chosen = [
        choose_receiver_heads(
            by_problem, fold.train, top_k=attention.n_receiver_heads, layers=layers
        )
        for fold in folds
    ]
    where = "kurtosis and vertical scores of every layer"
    return {
        "heads": check_table(_heads(folds, chosen), RECEIVER_HEADS, where),
        "receiver_scores": check_table(
            _scores(folds, chosen, read_vertical), RECEIVER_SCORES, where
        ),
        "reliability": check_table(
            _reliability(kurtosis, attention, layers), RECEIVER_RELIABILITY, where
        ),
    }


def _by_problem(kurtosis: pl.DataFrame, proximity: int) -> tuple[Kurtosis, list[int]]:
    """Return kurtosis by problem, and the layer of each row."""
    rows = kurtosis.filter(proximity=proximity).sort("problem_id", "layer", "head")
    layers = rows["layer"].unique().sort().to_list()
    found = {
        problem_id: group["kurtosis"].fill_null(float("nan")).to_numpy().reshape(len(layers), -1)
        for (problem_id,), group in rows.group_by("problem_id", maintain_order=True)
    }
    return found, layers


def _in_fold(fold: Fold, rows: pl.DataFrame) -> pl.DataFrame:
    protocol = pl.lit(fold.protocol, pl.Enum(PROTOCOLS)).alias("protocol")
    return rows.select(protocol, pl.lit(fold.index, pl.Int32).alias("fold"), pl.all())


def _heads(folds: Sequence[Fold], chosen: Sequence[ReceiverHeads]) -> pl.DataFrame:
    parts = []
    for fold, found in zip(folds, chosen, strict=True):
        rows = pl.DataFrame(found.heads, schema=list(ReceiverHead._fields), orient="row")
        rank = pl.int_range(1, pl.len() + 1, dtype=pl.Int64).alias("rank")
        parts.append(_in_fold(fold, rows.select(rank, pl.all())))
    return pl.concat(parts)


def _scores(
    folds: Sequence[Fold],
    chosen: Sequence[ReceiverHeads],
    read_vertical: Callable[[int], pl.DataFrame],
) -> pl.DataFrame:
    layers = sorted({head.layer for found in chosen for head in found.heads})
    vertical = _stacked(read_vertical, layers)
    parts = []
    for fold, found in zip(folds, chosen, strict=True):
        for split in SPLITS:
            side = pl.lit(split, pl.Enum(SPLITS)).alias("split")
            for problem_id in getattr(fold, split):
                score = receiver_scores(vertical[problem_id], found.heads, layers=layers)
                rows = long_rows(problem_id, ("sentence_idx",), receiver_score=score)
                rows = rows.select("problem_id", "sentence_idx", side, "receiver_score")
                parts.append(_in_fold(fold, rows))
    return joined(parts)


def _stacked(
    read_vertical: Callable[[int], pl.DataFrame], layers: Sequence[int]
) -> dict[int, FloatArray]:
    """Return problem id -> [layer, head, sentence], NaN where there is no score."""
    by_problem: dict[int, list[FloatArray]] = defaultdict(list)
    for layer in layers:
        rows = read_vertical(layer).sort("problem_id", "head", "sentence_idx")
        n_heads = rows["head"].n_unique()
        for (problem_id,), group in rows.group_by("problem_id", maintain_order=True):
            scores = group["vertical_score"].fill_null(float("nan")).to_numpy()
            by_problem[problem_id].append(scores.reshape(n_heads, -1))
    return {problem_id: np.stack(scores) for problem_id, scores in by_problem.items()}


def _reliability(
    kurtosis: pl.DataFrame, attention: Attention, layers: Sequence[int]
) -> pl.DataFrame:
    first = _top_heads(_by_problem(kurtosis, attention.proximity[0])[0], attention, layers)
    rows = []
    for proximity in attention.proximity:
        by_problem, _ = _by_problem(kurtosis, proximity)
        halves = split_half_reliability(by_problem, layers=layers)
        top = _top_heads(by_problem, attention, layers)
        # Where every head is among the top ones, that they stay says nothing.
        is_choice = halves.n_heads + halves.n_undefined > attention.n_receiver_heads
        kept = len(first & top) / len(first) if first and top and is_choice else None
        spearman = kurtosis.filter(pl.col("layer") != 0, proximity=proximity)["spearman_with_first"]
        rows.append(
            {
                "proximity": proximity,
                "n_problems": len(by_problem),
                "n_heads": halves.n_heads,
                "n_undefined": halves.n_undefined,
                "split_half_pearson": halves.pearson,
                "top_heads_kept": kept,
                "median_spearman": spearman.median(),
            }
        )
    schema = schema_of(RECEIVER_RELIABILITY)
    return joined([pl.DataFrame(rows, schema=schema)])


def _top_heads(
    by_problem: Kurtosis, attention: Attention, layers: Sequence[int]
) -> set[tuple[int, int]]:
    try:
        found = choose_receiver_heads(
            by_problem, by_problem, top_k=attention.n_receiver_heads, layers=layers
        )
    except NotEnoughDataError:
        return set()  # texts too short for this proximity: its row says null
    return {(head.layer, head.head) for head in found.heads}


def variant_scores(
    masses: Iterable[tuple[int, Mapping[str, torch.Tensor]]], variant: AttentionVariant
) -> pl.DataFrame:
    """Score every sentence by one variant.

    Args:
        masses: problem id and the tensors of its attention shard; read once.
        variant: not `off`. `light` takes the last tokens where the shards are of mode `light`, else
            the last sentences.

    Returns:
        `tables.ATTENTION_SCORES`.

    Raises:
        ConfigError: the shards do not hold what the variant is made of.
    """
    parts = [
        long_rows(problem_id, ("sentence_idx",), attention_score=_variants_scores(tensors, variant))
        for problem_id, tensors in masses
    ]
    return check_table(joined(parts), ATTENTION_SCORES, f"attention variant {variant.label}")


def _variants_scores(tensors: Mapping[str, torch.Tensor], variant: AttentionVariant) -> FloatArray:
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    control, last_n = variant.depth_control, variant.last_n or 0
    if "tail_mass" in arrays:
        n_kept = arrays["is_after"].shape[0]
        if variant.mode != "light" or (last_n > n_kept):
            raise ConfigError(
                f"variant {variant.label} of attention from the last {n_kept} tokens",
                "sweep.attention",
                f"change the study's attention to {variant.mode}",
            )
        tail, after = arrays["tail_mass"][:, -last_n:], arrays["is_after"][-last_n:]
        return light_scores(tail, after, depth_control=control)
    if variant.mode == "full":
        return full_scores(arrays["mass"], arrays["n_tokens"], depth_control=control)
    # The mean over the tokens of a sentence stands for the sentence as one query.
    lengths = np.maximum(arrays["n_tokens"].astype(np.float64), 1)
    by_sentence = arrays["mass"][:, -last_n:] / lengths[None, -last_n:, None]
    is_after = np.tri(len(lengths), k=-1, dtype=np.bool_)[-last_n:]
    return light_scores(by_sentence, is_after, depth_control=control)
