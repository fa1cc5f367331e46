"""Exact rates and labels drawn from them."""

from __future__ import annotations

import numpy as np
import pytest

from taprobe_core.demo.policy import drawn_rollouts, drawn_trace
from taprobe_core.demo.task import seeded
from taprobe_core.demo.truth import (
    Rates,
    choose_problems,
    exact_rates,
    simulated_importance,
    true_importance,
)
from taprobe_core.labels import Rollout, published_measures, trigram_masked_dissimilar

PROBLEM = choose_problems(4, 0)[1]
TEXTS = [s.text for s in drawn_trace(PROBLEM, seeded("truth test")).sentences]
RATES = exact_rates(PROBLEM, TEXTS, trigram_masked_dissimilar)


def test_rates_are_those_of_many_rollouts() -> None:
    n = 4000
    for index in range(len(TEXTS) - 1):
        rests = drawn_rollouts(PROBLEM, TEXTS[:index], n, seeded("rates", index))
        other = [
            r.is_correct for r in rests if trigram_masked_dissimilar(TEXTS[index], r.first_sentence)
        ]
        assert len(other) / n == pytest.approx(RATES[index].replaced, abs=0.035)
        if len(other) > 500:
            assert np.mean(other) == pytest.approx(RATES[index].right_if_replaced, abs=0.09)


def test_simulated_labels_scatter_around_the_truth_as_real_ones_do() -> None:
    true = true_importance(PROBLEM, TEXTS, trigram_masked_dissimilar)
    drawn = simulated_importance(RATES, 100, 4000, np.random.default_rng(1))
    assert drawn.shape == (4000, len(TEXTS))
    mass = np.array([rate.replaced for rate in RATES])
    # Where hardly anything is dissimilar, an empty set pulls the mean to zero.
    sure = mass > 0.1
    assert drawn.mean(axis=0)[sure] == pytest.approx(np.array(true)[sure], abs=0.01)

    labels = []
    for draw in range(60):
        banks = [
            [
                Rollout(r.answer, r.is_correct, r.first_sentence)
                for r in drawn_rollouts(PROBLEM, TEXTS[:i], 25, seeded("scatter", draw, i))
            ]
            for i in range(len(TEXTS))
        ]
        measured = published_measures(TEXTS, banks, trigram_masked_dissimilar)
        labels.append([row["counterfactual_importance_accuracy"] for row in measured])
    spread = simulated_importance(RATES, 25, 4000, np.random.default_rng(2)).std(axis=0)
    ratio = np.std(labels, axis=0)[sure][:-1] / np.maximum(spread[sure][:-1], 1e-9)
    assert np.median(ratio[spread[sure][:-1] > 0]) == pytest.approx(1.0, abs=0.15)


def test_without_dissimilar_rollouts_and_at_the_end_a_label_is_zero() -> None:
    rates = [Rates(0.0, 0.0, 0.7), Rates(1.0, 0.0, 1.0), Rates(1.0, 0.0, 1.0)]
    drawn = simulated_importance(rates, 10, 50, np.random.default_rng(0))
    assert (drawn[:, [0, 2]] == 0).all()
    assert (drawn[:, 1] == -1).all()
