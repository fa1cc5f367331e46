"""The attention variants of a sweep, scored from mass that is stored.

Every variant is a simple score (`attention.simple`) of the stored shards: no pass is run for one.
What does not belong here: which variants there are (`study.sweep`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import numpy.typing as npt
import polars as pl
import torch

from taprobe_core.attention.simple import full_scores, light_scores
from taprobe_core.attention_tables.rows import joined, long_rows
from taprobe_core.errors import ConfigError
from taprobe_core.study.sweep import AttentionVariant
from taprobe_core.tables import ATTENTION_SCORES, check_table

FloatArray = npt.NDArray[np.float64]


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
        long_rows(problem_id, ("sentence_idx",), attention_score=_scores(tensors, variant))
        for problem_id, tensors in masses
    ]
    return check_table(joined(parts), ATTENTION_SCORES, f"attention variant {variant.label}")


def _scores(tensors: Mapping[str, torch.Tensor], variant: AttentionVariant) -> FloatArray:
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
