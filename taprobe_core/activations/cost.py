"""What a forward pass costs: operations and bytes by formula, exactly, written as a reader would.

In: the dimensions of a block and the lengths of texts. Out: counts, and with a measured rate the
time to expect. What does not belong here: measuring that rate (`gemm_rate`), which texts there are
(`pipeline.forecast`), how far a run is (`schedule`).

The convention counts what no implementation can leave out: two operations for each weight and
token, and the causal half of both attention products. Biases, norms, rotary embedding, softmax and
activation functions are not counted, nor is a sliding window taken off, so a share of the measured
rate is of matrix products alone.

Source: Kaplan et al. 2020, section 2.1 and table 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from taprobe_core.activations.gemm_rate import BlockShape, block_weights

_TIMES_1000 = ((1e16, 1e15, "P"), (1e12, 1e12, "T"), (1e9, 1e9, "G"), (0.0, 1e6, "M"))
"""From this number on, this is the unit, with this prefix; work stays in tera up to 10,000."""


def flop_text(flop: float) -> str:
    """Return an amount of floating-point work in words.

    Example:
        >>> flop_text(1.631e15), flop_text(74_200_000_000) + "/s"
        ('1,631 TFLOP', '74.2 GFLOP/s')
    """
    unit, prefix = next((unit, prefix) for least, unit, prefix in _TIMES_1000 if flop >= least)
    return f"{_three_digits(flop / unit)} {prefix}FLOP"


def bytes_text(n_bytes: float) -> str:
    """Return a size in words.

    Example:
        >>> bytes_text(1_395_864_371), bytes_text(900)
        ('1.3 GiB', '900 B')
    """
    for unit, power in (("TiB", 4), ("GiB", 3), ("MiB", 2), ("KiB", 1)):
        if n_bytes >= 1024**power:
            size = n_bytes / 1024**power
            return f"{size:.1f} {unit}" if size < 10 else f"{size:,.0f} {unit}"
    return f"{n_bytes:.0f} B"


def duration_text(seconds: float) -> str:
    """Return a time in words, in whole seconds or minutes.

    Example:
        >>> duration_text(59.4), duration_text(80), duration_text(8940)
        ('59 s', '1 min 20 s', '2 h 29 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes:02d} min"


def _three_digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 99.95 else f"{value:.3g}"


EFFICIENCY: Mapping[str, float] = MappingProxyType({"cpu": 0.80, "cuda": 0.85, "mps": 0.80})
"""Share of the rate of its matrix products that an extraction reaches, by kind of device, for
forecasts, as `python -m benchmarks.extraction` measures it; mps is taken to be like cpu. Of blocks
of some hundred values and more; a stand-in of 64 spends its time elsewhere."""

_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}


def pass_flop(shape: BlockShape, n_tokens: Sequence[int], n_blocks: int) -> int:
    """Return the operations of running texts through the first blocks of a model, each once.

    A block takes 2 · weights · T operations for a text of T tokens, and its attention 2 · T² ·
    d_attn: QK^T and PV are 2 · T² · d_attn each, of which causal attention needs half.

    Args:
        shape: of a block.
        n_tokens: tokens of each text, [text].
        n_blocks: blocks that run: one more than the deepest requested layer.

    Source:
        Kaplan et al. 2020, table 1: 2 · N + 2 · n_layer · n_ctx · d_attn a token.

    Example:
        >>> pass_flop(BlockShape.assumed(2), [3], 1)  # 48 weights, attention 2 wide
        324
    """
    weights, d_attn = block_weights(shape), shape.d_attn
    return n_blocks * sum(2 * weights * n + 2 * n * n * d_attn for n in n_tokens)


def attention_scores_flop(
    shape: BlockShape,
    n_tokens: Sequence[int],
    n_sentences: Sequence[int],
    n_layers: int,
    *,
    n_queries: int | None = None,
    query_block: int = 256,
) -> int:
    """Return the extra operations of vertical attention: the scores again, and their sums.

    In each head, a pair of a query and a key takes 2 · d_head operations for its score, and 2 for
    each sentence of the query's block, since the sum over the queries of a sentence is a product
    with the sentences' indicator. Causal attention has T²/2 pairs. The sums over keys, which follow
    on rows of sentences, are smaller by sentences / tokens and not counted.

    Args:
        shape: of a block.
        n_tokens: tokens of each text, [text].
        n_sentences: sentences of each text, [text].
        n_layers: layers whose attention is kept.
        n_queries: only this many last tokens ask (mode `light`); None for all (mode `full`).
        query_block: queries whose weights are summed at once.
    """
    flop = 0
    for length, sentences in zip(n_tokens, n_sentences, strict=True):
        if n_queries is None:
            two_pairs, n_sums = length**2, math.ceil(sentences * query_block / length)
        else:
            two_pairs, n_sums = 2 * n_queries * length, n_queries
        flop += two_pairs * shape.n_heads * (shape.d_head + min(n_sums, sentences))
    return n_layers * flop


def bytes_of(pooling: str, n_sentences: int, n_tokens: int, d_model: int, storage: str) -> int:
    """Return the bytes of the tensors that a pooling keeps of one text at one layer.

    Args:
        pooling: `tokens` keeps a row for each token of each sentence, and int64 offsets
            [sentence + 1]; every other pooling a row for each sentence.
        n_sentences: sentences of the text.
        n_tokens: tokens in its sentences; a token of two sentences counts twice.
        d_model: width of a row.
        storage: number type of the rows.
    """
    if pooling == "tokens":
        return n_tokens * d_model * _BYTES[storage] + 8 * (n_sentences + 1)
    return n_sentences * d_model * _BYTES[storage]


def attention_bytes(mode: str, n_heads: int, n_sentences: int, last_n: int) -> int:
    """Return the bytes of the tensors that vertical attention keeps of one text at one layer.

    Args:
        mode: `off`; `light`, float32 from `last_n` queries to each sentence and BOS; `full`, from
            each sentence to each sentence and BOS. Both with int32 lengths [sentence].
        n_heads: query heads.
        n_sentences: sentences of the text.
        last_n: queries in mode `light`.
    """
    if mode == "off":
        return 0
    n_rows = last_n if mode == "light" else n_sentences
    return 4 * (n_heads * n_rows * (n_sentences + 1) + n_sentences)


def expected_seconds(flop: float, gemm_rate: float, device: str, n_devices: int = 1) -> float:
    """Return what a forecast says of the time; loading weights and writing files are not in it.

    Args:
        flop: work.
        gemm_rate: measured FLOP/s of one device.
        device: its kind; `EFFICIENCY` says what share of the rate to expect.
        n_devices: devices that share the work.
    """
    return flop / (n_devices * gemm_rate * EFFICIENCY[device])


def cost_line(n_texts: int, n_tokens: int, flop: int, bytes_by_pooling: Mapping[str, int]) -> str:
    """Return the cost of a job in one line, to be said before it begins.

    Args:
        n_texts: texts to run.
        n_tokens: their tokens.
        flop: their operations.
        bytes_by_pooling: what will be written, by name.

    Example:
        >>> cost_line(20, 58_213, 1_631 * 10**12, {"mean": 1_395_864_371})
        '20 texts, 58,213 tokens, 1,631 TFLOP; mean 1.3 GiB'
    """
    texts = f"{n_texts:,} text{'s' * (n_texts != 1)}"
    sizes = ", ".join(f"{name} {bytes_text(size)}" for name, size in bytes_by_pooling.items())
    said = f"{texts}, {n_tokens:,} tokens, {flop_text(flop)}"
    return f"{said}; {sizes}" if sizes else said
