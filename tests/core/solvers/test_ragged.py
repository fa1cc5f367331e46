"""Token sets, their index tables, and pooling against one sentence at a time in plain torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from taprobe_core.errors import DataError
from taprobe_core.solvers.tokens.pooling import LOWEST, POOLINGS, n_scores, pool, pool_gradient
from taprobe_core.solvers.tokens.ragged import (
    ALIGNED,
    FEW_SHAPES,
    RaggedTokens,
    Rounding,
    TokenBatch,
    plan_batches,
)


def sets(lengths, d=3, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return RaggedTokens(torch.randn(offsets[-1], d, generator=generator).to(dtype), offsets)


def pooled_alone(scores, pooling, window, is_soft):
    """Pool one sentence: scores [score, token], as the definitions read."""

    def largest(values):
        return (torch.softmax(values, 0) * values).sum() if is_soft else values.max()

    if pooling == "attention":
        return (torch.softmax(scores[0], 0) * scores[1]).sum()
    if pooling == "multimax":
        return largest(scores[0])
    starts = range(max(scores.shape[1] - window + 1, 1))
    windows = [scores[:, start : start + window] for start in starts]
    return largest(torch.stack([(torch.softmax(each[0], 0) * each[1]).sum() for each in windows]))


def scored(batch: TokenBatch, pooling, seed=0):
    generator = torch.Generator().manual_seed(seed)
    size = n_scores(pooling), len(batch.token), 6
    scores = torch.randn(size, generator=generator, dtype=torch.float64)
    scores[:, -1] = LOWEST
    return scores


FEW = Rounding(16, 4, 4)
ROUNDINGS = [ALIGNED, FEW]


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("is_soft", [False, True])
@pytest.mark.parametrize("window", [1, 4, 10])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_pooling_and_its_gradient_equal_one_sentence_at_a_time(pooling, window, is_soft, rounding):
    lengths = np.array([1, 60, 2, 9, 10, 11, 33, 4, 1])
    tokens = sets(lengths)
    windowed = window if pooling == "rolling_multimax" else None
    n, n_tokens = len(lengths), lengths.sum()
    (batch,) = plan_batches(tokens, [np.arange(n)], windowed, "cpu", rounding)
    scores = scored(batch, pooling)
    pooled, saved = pool(scores, batch, pooling, is_soft)
    assert torch.isfinite(pooled).all()
    weight = torch.randn(pooled.shape, dtype=torch.float64, generator=torch.Generator())
    weight[n:] = 0
    found = pool_gradient(weight, saved, scores, batch, pooling)

    leaf = scores[:, :n_tokens].clone().requires_grad_()
    expected = torch.stack([
        torch.stack([
            pooled_alone(leaf[:, low:high, head], pooling, window, is_soft) for head in range(6)
        ])
        for low, high in zip(tokens.offsets[:-1], tokens.offsets[1:], strict=True)
    ])  # fmt: skip
    (expected * weight[:n]).sum().backward()
    torch.testing.assert_close(pooled[:n], expected.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found[:, :n_tokens], leaf.grad, rtol=1e-11, atol=1e-12)
    assert (found[:, n_tokens:] == 0).all()


@pytest.mark.parametrize("pooling", ["multimax", "rolling_multimax"])
def test_a_shared_maximum_gives_its_gradient_to_the_first(pooling):
    tokens = sets([5, 3])
    window = 1 if pooling == "rolling_multimax" else None
    (batch,) = plan_batches(tokens, [np.array([0, 1])], window, "cpu")
    scores = torch.zeros(n_scores(pooling), len(batch.token), 1)
    scores[-1, [2, 4, 6, 7], 0] = 1.0
    scores[:, -1] = LOWEST
    _, saved = pool(scores, batch, pooling, is_soft=False)
    found = pool_gradient(torch.tensor([[2.0], [3.0]]), saved, scores, batch, pooling)
    assert found[-1, :8, 0].tolist() == [0, 0, 2, 0, 0, 0, 3, 0]


def test_scores_far_apart_neither_overflow_nor_vanish():
    tokens = sets([12, 3])
    (batch,) = plan_batches(tokens, [np.array([0, 1])], 4, "cpu")
    scores = torch.full((2, len(batch.token), 1), LOWEST)
    scores[0, :15, 0] = torch.linspace(-400.0, 400.0, 15)
    scores[1, :15, 0] = torch.arange(15.0)
    pooled, saved = pool(scores, batch, "rolling_multimax", is_soft=False)
    assert pooled[:, 0].tolist() == pytest.approx([11.0, 14.0])
    assert torch.isfinite(
        pool_gradient(torch.ones(2, 1), saved, scores, batch, "rolling_multimax")
    ).all()


def test_windows_longer_than_every_sentence_are_the_sentences():
    tokens = sets([3, 1, 7])
    (plain,) = plan_batches(tokens, [np.arange(3)], None, "cpu")
    (rolling,) = plan_batches(tokens, [np.arange(3)], 50, "cpu")
    scores = scored(plain, "attention")
    as_attention, _ = pool(scores, plain, "attention", is_soft=False)
    as_rolling, _ = pool(scores, rolling, "rolling_multimax", is_soft=False)
    torch.testing.assert_close(as_attention, as_rolling)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=12),
    st.one_of(st.none(), st.integers(1, 70)),
    st.randoms(use_true_random=False),
    st.sampled_from(ROUNDINGS),
)
def test_tables_place_every_token_and_only_those(lengths, window, random, rounding):
    tokens = sets(lengths)
    order = list(range(len(lengths)))
    random.shuffle(order)
    chosen = np.array(order[: max(len(order) // 2, 1)])
    (batch,) = plan_batches(tokens, [chosen], window, "cpu", rounding)
    n_filling = len(batch.row) - len(chosen)
    assert batch.row.tolist() == [*chosen, *[len(tokens)] * n_filling]
    assert n_filling > 0 if rounding is FEW else n_filling == 0
    n_tokens = int(tokens.lengths[chosen].sum())
    torch.testing.assert_close(tokens.values[batch.token[:n_tokens]], tokens.take(chosen).values)
    assert len(batch.token) > n_tokens
    assert len(batch.token) % rounding.tokens == 0
    n_windows = [max(n - (window or 1) + 1, 1) for n in tokens.lengths[chosen].tolist()]
    n_items = [n_tokens] if window is None else [n_tokens, sum(n_windows)]
    empty = [len(batch.token) - 1, len(batch.stages[0].member)][: len(n_items)]
    for slots, n, hole in zip(batch.stages, n_items, empty, strict=True):
        flat = slots.member.flatten().tolist()
        assert set(flat) <= {*range(n), hole}
        for item, homes in enumerate(slots.home.tolist()):
            real = [home for home in homes if home < len(flat)]
            if item < n:
                assert real
                assert sorted(real) == [at for at, held in enumerate(flat) if held == item]
            else:  # in no group: at home where nothing is
                assert all(flat[home] == hole and home // slots.member.shape[1] >= len(chosen)
                           for home in real)  # fmt: skip


def test_batches_of_like_size_have_tables_of_one_shape():
    rng = np.random.default_rng(0)
    tokens = sets(np.clip(np.exp(rng.normal(3, 0.6, 2400)), 1, 200).astype(int))
    batches = np.array_split(rng.permutation(2400), 60)
    for window in (None, 10):
        planned = plan_batches(tokens, batches, window, "cpu", FEW_SHAPES)
        assert len({batch.shapes for batch in planned}) < 12
        assert len({len(batch.row) for batch in planned}) == 1
        again = planned[0].copy()
        assert again.shapes == planned[0].shapes
        again.flat.zero_()
        assert all(not table.any() for stage in again.stages for table in stage)
        assert planned[0].token.any()


def test_windows_are_runs_of_tokens_inside_a_sentence():
    (batch,) = plan_batches(sets([5, 2, 3]), [np.arange(3)], 3, "cpu")
    windows, sentences = batch.stages
    assert windows.member.tolist() == [[0, 1, 2], [1, 2, 3], [2, 3, 4], [5, 6, 31], [7, 8, 9]]
    assert sentences.member.tolist() == [[0, 1, 2], [3, 5, 5], [4, 5, 5]]


def test_sentences_are_joined_in_their_order_and_keep_their_type():
    parts = [torch.full((n, 2), float(n), dtype=torch.bfloat16) for n in (2, 1, 3)]
    tokens = RaggedTokens.from_sentences(parts)
    assert (len(tokens), tokens.n_features) == (3, 2)
    assert tokens.values.dtype == torch.bfloat16
    assert tokens.lengths.tolist() == [2, 1, 3]
    assert tokens.take(np.array([2, 0])).values[:, 0].tolist() == [3, 3, 3, 2, 2]
    assert RaggedTokens.from_sentences([np.ones((2, 3))]).values.dtype == torch.float32


@pytest.mark.parametrize(
    ("values", "offsets"),
    [
        (torch.zeros(4), np.array([0, 4])),
        (torch.zeros(4, 2, dtype=torch.float64), np.array([0, 4])),
        (torch.zeros(4, 2), np.array([0, 2, 2, 4])),
        (torch.zeros(4, 2), np.array([0, 3])),
        (torch.zeros(4, 2), np.array([1, 4])),
        (torch.zeros(4, 2), np.array([0.0, 4.0])),
        (torch.zeros(4, 2), np.array([], dtype=np.int64)),
    ],
)
def test_token_sets_that_make_no_sense_are_refused(values, offsets):
    with pytest.raises(DataError, match="token sets\nFix: "):
        RaggedTokens(values, offsets)


@pytest.mark.parametrize("parts", [[], [np.ones((2, 3)), np.ones((2, 4))], [np.ones(3)]])
def test_sentences_of_several_widths_are_refused(parts):
    with pytest.raises(DataError, match="one d"):
        RaggedTokens.from_sentences(parts)
