"""Queries and keys of one text to attention mass between sentences, without a matrix of tokens.

The softmax weight of query token q on key token k is exp(scale * q.k - lse[q]), with lse the log of
the row's sum. So a block of weights needs nothing but its own scores and lse, and is summed over
sentences as soon as it is made: first over the queries of each sentence, which leaves a few rows,
then over the keys. Work follows the causal triangle; memory does not grow with its area.

Spans become tiles first, whose bounds are plain integers, so that a loop over tiles never asks the
device for a number. For models whose own way of attending is not known here, the weights that their
eager attention hands out, [head, query token, key token], are summed instead.

What does not belong here: running the model, choosing layers, and scores made from the mass.
Invariants: the mass is that of exact causal softmax attention, whatever the blocks; scores, weights
and sums are float32 for any input type. Each token of each span is a member once in exactly one
tile; spans may leave gaps, may overlap, and may stand in any order.

Source: Thought Anchors (arXiv:2506.19143) averages the attention between two sentences; the mass
is that average times both lengths, from which all published scores follow.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from taprobe_core.errors import ModelMismatchError, SpanError

Spans = torch.Tensor | Sequence[tuple[int, int]]
Bounds = npt.NDArray[np.int64]


class Tile(NamedTuple):
    """A range of tokens and the sentences that have a token in it.

    Attributes:
        start: first token.
        stop: token after the last.
        first: first sentence of the smallest range that holds every sentence touched.
        end: sentence after the last; equal to `first` where no sentence is touched.
        member: float32 [end - first, stop - start], 1 where the token is in the sentence, else 0.
    """

    start: int
    stop: int
    first: int
    end: int
    member: torch.Tensor

    def until(self, token: int) -> Tile:
        """Return the part of the tile before `token`; itself when it stops there or before."""
        if token >= self.stop:
            return self
        return self._replace(stop=token, member=self.member[:, : token - self.start])


def span_bounds(spans: Spans, n_tokens: int) -> Bounds:
    """Check spans against a text.

    Args:
        spans: half-open token ranges, [sentence, 2], on the CPU; gaps and overlaps are allowed.
        n_tokens: tokens of the text.

    Returns:
        The ranges, int64 [sentence, 2].

    Raises:
        SpanError: there is no span, or a span is empty or outside the text; names the first.
    """
    bounds = np.asarray(spans, dtype=np.int64).reshape(-1, 2)
    is_bad = (bounds[:, 0] < 0) | (bounds[:, 0] >= bounds[:, 1]) | (bounds[:, 1] > n_tokens)
    if len(bounds) and not is_bad.any():
        return bounds
    first = int(is_bad.argmax()) if len(bounds) else 0
    found = f"token range {bounds[first].tolist()}" if len(bounds) else "no token range"
    raise SpanError(
        f"{found} in a text of {n_tokens} tokens: empty or outside",
        f"sentence {first}",
        "build the spans again with the model's own tokenizer",
    )


def touched_ranges(bounds: Bounds, n_tokens: int, size: int) -> list[tuple[int, int]]:
    """Divide the text every `size` tokens and shrink each part to the tokens that spans cover.

    Args:
        bounds: half-open token ranges, [sentence, 2].
        n_tokens: tokens of the text.
        size: most tokens of a part.

    Returns:
        Half-open token ranges in text order; parts without a span are left out.
    """
    ranges = []
    for start in range(0, n_tokens, size):
        stop = min(start + size, n_tokens)
        inside = bounds[(bounds[:, 0] < stop) & (bounds[:, 1] > start)]
        if len(inside):
            ranges.append((max(start, int(inside[:, 0].min())), min(stop, int(inside[:, 1].max()))))
    return ranges


def cut(bounds: Bounds, ranges: Sequence[tuple[int, int]], device: torch.device) -> list[Tile]:
    """Make the tile of each token range.

    Args:
        bounds: half-open token ranges of the sentences, [sentence, 2], at least one.
        ranges: half-open token ranges, at least one.
        device: where the membership matrices go.

    Returns:
        One tile per range, in order. The matrices are views of one tensor of
        tiles x most sentences x most tokens, float32.
    """
    tokens = np.asarray(ranges, dtype=np.int64)
    starts, stops = tokens[:, :1], tokens[:, 1:]
    touches = (bounds[:, 0] < stops) & (bounds[:, 1] > starts)
    first = touches.argmax(axis=1)
    end = np.where(touches.any(axis=1), len(bounds) - touches[:, ::-1].argmax(axis=1), first)
    sentence = first[:, None] + np.arange((end - first).max())
    known = bounds[np.minimum(sentence, len(bounds) - 1)] - starts[..., None]
    edges = _to_device(np.where((sentence < end[:, None])[..., None], known, 0), device)
    position = torch.arange(int((stops - starts).max()), device=device)
    member = ((position >= edges[..., :1]) & (position < edges[..., 1:])).float()
    return [
        Tile(start, stop, a, b, member[index, : b - a, : stop - start])
        for index, ((start, stop), a, b) in enumerate(
            zip(tokens.tolist(), first.tolist(), end.tolist(), strict=True)
        )
    ]


def _to_device(values: Bounds, device: torch.device) -> torch.Tensor:
    tensor = torch.from_numpy(np.ascontiguousarray(values))
    if device.type != "cuda":
        return tensor.to(device)
    # A copy from pageable memory would wait for all work that the device still has to do.
    return tensor.pin_memory().to(device, non_blocking=True)


BLOCK_BYTES = 128 * 2**20
"""Scores of one block on an accelerator: enough work for a kernel, little beside the weights."""

ACCELERATOR_ROWS = 256
CPU_ROWS, CPU_COLUMNS = 64, 256
"""Block of scores on a CPU: small enough that the passes over it stay in the cache."""


class SentenceMass(NamedTuple):
    """Attention mass between the sentences of one text.

    Attributes:
        mass: float32 [head, sentence, sentence]; [h, i, j] is the sum over query tokens of
            sentence i and key tokens of sentence j of head h's softmax weight.
        bos_mass: float32 [head, sentence]; the same sum with token 0 alone as key, which is BOS, or
            in a text without one its first token.
    """

    mass: torch.Tensor
    bos_mass: torch.Tensor


class TailMass(NamedTuple):
    """Attention mass of the last tokens of one text on its sentences.

    Attributes:
        mass: float32 [head, query, sentence], queries in text order.
        bos_mass: float32 [head, query], on token 0.
        is_after: bool [query, sentence]; whether the query stands at or after the sentence's end.
    """

    mass: torch.Tensor
    bos_mass: torch.Tensor
    is_after: torch.Tensor


def sentence_mass(
    query: torch.Tensor,
    key: torch.Tensor,
    spans: Spans,
    scale: float,
    *,
    lse: torch.Tensor | None = None,
    query_block: int | None = None,
    key_block: int | None = None,
) -> SentenceMass:
    """Sum the causal attention of one text over every pair of sentences.

    Extra memory beside the result is one block of float32 scores, 4 * head * query_block *
    max(key_block, query_block) bytes, and copies of one block of queries and of its sums. With the
    defaults the scores take at most 128 MiB on an accelerator (up to 512 heads) and 3 MiB on a CPU
    at 40 heads. Without `lse` a row's sum has to be known before its weights are: then it is one
    band of scores, 4 * head * query_block * token bytes, at 8,192 tokens and 40 heads 320 MiB on
    an accelerator and 80 MiB on a CPU. Keys that are not float32 are copied once on a CPU.

    bf16 and fp16 scores are made with float32 output on CUDA and from float32 copies elsewhere, so
    none is rounded. Matrix products obey PyTorch's TF32 switch, which is off by default.

    Args:
        query: [token, head, d_head], after rotary embedding, any float type.
        key: [token, kv_head, d_head]; head h reads kv_head h // (head / kv_head).
        spans: half-open token ranges, [sentence, 2], on the CPU; may leave gaps and may overlap.
        scale: factor of the scores, positive; 1 / sqrt(d_head) in most models.
        lse: natural log of the sum of exp of the scaled causal scores, float32 [head, token], as
            fused attention returns it; None computes it.
        query_block: query tokens a block; None chooses by device.
        key_block: key tokens a block; None chooses by device and heads.

    Returns:
        Mass and BOS mass, float32, on the query's device. A row's sum is the sentence's tokens
        minus what they attend to outside all spans.

    Raises:
        SpanError: there is no span, or a span is empty or outside the text.
        ModelMismatchError: query, key and lse are not of one text, or the heads do not divide.
    """
    bounds = span_bounds(spans, len(query))
    blocks = _block_sizes(query, query_block, key_block)
    return SentenceMass(*_mass(query, key, scale, bounds, bounds, lse, blocks))


def tail_mass(
    query: torch.Tensor, key: torch.Tensor, spans: Spans, scale: float, last_n: int
) -> TailMass:
    """Sum the causal attention of each of the last tokens of a text over every sentence.

    Args:
        query: [token, head, d_head], after rotary embedding, any float type.
        key: [token, kv_head, d_head].
        spans: half-open token ranges, [sentence, 2], on the CPU.
        scale: factor of the scores, positive.
        last_n: query tokens, counted from the end of the text; a shorter text gives all of its own.

    Returns:
        Mass [head, query, sentence], BOS mass and eligibility, on the query's device, with
        query = min(last_n, token).

    Raises:
        SpanError: there is no span, or a span is empty or outside the text.
        ModelMismatchError: query and key are not of one text, or the heads do not divide.
    """
    bounds = span_bounds(spans, len(query))
    position = np.arange(max(0, len(query) - last_n), len(query))
    rows = np.stack([position, position + 1], axis=1)
    blocks = _block_sizes(query, None, None)
    mass, bos_mass = _mass(query, key, scale, rows, bounds, None, blocks)
    is_after = torch.from_numpy(position[:, None] >= bounds[:, 1])
    return TailMass(mass, bos_mass, is_after.to(query.device, non_blocking=True))


def _block_sizes(
    query: torch.Tensor, query_block: int | None, key_block: int | None
) -> tuple[int, int]:
    is_cpu = query.device.type == "cpu"
    rows = query_block or (CPU_ROWS if is_cpu else ACCELERATOR_ROWS)
    if key_block is None:
        fitting = BLOCK_BYTES // (4 * query.shape[1] * rows)
        key_block = CPU_COLUMNS if is_cpu else max(rows, fitting // rows * rows)
    return rows, key_block


def _mass(
    query: torch.Tensor,
    key: torch.Tensor,
    scale: float,
    row_bounds: Bounds,
    column_bounds: Bounds,
    lse: torch.Tensor | None,
    blocks: tuple[int, int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the mass of every range of queries on every range of keys, and on token 0."""
    _check_shapes(query, key, lse)
    (n_tokens, n_heads, _), device = query.shape, query.device
    shape = (n_heads, len(row_bounds), len(column_bounds))
    mass = torch.zeros(shape, dtype=torch.float32, device=device)
    bos_mass = torch.zeros(shape[:2], dtype=torch.float32, device=device)
    rows = touched_ranges(row_bounds, n_tokens, blocks[0])
    grid = [(at, min(at + blocks[1], n_tokens)) for at in range(0, n_tokens, blocks[1])]
    columns = cut(column_bounds, grid, device)
    # Autocast would round the weights before they are summed.
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        scorer = _Scorer(query, key, scale, min(blocks[0], n_tokens))
        for row, diagonal in zip(
            cut(row_bounds, rows, device), cut(column_bounds, rows, device), strict=True
        ):
            below = [column.until(row.start) for column in columns if column.start < row.start]
            left, weights = scorer.weights(row, [*below, diagonal], lse)
            at = slice(row.first, row.end)
            for column, weight in weights:
                # Queries first: a block has fewer sentences of queries than of keys.
                by_query = torch.bmm(left, weight)
                if column.start == 0:
                    bos_mass[:, at] += by_query[..., 0]
                mass[:, at, column.first : column.end] += by_query @ column.member.T
    return mass, bos_mass


class _Scorer:
    """Scores and weights of blocks of one text; a group of heads shares its keys, uncopied."""

    def __init__(
        self, query: torch.Tensor, key: torch.Tensor, scale: float, most_rows: int
    ) -> None:
        self.is_half = query.is_cuda and query.dtype in (torch.bfloat16, torch.float16)
        self.query = query
        self.key = (key if self.is_half else key.float()).permute(1, 2, 0)
        self.scale = scale
        self.is_future = torch.ones(
            most_rows, most_rows, dtype=torch.bool, device=query.device
        ).triu(1)

    def weights(
        self, row: Tile, columns: list[Tile], lse: torch.Tensor | None
    ) -> tuple[torch.Tensor, Iterator[tuple[Tile, torch.Tensor]]]:
        """Return M [head, sentence, query] and blocks W, so that M W sums weights over queries.

        The last of `columns` is the diagonal block; together they are all keys up to it.
        """
        n_heads = self.query.shape[1]
        queries = self._queries(row)
        member = row.member.expand(n_heads, -1, -1)
        if lse is not None:
            shift = -lse[:, row.start : row.stop, None]
            return member, (
                (tile, self._exp(self._block(queries, tile, row), shift))
                for tile in columns
                if tile.first < tile.end or tile.start == 0
            )
        scores = [self._block(queries, tile, row) for tile in columns]
        peak = torch.stack([block.amax(dim=-1) for block in scores]).amax(dim=0)
        shift = -self.scale * peak[..., None]
        total = torch.zeros_like(peak)
        for block in scores:
            total += self._exp(block, shift).sum(dim=-1)
        return member / total[:, None, :], zip(columns, scores, strict=True)

    def _queries(self, row: Tile) -> torch.Tensor:
        """Return the block's queries by group, [kv_head, heads of a group * query, d_head]."""
        n_kv_heads, d_head, _ = self.key.shape
        queries = self.query[row.start : row.stop]
        queries = queries.view(len(queries), n_kv_heads, -1, d_head)
        queries = queries.permute(1, 2, 0, 3).reshape(n_kv_heads, -1, d_head)
        return queries if self.is_half else queries.float()

    def _block(self, queries: torch.Tensor, column: Tile, row: Tile) -> torch.Tensor:
        """Return unscaled scores, [head, query, key], minus infinity where the key is later."""
        keys = self.key[..., column.start : column.stop]
        if self.is_half:
            scores = torch.bmm(queries, keys, out_dtype=torch.float32)
        else:
            scores = torch.bmm(queries, keys)
        n_rows = row.stop - row.start
        scores = scores.view(-1, n_rows, column.stop - column.start)
        if column.start == row.start:
            scores.masked_fill_(self.is_future[:n_rows, :n_rows], -torch.inf)
        return scores

    def _exp(self, scores: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        """Replace scores by exp(scale * scores + shift), in place."""
        return torch.add(shift, scores, alpha=self.scale, out=scores).exp_()


def _check_shapes(query: torch.Tensor, key: torch.Tensor, lse: torch.Tensor | None) -> None:
    n_tokens, n_heads, d_head = query.shape
    is_one_text = key.shape[0] == n_tokens and key.shape[2] == d_head
    is_grouped = n_heads % key.shape[1] == 0
    if not is_one_text or not is_grouped or (lse is not None and lse.shape != (n_heads, n_tokens)):
        shapes = {"query": query, "key": key} | ({} if lse is None else {"lse": lse})
        raise ModelMismatchError(
            ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in shapes.items()),
            "attention mass",
            "give query [token, head, d_head], key [token, kv_head, d_head] and lse [head, token] "
            "of one text, without cached keys",
        )


def sentence_mass_of(weights: torch.Tensor, spans: Spans) -> SentenceMass:
    """Sum weights over every pair of sentences.

    Args:
        weights: [head, token, token], queries before keys, any float type.
        spans: half-open token ranges, [sentence, 2], on the CPU; may leave gaps and may overlap.

    Returns:
        Mass [head, sentence, sentence] and BOS mass [head, sentence], float32.

    Raises:
        SpanError: there is no span, or a span is empty or outside the text.
    """
    bounds = span_bounds(spans, weights.shape[-1])
    return SentenceMass(*_summed(weights, bounds, bounds))


def tail_mass_of(weights: torch.Tensor, spans: Spans, last_n: int) -> TailMass:
    """Sum the weights of each of the last tokens over every sentence.

    Args:
        weights: [head, token, token], queries before keys, any float type.
        spans: half-open token ranges, [sentence, 2], on the CPU.
        last_n: query tokens, counted from the end; a shorter text gives all of its own.

    Returns:
        Mass [head, query, sentence], BOS mass and eligibility, with query = min(last_n, token).

    Raises:
        SpanError: there is no span, or a span is empty or outside the text.
    """
    n_tokens = weights.shape[-1]
    bounds = span_bounds(spans, n_tokens)
    position = np.arange(max(0, n_tokens - last_n), n_tokens)
    mass, bos_mass = _summed(weights, np.stack([position, position + 1], axis=1), bounds)
    is_after = torch.from_numpy(position[:, None] >= bounds[:, 1])
    return TailMass(mass, bos_mass, is_after.to(weights.device))


def _summed(
    weights: torch.Tensor, rows: Bounds, columns: Bounds
) -> tuple[torch.Tensor, torch.Tensor]:
    queries, keys = (_members(each, weights) for each in (rows, columns))
    mass, bos_mass = [], []
    with torch.no_grad(), torch.autocast(weights.device.type, enabled=False):
        for head in weights:
            by_query = queries @ head.float()
            mass.append(by_query @ keys.T)
            bos_mass.append(by_query[:, 0])
    return torch.stack(mass), torch.stack(bos_mass)


def _members(bounds: Bounds, weights: torch.Tensor) -> torch.Tensor:
    """Which token is in which range, float32 [range, token]."""
    position = torch.arange(weights.shape[-1], device=weights.device)
    edges = torch.from_numpy(np.ascontiguousarray(bounds)).to(weights.device)
    return ((position >= edges[:, :1]) & (position < edges[:, 1:])).float()
