from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from taprobe_core.labels.noise import (
    Counts,
    importance_se,
    reconstruct_counts,
    resampling_se,
    successors,
    verify_resampling_identity,
)
from taprobe_core.rollouts import FolderRollouts, read_rollouts
from taprobe_core.study.config import MirrorSource, Model, Rollouts, StandInCheckpoint

NAN = np.nan


def arrays(*columns: list[float]) -> list[np.ndarray]:
    return [np.array(column, dtype=np.float64) for column in columns]


# --- successors


def test_a_successor_is_the_next_with_rollouts_in_its_problem() -> None:
    problem_id = np.array([1, 1, 1, 1, 2, 2, 3])
    (accuracy,) = arrays([0.1, NAN, 0.3, NAN, 0.5, 0.6, 0.7])

    assert successors(problem_id, accuracy).tolist() == [2, 2, -1, -1, 5, -1, -1]
    assert successors(problem_id[:0], accuracy[:0]).tolist() == []


# --- counts


@st.composite
def truths(draw: st.DrawFn, n_max: int = 100) -> tuple[int, int, int, int, int, int, int]:
    n = draw(st.integers(1, n_max))
    k = draw(st.integers(0, n))
    nd = draw(st.integers(0, n))
    kd = draw(st.integers(max(0, k + nd - n), min(k, nd)))
    distinct = draw(st.integers(1, n))
    next_n = draw(st.integers(1, n_max))
    return n, k, nd, kd, distinct, draw(st.integers(0, next_n)), next_n


def published(truth: tuple[int, ...]) -> list[np.ndarray]:
    n, k, nd, kd, distinct, next_k, next_n = truth
    importance = kd / nd - next_k / next_n if nd else 0.0
    return arrays([k / n], [nd / n], [1 - distinct / n], [importance], [next_k / next_n])


@given(truth=truths())
def test_counts_reproduce_the_published_shares(truth: tuple[int, ...]) -> None:
    counts = reconstruct_counts(*published(truth))

    n, k, nd, kd = truth[:4]
    found = counts.n_rollouts[0]
    assert n <= found <= 100
    assert counts.n_correct[0] / found == pytest.approx(k / n)
    assert counts.n_dissimilar[0] / found == pytest.approx(nd / n)
    if found == n and nd:
        assert counts.n_dissimilar_correct[0] == kd


@given(truth=truths(40))
def test_counts_are_exact_where_every_rollout_has_an_answer(truth: tuple[int, ...]) -> None:
    n, k, nd, kd = truth[:4]

    counts = reconstruct_counts(*published(truth), n_max=n)

    assert [column[0] for column in counts[:3]] == [n, k, nd]
    assert counts.n_dissimilar_correct[0] == (kd if nd or truth[5] == 0 else counts[3][0])


def test_counts_are_unknown_where_nothing_fits() -> None:
    counts = reconstruct_counts(
        *arrays(
            # no accuracy, no dissimilar share, no n up to 100, no whole count of dissimilar
            # correct ones, one above n_dissimilar, no successor
            [NAN, 0.5, 1 / 101, 0.5, 0.5, 0.5],
            [0.5, NAN, 0.0, 0.02, 0.02, 0.02],
            [0.0, 0.0, 0.0, 0.29, 0.29, 0.29],
            [0.0, 0.0, 0.0, 0.111, 0.9, 0.0],
            [0.5, 0.5, 0.5, 0.5, 0.6, NAN],
        )
    )

    assert np.isnan(counts.n_rollouts).tolist() == [True, True, True, False, False, False]
    assert counts.n_rollouts[3:].tolist() == [100, 100, 100]
    assert counts.n_dissimilar[3:].tolist() == [2, 2, 2]
    assert np.isnan(counts.n_dissimilar_correct).all()


def test_an_unknown_duplicate_share_puts_no_constraint() -> None:
    columns = arrays([0.5], [0.5], [1 / 3], [0.0], [0.5])

    with_share = reconstruct_counts(*columns)
    columns[2][:] = NAN
    without = reconstruct_counts(*columns)

    assert (with_share.n_rollouts[0], without.n_rollouts[0]) == (96, 100)


# --- standard errors


def counts(n: float, k: float, nd: float, kd: float) -> Counts:
    return Counts(*arrays([n], [k], [nd], [kd]))


def test_the_standard_error_is_the_unbiased_plug_in() -> None:
    own, following = counts(100, 40, 20, 5), counts(90, 45, 0, NAN)

    se = importance_se(own, following)[0]

    assert se == pytest.approx((0.25 * 0.75 / 19 + 0.5 * 0.5 / 89) ** 0.5)
    assert resampling_se(own, following)[0] == pytest.approx(
        (0.4 * 0.6 / 99 + 0.5 * 0.5 / 89) ** 0.5
    )


def test_a_single_dissimilar_rollout_borrows_the_rate_of_the_sentence() -> None:
    se = importance_se(counts(100, 40, 1, 1), counts(90, 45, 0, NAN))[0]

    assert se == pytest.approx((0.4 * 0.6 * 100 / 99 + 0.5 * 0.5 / 89) ** 0.5)


@pytest.mark.parametrize(
    ("own", "following"),
    [
        (counts(100, 40, 0, 0), counts(90, 45, 0, NAN)),
        (counts(100, 40, 20, NAN), counts(90, 45, 0, NAN)),
        (counts(100, 40, 1, NAN), counts(90, 45, 0, NAN)),
        (counts(100, 40, 20, 5), counts(NAN, NAN, NAN, NAN)),
        (counts(100, 40, 20, 5), counts(1, 1, 0, NAN)),
        (counts(1, 1, 1, 1), counts(90, 45, 0, NAN)),
    ],
)
def test_the_standard_error_is_unknown_where_a_count_is(own: Counts, following: Counts) -> None:
    assert np.isnan(importance_se(own, following)[0])


def test_the_standard_error_is_unbiased_under_the_binomial_model() -> None:
    rng = np.random.default_rng(7)
    nd, n, pd, q = 12, 60, 0.3, 0.8
    kd, k = rng.binomial(nd, pd, 40_000), rng.binomial(n, q, 40_000)
    size = np.ones(40_000)

    own = Counts(size * n, kd.astype(float), size * nd, kd.astype(float))
    se = importance_se(own, Counts(size * n, k.astype(float), size * 0, size * 0))

    spread = (kd / nd - k / n).var()
    assert np.mean(se**2) == pytest.approx(pd * (1 - pd) / nd + q * (1 - q) / n, rel=0.02)
    assert np.mean(se**2) == pytest.approx(spread, rel=0.03)


def test_taking_rows_keeps_the_unknown() -> None:
    taken = Counts(*arrays([1, 2], [1, 1], [0, 1], [NAN, 1])).take(np.array([1, -1]))

    assert taken.n_rollouts[0] == 2
    assert np.isnan([column[1] for column in taken]).all()


# --- identity


def test_the_identity_shows_where_it_breaks() -> None:
    sentences = pl.DataFrame(
        {
            "problem_id": [1, 1, 1, 2, 2],
            "sentence_idx": [1, 0, 2, 0, 1],
            "accuracy": [0.5, 0.2, 0.9, 0.4, None],
            "resampling_importance_accuracy": [0.4, 0.3 + 1e-6, 0.0, 0.1, 0.0],
        }
    )

    found = verify_resampling_identity(sentences)

    assert found["is_exact"].to_list() == [False, True, None, None, None]
    assert found["residual"][0] == pytest.approx(-1e-6)
    loose = verify_resampling_identity(sentences, tolerance=1e-5)
    assert loose["is_exact"].to_list() == [True, True, None, None, None]


# --- the published dataset


@pytest.mark.real_data
def test_the_published_measures_are_shares_of_whole_counts(real_rollouts: Path) -> None:
    options = Rollouts(source=MirrorSource(kind="mirror", folder=str(real_rollouts)))
    frames = []
    for name in ("deepseek-r1-distill-llama-8b", "deepseek-r1-distill-qwen-14b"):
        model = Model(
            rollouts_dir=name,
            checkpoint=StandInCheckpoint(kind="stand_in", architecture="qwen2"),
            n_layers=4,
        )
        for setting in ("correct_base_solution", "incorrect_base_solution"):
            tables = read_rollouts(FolderRollouts(real_rollouts), model, options, setting)
            identity = verify_resampling_identity(tables.sentences)
            assert identity["is_exact"].null_count() == 6
            assert identity["is_exact"].all()
            frames.append(tables.sentences)

    column = {name: pl.concat(frames)[name].to_numpy() for name in frames[0].columns}
    # Problem ids repeat over settings: a change of sentence_idx to 0 marks a trace.
    trace = np.cumsum(column["sentence_idx"] == 0)
    index = successors(trace, column["accuracy"])
    found = reconstruct_counts(
        column["accuracy"],
        column["different_trajectories_fraction"],
        column["overdeterminedness"],
        column["counterfactual_importance_accuracy"],
        np.where(index >= 0, column["accuracy"][index], np.nan),
    )

    assert len(index) == 2965
    assert not np.isnan(found.n_rollouts).any()
    divided = (index >= 0) & (found.n_dissimilar > 0)
    assert divided.sum() == 2524
    assert np.isnan(found.n_dissimilar_correct[divided]).sum() == 1
    undivided = (index >= 0) & (found.n_dissimilar == 0)
    assert (column["counterfactual_importance_accuracy"][undivided] == 0).all()
