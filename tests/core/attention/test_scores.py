"""Scores made from attention mass: against loops written from the definitions, planted facts."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from scipy import stats

from taprobe_core.attention.receivers import (
    choose_receiver_heads,
    distance_law,
    near_diagonal_share,
    receiver_scores,
    sink_share,
    split_half_reliability,
)
from taprobe_core.attention.scores import (
    average_matrix,
    full_scores,
    head_kurtosis,
    light_scores,
    proximity_sensitivity,
    vertical_scores,
)
from taprobe_core.errors import NonFiniteError, NotEnoughDataError

Array = npt.NDArray[Any]
NAN = float("nan")


def text(n_sentences: int = 23, n_heads: int = 3, seed: int = 0) -> tuple[Array, Array, Array]:
    """Mass, BOS mass and lengths as softmax attention gives them: rows sum to their tokens."""
    rng = np.random.default_rng(seed)
    n_tokens = rng.integers(1, 40, n_sentences)
    share = rng.exponential(size=(n_heads, n_sentences, n_sentences + 1)) ** 3
    share[..., 1:] *= np.tri(n_sentences)
    share *= n_tokens[:, None] / share.sum(axis=-1, keepdims=True)
    return share[..., 1:].astype(np.float32), share[..., 0].astype(np.float32), n_tokens


def vertical_by_loop(average: Array, proximity: int, depth_control: str) -> Array:
    """The published definition, one entry at a time."""
    heads, n, _ = average.shape
    scores = np.full((heads, n), NAN)
    for head in range(heads):
        rows: list[list[float]] = []
        for q in range(n):
            row = [average[head, q, k] for k in range(n) if q - k >= proximity]
            if depth_control == "rank" and row:
                row = list(stats.rankdata(row) / len(row))
            elif depth_control == "count":
                row = [len(row) * value for value in row]
            rows.append(row)
        for k in range(n):
            column = [rows[q][k] for q in range(k + proximity, n)]
            scores[head, k] = np.mean(column) if column else NAN
    return scores


@pytest.mark.parametrize("depth_control", ["none", "rank", "count"])
@pytest.mark.parametrize("proximity", [1, 4, 23, 40])
def test_vertical_scores_are_the_published_ones(proximity: int, depth_control: Any) -> None:
    mass, _, n_tokens = text()
    mass[0, 9, 2:5] = mass[0, 9, 1]  # ties
    average = average_matrix(mass, n_tokens)
    assert average.dtype == np.float64
    assert average[1, 7, 3] == mass[1, 7, 3] / (n_tokens[7] * n_tokens[3])
    scores = vertical_scores(average, proximity=proximity, depth_control=depth_control)
    np.testing.assert_allclose(
        scores, vertical_by_loop(average, proximity, depth_control), rtol=1e-12
    )
    assert (np.isnan(scores).sum(axis=-1) == min(proximity, 23)).all()


def test_depth_controls_take_out_the_lift_of_rows_with_few_candidates() -> None:
    even = np.tri(60, k=-1) / np.maximum(np.arange(60), 1)[:, None]
    plain = vertical_scores(even[None], proximity=1)[0, :-1]
    assert (np.diff(plain) < 0).all()
    counted = vertical_scores(even[None], proximity=1, depth_control="count")[0, :-1]
    np.testing.assert_allclose(counted, 1.0)
    ranked = vertical_scores(even[None], proximity=1, depth_control="rank")[0, :-1]
    np.testing.assert_allclose(
        ranked, [np.mean([(c + 1) / 2 / c for c in range(k + 1, 60)]) for k in range(59)]
    )


def test_layers_and_heads_pass_through() -> None:
    mass, _, n_tokens = text(n_heads=4)
    stacked = average_matrix(mass.reshape(2, 2, 23, 23), n_tokens)
    scores = vertical_scores(stacked, depth_control="rank")
    alone = vertical_scores(average_matrix(mass, n_tokens), depth_control="rank")
    assert np.array_equal(scores.reshape(4, 23), alone, equal_nan=True)
    assert np.array_equal(head_kurtosis(scores).ravel(), head_kurtosis(alone))


@pytest.mark.parametrize("fault", ["mass", "length"])
def test_mass_that_is_not_finite_is_refused(fault: str) -> None:
    mass, _, n_tokens = text()
    if fault == "mass":
        mass[1, 5, 2] = np.inf
    else:
        n_tokens[5] = 0
    with pytest.raises(NonFiniteError, match="not finite"):
        average_matrix(mass, n_tokens)


def test_kurtosis_is_scipys_without_the_undefined_scores() -> None:
    mass, _, n_tokens = text()
    scores = vertical_scores(average_matrix(mass, n_tokens))
    kurtosis = head_kurtosis(scores)
    np.testing.assert_allclose(kurtosis, stats.kurtosis(scores[:, :-4], axis=-1), rtol=1e-12)
    centred = scores[0, :-4] - scores[0, :-4].mean()
    assert kurtosis[0] == pytest.approx((centred**4).mean() / (centred**2).mean() ** 2 - 3)
    rest = head_kurtosis(scores, skip_first_sentence=True)
    np.testing.assert_allclose(rest, stats.kurtosis(scores[:, 1:-4], axis=-1), rtol=1e-12)
    assert np.isnan(head_kurtosis(np.full((2, 9), NAN))).all()
    assert np.isnan(head_kurtosis(np.full((2, 9), 0.25))).all()
    assert np.isnan(head_kurtosis(np.ones((2, 0)))).all()


def kurtoses(
    n_problems: int = 8, shape: tuple[int, int] = (4, 5), noise: float = 0.1
) -> dict[int, Array]:
    rng = np.random.default_rng(3)
    true = rng.normal(size=shape)
    return {10 * i: true + noise * rng.normal(size=shape) for i in range(n_problems)}


def test_receiver_heads_are_ranked_by_mean_kurtosis_without_the_first_layer() -> None:
    kurtosis = kurtoses()
    kurtosis[0][0] += 100
    kurtosis[10][2, 3] = NAN
    kurtosis[0][3], kurtosis[10][3], kurtosis[20][3] = NAN, NAN, NAN
    chosen = choose_receiver_heads(kurtosis, [20, 0, 10, 0], top_k=7)
    mean = {
        (layer, head): np.nanmean([kurtosis[each][layer, head] for each in (0, 10, 20)])
        for layer in (1, 2)
        for head in range(5)
    }
    best = sorted(mean, key=lambda key: -mean[key])[:7]
    assert [(each.layer, each.head) for each in chosen.heads] == best
    np.testing.assert_allclose(
        [each.kurtosis for each in chosen.heads], [mean[key] for key in best]
    )
    assert {each.n_problems for each in chosen.heads if (each.layer, each.head) != (2, 3)} == {3}
    assert chosen.train_problems == (0, 10, 20)
    assert chosen.n_undefined == 16
    assert choose_receiver_heads(kurtosis, [0], top_k=1, skip_first_layer=False).heads[0].layer == 0


def test_no_other_problem_can_change_the_chosen_heads() -> None:
    kurtosis = kurtoses(noise=1.0)
    chosen = choose_receiver_heads(kurtosis, [0, 10, 20])
    for problem_id in (30, 40, 50, 60, 70):
        kurtosis[problem_id] = np.full((9, 1), np.inf)
    assert choose_receiver_heads(kurtosis, [0, 10, 20]) == chosen


@pytest.mark.parametrize(
    ("train", "what"),
    [
        ([], "no training problems"),
        ([0, 5], r"no kurtosis of training problems \[5\]"),
        ([80], "no head"),
    ],
)
def test_training_problems_that_cannot_choose_are_refused(train: list[int], what: str) -> None:
    kurtosis = kurtoses() | {80: np.full((4, 5), NAN)}
    with pytest.raises(NotEnoughDataError, match=what):
        choose_receiver_heads(kurtosis, train)


def test_rows_may_be_some_of_the_models_layers() -> None:
    kurtosis, layers = kurtoses(shape=(3, 2)), [0, 12, 36]
    chosen = choose_receiver_heads(kurtosis, kurtosis, layers=layers, top_k=3)
    assert {each.layer for each in chosen.heads} <= {12, 36}
    vertical = np.random.default_rng(0).random((3, 2, 6))
    vertical[..., -1] = NAN
    scores = receiver_scores(vertical, chosen.heads, layers=layers)
    expected = np.mean([vertical[layers.index(h.layer), h.head] for h in chosen.heads], axis=0)
    np.testing.assert_allclose(scores, expected)
    assert np.isnan(scores[-1])
    for heads, used in ((chosen.heads, [0, 1, 2]), ((), layers)):
        with pytest.raises(NotEnoughDataError):
            receiver_scores(vertical, heads, layers=used)


def test_split_halves_agree_as_far_as_heads_do() -> None:
    noisy = kurtoses(n_problems=9, shape=(5, 40), noise=1.0)
    noisy[40][1, 0] = NAN
    for problem_id in noisy:
        noisy[problem_id][2, 1] = NAN
    split = split_half_reliability(noisy)
    assert split.halves == ((0, 20, 40, 60, 80), (10, 30, 50, 70))
    means = []
    for half in split.halves:
        values = np.stack([noisy[each][1:] for each in half])
        means.append(np.nansum(values, axis=0) / np.maximum((~np.isnan(values)).sum(axis=0), 1))
    both = np.ones((4, 40), dtype=bool)
    both[1, 1] = False
    assert split.pearson == pytest.approx(np.corrcoef(means[0][both], means[1][both])[0, 1])
    assert (split.n_heads, split.n_undefined) == (159, 1)
    assert 0.6 < split.pearson < 0.95
    assert np.isnan(split_half_reliability(noisy, [20]).pearson)


@pytest.mark.parametrize("depth_control", ["mean", "sum"])
def test_simple_full_scores_follow_their_definition(depth_control: Any) -> None:
    mass, _, n_tokens = text()
    n_tokens[7], mass[:, 7] = 0, 0
    expected = np.zeros(23)
    for i in range(23):
        later = [
            mass[:, j, i].astype(float).mean() / n_tokens[j]
            for j in range(i + 1, 23)
            if n_tokens[j]
        ]
        expected[i] = getattr(np, depth_control)(later) if later else 0.0
    scores = full_scores(mass, n_tokens, depth_control=depth_control)
    np.testing.assert_allclose(scores, expected, rtol=1e-12)
    assert scores[-1] == 0


@pytest.mark.parametrize("depth_control", ["mean", "sum"])
def test_simple_light_scores_follow_their_definition(depth_control: Any) -> None:
    rng = np.random.default_rng(2)
    tail, ends, positions = rng.random((3, 4, 6)), [3, 9, 20, 27, 29, 30], [26, 27, 28, 29]
    is_after = np.array([[at >= end for end in ends] for at in positions])
    expected = np.zeros(6)
    for i, end in enumerate(ends):
        eligible = [tail[:, q, i].mean() for q, at in enumerate(positions) if at >= end]
        expected[i] = getattr(np, depth_control)(eligible) if eligible else 0.0
    scores = light_scores(tail, is_after, depth_control=depth_control)
    np.testing.assert_allclose(scores, expected, rtol=1e-12)
    assert scores[-1] == 0 < scores[-2]


def test_shares_of_sinks_and_of_the_diagonal() -> None:
    mass, bos_mass, n_tokens = text()
    shares = sink_share(mass, bos_mass, n_tokens)
    for head in range(3):
        assert shares.bos[head] == pytest.approx(bos_mass[head].sum() / n_tokens.sum())
        on_first = mass[head, 1:, 0].sum() / n_tokens[1:].sum()
        assert shares.first_sentence[head] == pytest.approx(on_first)
        near = sum(mass[head, i, j] for i in range(23) for j in range(23) if abs(i - j) <= 1)
        assert near_diagonal_share(mass)[head] == pytest.approx(near / mass[head].sum())
    np.testing.assert_allclose(near_diagonal_share(mass, width=22), 1)
    assert np.isnan(near_diagonal_share(np.zeros((1, 4, 4)))).all()
    assert np.isnan(sink_share(mass[:, :1, :1], bos_mass[:, :1], n_tokens[:1]).first_sentence).all()


def test_a_planted_distance_law_is_found() -> None:
    rng = np.random.default_rng(5)
    n_tokens = rng.integers(2, 60, 80)
    distance = (4 + np.arange(79, -1, -1)) / 2
    exponents = np.array([[-1.5, 0.0], [-0.4, 0.7], [0.0, 0.0]])
    vertical = 0.03 * distance ** exponents[:, :1] * n_tokens ** exponents[:, 1:]
    vertical[1] *= np.exp(0.5 * rng.normal(size=80))
    vertical[:, -4:] = NAN
    vertical[0, 5] = 0
    law = distance_law(vertical, n_tokens)
    assert law.n_sentences.tolist() == [75, 76, 76]
    np.testing.assert_allclose(law.slope_distance[[0, 2]], exponents[[0, 2], 0], atol=1e-9)
    np.testing.assert_allclose(np.exp(law.intercept[[0, 2]]), 0.03)
    regressors = np.stack([np.ones(76), np.log(distance)[:76], np.log(n_tokens)[:76]], axis=1)
    fit, residual, *_ = np.linalg.lstsq(regressors, np.log(vertical[1, :76]))
    found = [law.intercept[1], law.slope_distance[1], law.slope_length[1]]
    np.testing.assert_allclose(found, fit, rtol=1e-9)
    total = 76 * np.log(vertical[1, :76]).var()
    assert law.r_squared[1] == pytest.approx(1 - residual[0] / total)
    assert law.r_squared[0] == pytest.approx(1)
    assert np.isnan(law.r_squared[2])


def test_a_law_that_cannot_be_fitted_is_undefined() -> None:
    vertical = np.random.default_rng(0).random((2, 12))
    same_length = distance_law(vertical, np.full(12, 7))
    assert np.isnan(same_length.slope_length).all()
    assert np.isfinite(same_length.slope_distance).all()
    vertical[1, 3:] = NAN
    few = distance_law(vertical, np.arange(1, 13))
    assert few.n_sentences.tolist() == [12, 3]
    assert [np.isnan(field[1]) for field in few[:4]] == [True] * 4


def test_sensitivity_to_proximity_against_scipy() -> None:
    mass, _, n_tokens = text()
    average = average_matrix(mass, n_tokens)
    found = proximity_sensitivity(average, proximities=(1, 4, 8, 21, 30))
    usual = vertical_scores(average)
    for index, proximity in enumerate((1, 4, 8)):
        scores = vertical_scores(average, proximity=proximity)
        n = 23 - max(proximity, 4)
        expected = [
            stats.spearmanr(a[:n], b[:n]).statistic for a, b in zip(scores, usual, strict=True)
        ]
        np.testing.assert_allclose(found.spearman[index], expected)
        np.testing.assert_allclose(found.kurtosis[index], head_kurtosis(scores))
    assert np.isnan(found.spearman[3:]).all()
    assert found.n_undefined.tolist() == [0, 0, 0, 0, 3]
