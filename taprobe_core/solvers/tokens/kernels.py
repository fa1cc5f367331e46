"""The memory-bound steps of token probes as one kernel each: Triton, CUDA only.

What does not belong here: the same steps in PyTorch (`states`, `learner`), of which these are equal
but for rounding, and where they are chosen.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

_BLOCK = 1024


def read_states(
    values: torch.Tensor, rows: torch.Tensor, centre: torch.Tensor, inverse: torch.Tensor
) -> torch.Tensor:
    """Gather states and scale them, (x - centre) * inverse.

    Args:
        values: [state, d], float16, bfloat16 or float32.
        rows: [token] int64, of `values`.
        centre: [d] float32.
        inverse: [d] float32.

    Returns:
        [token, d] float32.
    """
    n_features = values.shape[1]
    out = torch.empty(len(rows), n_features, device=values.device)
    grid = (len(rows), triton.cdiv(n_features, _BLOCK))
    _read[grid](values, rows, centre, inverse, out, D=n_features, BLOCK=_BLOCK)
    return out


@triton.jit  # type: ignore[untyped-decorator]
def _read(values, rows, centre, inverse, out, D: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_in = at < D
    state = tl.load(values + tl.load(rows + token) * D + at, mask=is_in).to(tl.float32)
    scaled = (state - tl.load(centre + at, mask=is_in)) * tl.load(inverse + at, mask=is_in)
    tl.store(out + token * D + at, scaled, mask=is_in)


def step_first_layer(
    weight: torch.Tensor,
    moments: tuple[torch.Tensor, torch.Tensor],
    gradient: torch.Tensor,
    bias_gradient: torch.Tensor,
    scaling: tuple[torch.Tensor, torch.Tensor],
    scaled: tuple[torch.Tensor, torch.Tensor],
    n_steps: torch.Tensor,
    *,
    learning_rate: float,
    weight_decay: float,
    betas: tuple[float, float],
    eps: float,
) -> None:
    """Take the gradient through the fold's scaling, step AdamW, and scale the new weights.

    In PyTorch that is five passes over the weights and their state more.

    Args:
        weight: [model, width, d] float32, stepped.
        moments: running mean of the gradient and of its square, like `weight`, updated.
        gradient: like `weight`, for the weights as scaled.
        bias_gradient: [model, width], of the layer's bias.
        scaling: mean [model, d] and inverse [model, 1, d] of each model's fold.
        scaled: weights times inverse, like `weight`, and their product with the mean,
            [model, width]; overwritten.
        n_steps: one float32, steps taken with this one.
        learning_rate: of AdamW.
        weight_decay: of AdamW, decoupled.
        betas: of AdamW.
        eps: of AdamW.
    """
    n_models, width, n_features = weight.shape
    _step[(n_models * width,)](
        weight,
        *moments,
        gradient,
        bias_gradient,
        *scaling,
        *scaled,
        n_steps,
        learning_rate,
        1 - learning_rate * weight_decay,
        eps,
        WIDTH=width,
        D=n_features,
        BETA_1=betas[0],
        BETA_2=betas[1],
        LOG_BETA_1=math.log(betas[0]),
        LOG_BETA_2=math.log(betas[1]),
        BLOCK=min(_BLOCK, triton.next_power_of_2(n_features)),
    )


@triton.jit  # type: ignore[untyped-decorator]
def _step(  # type: ignore[no-untyped-def]
    weight,
    mean,
    square,
    gradient,
    bias_gradient,
    fold_mean,
    fold_inverse,
    scaled,
    shift,
    n_steps,
    learning_rate,
    shrink,
    eps,
    WIDTH: tl.constexpr,
    D: tl.constexpr,
    BETA_1: tl.constexpr,
    BETA_2: tl.constexpr,
    LOG_BETA_1: tl.constexpr,
    LOG_BETA_2: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    own = row.to(tl.int64) * D
    fold = (row // WIDTH).to(tl.int64) * D
    # In float32, 1 - 0.999 ** t would lose a thousandth part of its digits at the start.
    t = tl.load(n_steps).to(tl.float64)
    step = (learning_rate / (1 - tl.exp(t * LOG_BETA_1))).to(tl.float32)
    root = tl.sqrt(1 - tl.exp(t * LOG_BETA_2)).to(tl.float32)
    to_bias = tl.load(bias_gradient + row)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, D, BLOCK):
        at = start + tl.arange(0, BLOCK)
        is_in = at < D
        centre = tl.load(fold_mean + fold + at, mask=is_in, other=0.0)
        inverse = tl.load(fold_inverse + fold + at, mask=is_in, other=0.0)
        g = tl.load(gradient + own + at, mask=is_in, other=0.0)
        g = (g - to_bias * centre) * inverse
        m = tl.load(mean + own + at, mask=is_in, other=0.0)
        v = tl.load(square + own + at, mask=is_in, other=0.0)
        m += (1 - BETA_1) * (g - m)
        v = BETA_2 * v + (1 - BETA_2) * g * g
        w = tl.load(weight + own + at, mask=is_in, other=0.0) * shrink
        w -= step * m / (tl.sqrt(v) / root + eps)
        tl.store(mean + own + at, m, mask=is_in)
        tl.store(square + own + at, v, mask=is_in)
        tl.store(weight + own + at, w, mask=is_in)
        folded = w * inverse
        tl.store(scaled + own + at, folded, mask=is_in)
        total += folded * centre
    tl.store(shift + row, tl.sum(total, 0))


def mean_by_softmax(
    scores: torch.Tensor, member: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Average values by the softmax of queries over the items of each group.

    Args:
        scores: [query and value, item, column] float32; the last item is that of an empty slot.
        member: [group, slot] int64, items of each group, then empty slots.

    Returns:
        Means, largest queries, and sums of exponentials of queries less the largest, each
        [group, column]; 0, the lowest score and 1 for a group without items.
    """
    n_groups, n_slots = member.shape
    n_items, n_columns = scores.shape[1:]
    mean, top, total = (torch.empty(n_groups, n_columns, device=scores.device) for _ in range(3))
    _mean[(n_groups, triton.cdiv(n_columns, _COLUMNS))](
        scores[0], scores[1], member, mean, top, total, n_items, n_columns,
        SLOTS=n_slots, CHUNK=_CHUNK, COLUMNS=_COLUMNS,
    )  # fmt: skip
    return mean, top, total


_CHUNK, _COLUMNS = 16, 64


@triton.jit  # type: ignore[untyped-decorator]
def _mean(  # type: ignore[no-untyped-def]
    query, value, member, mean, top, total, n_items, n_columns,
    SLOTS: tl.constexpr, CHUNK: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    is_column = column < n_columns
    largest = tl.full([COLUMNS], -1e30, tl.float32)
    summed = tl.zeros([COLUMNS], tl.float32)
    mixed = tl.zeros([COLUMNS], tl.float32)
    start = 0
    while start < SLOTS:
        slot = start + tl.arange(0, CHUNK)
        item = tl.load(member + group * SLOTS + slot, mask=slot < SLOTS, other=n_items - 1)
        is_item = item < n_items - 1
        at = item[:, None] * n_columns + column[None, :]
        is_in = is_item[:, None] & is_column[None, :]
        q = tl.load(query + at, mask=is_in, other=float("-inf"))
        v = tl.load(value + at, mask=is_in, other=0.0)
        new = tl.maximum(largest, tl.max(q, 0))
        weight = tl.exp(q - new[None, :])
        shrink = tl.exp(largest - new)
        summed = summed * shrink + tl.sum(weight, 0)
        mixed = mixed * shrink + tl.sum(weight * v, 0)
        largest = new
        # Empty slots stand last.
        is_full = tl.sum(is_item.to(tl.int32), 0) == CHUNK
        start = tl.where(is_full, start + CHUNK, SLOTS)
    out = group * n_columns + column
    summed = tl.where(summed > 0, summed, 1.0)
    tl.store(mean + out, mixed / summed, mask=is_column)
    tl.store(top + out, largest, mask=is_column)
    tl.store(total + out, summed, mask=is_column)


def mean_by_softmax_gradient(
    gradient: torch.Tensor,
    scores: torch.Tensor,
    home: torch.Tensor,
    n_slots: int,
    found: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    out: torch.Tensor,
) -> None:
    """Write the gradient for the scores from that for the means.

    Args:
        gradient: [group, column].
        scores: as given to `mean_by_softmax`.
        home: [item, copy] int64, flat slots that hold each item; the number of slots, or more, for
            none. Items behind those it lists are left as they are.
        n_slots: of a group.
        found: as `mean_by_softmax` returned it.
        out: [query and value, item, column].
    """
    n_groups, n_columns = gradient.shape
    n_items, n_copies = home.shape
    grid = (triton.cdiv(n_items, _CHUNK), triton.cdiv(n_columns, _COLUMNS))
    _mean_gradient[grid](
        gradient, scores[0], scores[1], home, *found, out[0], out[1], n_items, n_groups, n_columns,
        SLOTS=n_slots, COPIES=n_copies, CHUNK=_CHUNK, COLUMNS=_COLUMNS,
    )  # fmt: skip


@triton.jit  # type: ignore[untyped-decorator]
def _mean_gradient(  # type: ignore[no-untyped-def]
    gradient, query, value, home, mean, top, total, query_out, value_out,
    n_items, n_groups, n_columns,
    SLOTS: tl.constexpr, COPIES: tl.constexpr, CHUNK: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    item = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    is_item, is_column = item < n_items, column < n_columns
    is_own = is_item[:, None] & is_column[None, :]
    own = item[:, None] * n_columns + column[None, :]
    q = tl.load(query + own, mask=is_own, other=0.0)
    v = tl.load(value + own, mask=is_own, other=0.0)
    to_query = tl.zeros([CHUNK, COLUMNS], tl.float32)
    to_value = tl.zeros([CHUNK, COLUMNS], tl.float32)
    for copy in range(COPIES):
        group = tl.load(home + item * COPIES + copy, mask=is_item, other=0) // SLOTS
        is_in = is_own & (group < n_groups)[:, None]
        at = group[:, None] * n_columns + column[None, :]
        largest = tl.load(top + at, mask=is_in, other=0.0)
        # What is in no group is at home in one without items, whose gradient is 0.
        weight = tl.exp(tl.minimum(q - largest, 0.0)) / tl.load(total + at, mask=is_in, other=1.0)
        up = weight * tl.load(gradient + at, mask=is_in, other=0.0)
        to_value += up
        to_query += up * (v - tl.load(mean + at, mask=is_in, other=0.0))
    tl.store(query_out + own, to_query, mask=is_own)
    tl.store(value_out + own, to_value, mask=is_own)
