"""Pooling, storage, progress and the checks on kept activations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from taprobe_core.activations.pooling import (
    FLOAT16_MAX,
    check_finite,
    finite_faults,
    fits,
    join_indexes,
    pool,
    shape_faults,
    span_index,
    value_range,
)
from taprobe_core.activations.schedule import Progress
from taprobe_core.errors import NonFiniteError, SpanError
from taprobe_core.study.parts import Pooling

NAN, INF = float("nan"), float("inf")


@st.composite
def pooled_texts(draw: st.DrawFn) -> tuple[torch.Tensor, list[tuple[int, int]]]:
    """States with a few very large columns, and spans that overlap and leave gaps."""
    n_tokens = draw(st.integers(1, 40))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    hidden = torch.randn(n_tokens, 6, generator=generator)
    hidden[:, 0] *= draw(st.sampled_from([1.0, 1e4]))
    starts = draw(st.lists(st.integers(0, n_tokens - 1), min_size=1, max_size=12))
    spans = [(start, draw(st.integers(start + 1, n_tokens))) for start in starts]
    return hidden.to(draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))), spans


def span_means(hidden: torch.Tensor, spans: list[tuple[int, int]]) -> torch.Tensor:
    return pool(hidden, span_index(spans, len(hidden)), ["mean"])["mean"]


@given(pooled_texts())
def test_means_equal_a_float64_reference(
    text: tuple[torch.Tensor, list[tuple[int, int]]],
) -> None:
    hidden, spans = text
    means = span_means(hidden, spans)
    exact = hidden.double().numpy()
    expected = np.stack([exact[start:end].mean(axis=0) for start, end in spans])
    assert means.dtype == torch.float32
    np.testing.assert_allclose(means.numpy(), expected, rtol=1e-5, atol=1e-5 * abs(exact).max())


def test_a_bad_token_spoils_its_own_sentence_only() -> None:
    hidden = torch.ones(9, 3)
    hidden[0], hidden[4], hidden[8] = INF, NAN, -INF
    means = span_means(hidden, [(1, 4), (3, 5), (5, 8)])
    assert torch.isfinite(means).all(dim=1).tolist() == [True, False, True]


@pytest.mark.parametrize(
    ("spans", "where"),
    [
        ([(0, 2), (3, 3)], "sentence 1"),
        ([(0, 2), (3, 2)], "sentence 1"),
        ([(-1, 2)], "sentence 0"),
        ([(0, 1), (1, 2), (3, 6)], "sentence 2"),
        ([], "sentence 0"),
    ],
)
def test_a_span_that_is_empty_or_outside_is_refused(
    spans: list[tuple[int, int]], where: str
) -> None:
    with pytest.raises(SpanError) as caught:
        span_means(torch.zeros(5, 2), spans)
    assert caught.value.where == where
    assert "5 tokens" in caught.value.what


POOLINGS: tuple[Pooling, ...] = ("mean", "last", "max", "boundary", "tokens")


@given(pooled_texts())
def test_every_pooling_equals_its_definition(
    text: tuple[torch.Tensor, list[tuple[int, int]]],
) -> None:
    hidden, spans = text
    padded = torch.cat([torch.zeros_like(hidden[:1]), hidden])  # so that each has a token before it
    shifted = [(start + 1, end + 1) for start, end in spans]
    pooled = pool(padded, span_index(shifted, len(padded)), POOLINGS)
    for at, (start, end) in enumerate(shifted):
        assert torch.equal(pooled["last"][at], padded[end - 1])
        assert torch.equal(pooled["boundary"][at], padded[start - 1])
        assert torch.equal(pooled["max"][at], padded[start:end].amax(dim=0))
    tokens = torch.cat([padded[start:end] for start, end in shifted])
    assert torch.equal(pooled["tokens"], tokens)
    assert {name: rows.dtype for name, rows in pooled.items() if name != "mean"} == dict.fromkeys(
        POOLINGS[1:], hidden.dtype
    )


def test_the_maximum_of_a_bad_token_is_bad() -> None:
    hidden = torch.ones(6, 2)
    hidden[1, 0] = NAN
    rows = pool(hidden, span_index([(0, 3), (3, 6)], 6), ["max"])["max"]
    assert torch.isnan(rows).tolist() == [[True, False], [False, False]]


def test_texts_of_a_pack_are_pooled_as_alone() -> None:
    hidden = torch.randn(12, 3)
    one, two = span_index([(1, 3), (2, 5)], 5), span_index([(1, 2), (3, 7)], 7)
    joined = pool(hidden, join_indexes([one, two], [0, 5]), POOLINGS)
    alone = [pool(hidden[:5], one, POOLINGS), pool(hidden[5:], two, POOLINGS)]
    for pooling in POOLINGS:
        assert torch.equal(joined[pooling], torch.cat([each[pooling] for each in alone]))


@pytest.mark.parametrize(
    ("largest", "storage", "is_held"),
    [
        (FLOAT16_MAX, "float16", True),
        (-FLOAT16_MAX, "float16", True),
        (65520.0, "float16", False),
        (-1e9, "float16", False),
        (1e9, "bfloat16", True),
        (3.4e38, "bfloat16", False),
        (3.4e38, "float32", True),
    ],
)
def test_what_a_storage_type_holds(largest: float, storage: str, is_held: bool) -> None:
    rows = torch.tensor([[0.5, largest], [1.0, 2.0]])
    assert fits(value_range(rows), storage) == is_held  # type: ignore[arg-type]
    cast = rows.to(getattr(torch, storage))
    assert bool(torch.isfinite(cast).all()) == is_held


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_what_is_not_finite_is_refused(value: float) -> None:
    rows = torch.zeros(4, 3)
    check_finite(value_range(rows), rows, "problem 7, layer 3, mean")
    rows[2, 1] = rows[3, 0] = value
    with pytest.raises(NonFiniteError) as caught:
        check_finite(value_range(rows), rows, "problem 7, layer 3, mean, sentence")
    assert caught.value.where == "problem 7, layer 3, mean, sentence 2"
    assert f"2 of 4 rows are not finite, first {value} in row 2, dimension 1" in caught.value.what


def test_finite_faults_name_problem_and_sentence() -> None:
    bad = torch.zeros(3, 2, dtype=torch.float16)
    bad[1, 1] = INF
    bad[2, 0] = NAN
    found = finite_faults({9: bad, 4: torch.zeros(2, 2)})
    assert found == ["problem 9: 2 of 3 sentences are not finite, first sentence 1"]


def test_shape_faults_compare_shards_with_spans() -> None:
    means = {1: torch.zeros(2, 4), 2: torch.zeros(3, 4), 3: torch.zeros(1, 5)}
    assert shape_faults({1: means[1]}, {1: 2}) == []
    assert shape_faults(means, {1: 2, 2: 4, 8: 1}) == [
        "problem 8: no shard",
        "d_model differs between problems: [4, 5]",
        "problem 2: 3 rows for 4 sentences",
        "problem 3: a shard, but no spans",
    ]


@pytest.mark.parametrize(
    ("progress", "line"),
    [
        (Progress(0, 3, 0, 900, 5.0), "0/3 texts, 0/900 tokens (0 %)"),
        (Progress(1, 3, 300, 900, 0.0), "1/3 texts, 300/900 tokens (33 %)"),
        (
            Progress(1, 3, 300, 900, 2.0),
            "1/3 texts, 300/900 tokens (33 %), 150 tokens/s, 4 s left",
        ),
        (
            Progress(1, 9, 1000, 9000, 10.0),
            "1/9 texts, 1,000/9,000 tokens (11 %), 100 tokens/s, 1 min 20 s left",
        ),
        (
            Progress(1, 9, 10, 9000, 10.0),
            "1/9 texts, 10/9,000 tokens (0 %), 1 tokens/s, 2 h 29 min left",
        ),
        (
            Progress(3, 3, 900, 900, 9.0),
            "3/3 texts, 900/900 tokens (100 %), 100 tokens/s, 0 s left",
        ),
        (Progress(0, 0, 0, 0, 0.0), "0/0 texts, 0/0 tokens (100 %)"),
    ],
)
def test_progress_in_one_line(progress: Progress, line: str) -> None:
    assert progress.render() == line


@given(st.integers(1, 10**9), st.integers(1, 10**9), st.floats(1e-3, 1e6))
def test_rate_and_time_left_agree(done: int, left: int, elapsed_s: float) -> None:
    progress = Progress(1, 2, done, done + left, elapsed_s)
    assert progress.tokens_per_s is not None
    assert progress.eta_s is not None
    assert progress.eta_s * progress.tokens_per_s == pytest.approx(left)
