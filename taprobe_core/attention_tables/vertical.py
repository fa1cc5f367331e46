"""Attention mass of one layer's problems to scores of sentences and figures of heads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import polars as pl
import torch

from taprobe_core.attention.confounds import distance_law, near_diagonal_share, sink_share
from taprobe_core.attention.scores import average_matrix, proximity_sensitivity, vertical_scores
from taprobe_core.attention.simple import full_scores, light_scores
from taprobe_core.attention_tables.rows import joined, long_rows
from taprobe_core.study import Attention
from taprobe_core.tables import (
    ATTENTION_HEADS,
    ATTENTION_SCORES,
    HEAD_KURTOSIS,
    VERTICAL_SCORES,
    check_table,
)

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
