"""What is wrong with kept activations and attention, as lines for an asset check.

In: the shards of one site and setting, by problem. Out: one line per fault. What does not belong
here: reading them from the store, and refusing to write them (pooling does).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import nn

from taprobe_core.activations.pooling import OVERFLOW_FIX

MASS_TOLERANCE = 1e-3
"""Share by which a token may hand out more than one: float32 sums, a device's own log-sum-exp."""


def overflow_fix(model: nn.Module) -> str:
    """Return what helps where a model's states are not finite, by its type and its weights.

    Args:
        model: the one that made them; its weights are read.
    """
    dtype = next(model.parameters()).dtype
    is_half = dtype == torch.float16
    for name, weight in model.named_parameters():
        # Cast to float16 a weight may become infinite, but never NaN.
        if weight.isnan().any() or (not is_half and weight.isinf().any()):
            return (
                f"take the checkpoint again from its source: its weight {name} holds values that "
                "are no numbers, whatever the dtype"
            )
    if is_half:
        return OVERFLOW_FIX
    return (
        f"check that config.json belongs to the weights, which are finite and do not fit it: "
        f"{str(dtype).removeprefix('torch.')} overflows at 3e38 alone"
    )


def finite_faults(rows: Mapping[int, torch.Tensor], unit: str = "sentence") -> list[str]:
    """Return one line per problem that has rows with a value that is NaN or infinite.

    Args:
        rows: problem_id to [row, d_model].
        unit: what a row stands for.
    """
    faults = []
    for problem_id, each in sorted(rows.items()):
        bad = (~torch.isfinite(each)).any(dim=1).nonzero().flatten().tolist()
        if bad:
            faults.append(
                f"problem {problem_id}: {len(bad)} of {len(each)} {unit}s are not finite, first "
                f"{unit} {bad[0]}"
            )
    return faults


def shape_faults(
    rows: Mapping[int, torch.Tensor], n_rows: Mapping[int, int], unit: str = "sentence"
) -> list[str]:
    """Return one line per problem whose shard is absent, unknown, or of another shape.

    Args:
        rows: problem_id to [row, d_model]; only the shapes are read.
        n_rows: problem_id to the number of rows it should have.
        unit: what a row stands for.
    """
    faults = [f"problem {problem_id}: no shard" for problem_id in sorted({*n_rows} - {*rows})]
    widths = sorted({each.shape[1] for each in rows.values()})
    if len(widths) > 1:
        faults.append(f"d_model differs between problems: {widths}")
    for problem_id, each in sorted(rows.items()):
        expected = n_rows.get(problem_id)
        if expected is None:
            faults.append(f"problem {problem_id}: a shard, but no spans")
        elif len(each) != expected:
            faults.append(f"problem {problem_id}: {len(each)} rows for {expected} {unit}s")
    return faults


def mass_faults(
    tensors: Mapping[str, torch.Tensor], spans: Sequence[tuple[int, int]], n_tokens: int
) -> list[str]:
    """Return what is wrong with the attention of one problem at one layer.

    Each query token hands out one unit of attention, to tokens up to itself. A token on the border
    of two sentences counts in both, so there a sentence may reach into the next, and a row sum
    more than its tokens.

    Args:
        tensors: of an `AttentionShard`, of mode `full` or `light`.
        spans: half-open token range of each sentence.
        n_tokens: tokens of the text.
    """
    bounds = np.asarray(spans, dtype=np.int64).reshape(-1, 2)
    mass = tensors["mass" if "mass" in tensors else "tail_mass"].numpy()
    rows = bounds if "mass" in tensors else _last_tokens(mass.shape[1], n_tokens)
    bos_mass = tensors["bos_mass"].numpy()
    expected = (len(mass), len(rows), len(bounds))
    if mass.shape != expected or bos_mass.shape != expected[:2]:
        return [
            f"mass {list(mass.shape)} and BOS mass {list(bos_mass.shape)} for {len(bounds)} "
            f"sentences, {len(rows)} rows"
        ]
    if not np.isfinite(mass).all() or not np.isfinite(bos_mass).all():
        n_bad = int((~np.isfinite(mass)).sum() + (~np.isfinite(bos_mass)).sum())
        return [f"{n_bad} masses are NaN or infinite"]
    is_future = bounds[:, 0] >= rows[:, 1, None]
    covered = np.zeros(n_tokens, dtype=np.int64)
    for start, end in bounds:
        covered[start:end] += 1
    sums = mass.sum(axis=-1, dtype=np.float64) + bos_mass
    most = (rows[:, 1] - rows[:, 0]) * covered.max() * (1 + MASS_TOLERANCE)
    lengths = tensors["n_tokens"].numpy()
    counted = {
        "masses are below zero": (mass < 0).sum() + (bos_mass < 0).sum(),
        "masses are on sentences that come later": np.count_nonzero(mass[:, is_future]),
        "rows hold more than their tokens": (sums > most).sum(),
        "sentences have another length": (lengths != bounds[:, 1] - bounds[:, 0]).sum(),
    }
    if "is_after" in tensors:
        is_after = tensors["is_after"].numpy()
        wrong = is_after != (rows[:, :1] >= bounds[:, 1])
        counted["queries stand on the wrong side of a sentence"] = wrong.sum()
    return [f"{n} {what}" for what, n in counted.items() if n]


def _last_tokens(n: int, n_tokens: int) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    """Return the range of each of the last `n` tokens."""
    position = np.arange(n_tokens - n, n_tokens)
    return np.stack([position, position + 1], axis=1)
