"""Token states to what is kept of each sentence, the number type it is kept in, and its faults.

Poolings: mean; last token; maximum over tokens; boundary, the state of the token before the
sentence; tokens, every token of every sentence. Spans may overlap, may leave gaps, and may stand in
any order. The same rules find the faults of stored shards, one line each. What does not belong
here: where the states come from (`forward`, `fused`), and reading shards from the store.

The invariant: a pooled row depends on its own tokens alone, so a bad token cannot spoil another
sentence, nor another text of the pack; sums are float32 whatever the model computes in, in an order
that only the sentence's length decides; a kept value is finite.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import nn
from torch.nn.functional import embedding_bag

from taprobe_core.activations.packing import to_device
from taprobe_core.errors import NonFiniteError, SpanError
from taprobe_core.study import Pooling, Storage

FLOAT16_MAX = 65504.0
"""Largest finite float16."""


@dataclass(frozen=True, eq=False)
class SpanIndex:
    """Spans of a text, or of all texts of a pack one after another.

    Attributes:
        starts: int64 [span], first token.
        ends: int64 [span], token after the last.
        tokens: int64 [number of tokens in all spans], span after span.
        offsets: int64 [span + 1]: span i is tokens[offsets[i]:offsets[i + 1]].
    """

    starts: torch.Tensor
    ends: torch.Tensor
    tokens: torch.Tensor
    offsets: torch.Tensor

    def to(self, device: torch.device) -> SpanIndex:
        """Return the index on `device`."""
        parts = (self.starts, self.ends, self.tokens, self.offsets)
        return SpanIndex(*(to_device(part, device) for part in parts))


def span_index(spans: torch.Tensor | Sequence[tuple[int, int]], n_tokens: int) -> SpanIndex:
    """Check spans against a text and return their index, on the CPU.

    Args:
        spans: half-open token ranges, [span, 2], integers.
        n_tokens: tokens of the text.

    Raises:
        SpanError: there is no span, or a span is empty or outside the text; names the first.
    """
    ranges = torch.as_tensor(spans, dtype=torch.int64, device="cpu").reshape(-1, 2)
    starts, ends = ranges.unbind(1)
    bad = (starts < 0) | (ends > n_tokens) | (starts >= ends)
    if not len(ranges) or bad.any():
        first = int(bad.to(torch.int8).argmax()) if len(ranges) else 0
        found = f"token range {ranges[first].tolist()}" if len(ranges) else "no token range"
        raise SpanError(
            f"{found} in a text of {n_tokens} tokens: empty or outside",
            f"sentence {first}",
            "build the spans again with the model's own tokenizer",
        )
    return _index(starts, ends)


def join_indexes(indexes: Sequence[SpanIndex], shifts: Sequence[int]) -> SpanIndex:
    """Return the index of a pack: each text's spans, moved to where its text lies.

    Args:
        indexes: one per text.
        shifts: where each text starts in the pack.
    """
    pairs = list(zip(indexes, shifts, strict=True))
    starts = torch.cat([index.starts + shift for index, shift in pairs])
    return _index(starts, torch.cat([index.ends + shift for index, shift in pairs]))


def _index(starts: torch.Tensor, ends: torch.Tensor) -> SpanIndex:
    lengths = ends - starts
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    tokens = torch.arange(int(offsets[-1])) + (starts - offsets[:-1]).repeat_interleave(lengths)
    return SpanIndex(starts, ends, tokens, offsets)


def pool(
    hidden: torch.Tensor, index: SpanIndex, poolings: Sequence[Pooling]
) -> dict[Pooling, torch.Tensor]:
    """Pool token states by a checked index, on the device where they are.

    Args:
        hidden: [token, d_model], any float type.
        index: on the same device. A span that starts at token 0, which only a text without BOS
            can have, has no token before it: its `boundary` is the state of token 0 itself.
        poolings: which to make.

    Returns:
        For each pooling [span, d_model]: `mean` float32, the others in the type of `hidden`;
        for `tokens` [number of tokens in all spans, d_model].
    """
    pooled: dict[Pooling, torch.Tensor] = {}
    for pooling in poolings:
        if pooling == "mean" or pooling == "max":
            pooled[pooling] = _reduced(hidden, index, pooling)
        else:
            before = (index.starts - 1).clamp(min=0)
            rows = {"last": index.ends - 1, "boundary": before, "tokens": index.tokens}
            pooled[pooling] = hidden.index_select(0, rows[pooling])
    return pooled


def _reduced(
    hidden: torch.Tensor, index: SpanIndex, pooling: Literal["mean", "max"]
) -> torch.Tensor:
    if hidden.is_cuda:
        from taprobe_core.activations.kernels import reduce_spans

        return reduce_spans(hidden, index.starts, index.ends, pooling)
    if pooling == "max":
        gathered, lengths = hidden.index_select(0, index.tokens), index.ends - index.starts
        return torch.segment_reduce(gathered, "max", lengths=lengths)
    # A bag of tokens is summed in a fixed order: equal runs give equal bits, which an atomic
    # index_add does not promise, and a matrix product would spread one NaN over every sentence.
    return embedding_bag(index.tokens, hidden.float(), index.offsets[:-1], mode="mean")


def value_range(rows: torch.Tensor) -> torch.Tensor:
    """Return the smallest and the largest value of each row, float32 [row, 2].

    Both are NaN where a value of the row is, and infinite where one is.

    Args:
        rows: [row, d_model].
    """
    return torch.stack(torch.aminmax(rows, dim=1), dim=1).float()


def fits(ranges: torch.Tensor, storage: Storage) -> bool:
    """Whether a type holds the values of these ranges without overflow.

    Args:
        ranges: `value_range`, finite.
        storage: the type.
    """
    largest = float(ranges.abs().amax()) if ranges.numel() else 0.0
    return largest <= torch.finfo(getattr(torch, storage)).max


OVERFLOW_FIX = "set the model's dtype to bfloat16 or float32; float16 overflows above 65504"


def check_finite(
    ranges: torch.Tensor,
    rows: torch.Tensor,
    where: str,
    fix: Callable[[], str] = lambda: OVERFLOW_FIX,
) -> None:
    """Refuse rows that hold what is no number.

    Args:
        ranges: `value_range` of the rows, on the CPU.
        rows: [row, d_model], for the message alone.
        where: problem, layer, pooling and what a row is, for the message.
        fix: asked for the advice, where a row is refused.

    Raises:
        NonFiniteError: a value is NaN or infinite; names the first row and dimension.
    """
    bad = ~torch.isfinite(ranges).all(dim=1)
    if not bad.any():
        return
    row = int(bad.to(torch.int8).argmax())
    values = rows[row].float().cpu()
    dimension = int((~torch.isfinite(values)).to(torch.int8).argmax())
    raise NonFiniteError(
        f"{int(bad.sum())} of {len(ranges)} rows are not finite, first {float(values[dimension])} "
        f"in row {row}, dimension {dimension}",
        f"{where} {row}",
        fix(),
    )


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
    sums = mass.sum(axis=-1, dtype=np.float64)
    if not covered[0]:  # in a text without BOS, token 0 may be the first sentence's
        sums += bos_mass
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
