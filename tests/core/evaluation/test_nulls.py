from __future__ import annotations

import itertools

import numpy as np
import polars as pl
import pytest

from taprobe_core.evaluation.blocks import make_blocks
from taprobe_core.evaluation.nulls import null_distributions, null_p
from taprobe_core.metrics import pr_auc, spearman
from taprobe_core.probes.control_task import position_bin
from taprobe_core.tables import NULL_KINDS, NULLS, check_table

METRIC = {"anchor_binary": pr_auc, "importance_abs": spearman}
SIDE = {"anchor_binary": "is_positive", "importance_abs": "target_value"}


def _nulls(scores, labels, target, n_null=100, seed=0):
    recipes = scores[next(iter(scores))]["recipe"].unique()
    table = null_distributions(
        make_blocks(scores, labels), dict.fromkeys(recipes, target), n_null, seed
    )
    return check_table(table, NULLS, "test")


def _test_problems(scores, recipe):
    for _, own in scores.filter(recipe=recipe, split="test").group_by(
        "problem_id", maintain_order=True
    ):
        yield own.sort("sentence_idx")


@pytest.mark.parametrize("target", list(METRIC))
def test_draws_are_means_of_the_metric_over_relabelled_problems(make_scores, target):
    """Every value that a shift can give is listed by the scalar metric, ties included."""
    by_seed, labels = make_scores(recipes=("a",), n_problems=3, n_sentences=11)
    scores = {0: by_seed[0].with_columns(pl.col("score").round(1))}
    table = _nulls(scores, labels, target, n_null=200)
    shifted = table.filter(null="circular_shift").row(0, named=True)
    options = []
    for own in _test_problems(scores[0], "a"):
        side, score = own[SIDE[target]].to_numpy(), own["score"].to_numpy()
        options.append([METRIC[target](np.roll(side, turn), score) for turn in range(len(side))])
    assert shifted["value"] == pytest.approx(np.mean([each[0] for each in options]))
    possible = np.sort([np.mean(each) for each in itertools.product(*options)])
    draws = np.array(shifted["draws"])
    nearest = possible[np.searchsorted(possible, draws).clip(1, len(possible) - 1) - 1]
    above = possible[np.searchsorted(possible, draws).clip(0, len(possible) - 1)]
    assert np.minimum(np.abs(nearest - draws), np.abs(above - draws)).max() < 1e-6
    expected = np.mean([np.mean(each) for each in options])
    assert draws.mean() == pytest.approx(expected, abs=4 * possible.std() / np.sqrt(200))


@pytest.mark.parametrize("target", list(METRIC))
def test_strata_keep_their_labels(make_scores, target):
    """A score that is the fifth of the trace ranks no better or worse when fifths are permuted."""
    by_seed, labels = make_scores(recipes=("a",), n_problems=4, n_sentences=25)
    last = pl.col("sentence_idx").max().over("problem_id")
    fifth = pl.Series(
        position_bin((by_seed[0].select(pl.col("sentence_idx") / last)).to_series().to_numpy())
    )
    scores = {0: by_seed[0].with_columns(score=(fifth / 10).cast(pl.Float32))}
    table = _nulls(scores, labels, target)
    row = table.filter(null="position_stratified").row(0, named=True)
    assert row["draws"] == pytest.approx([row["value"]] * 100, abs=1e-6)
    assert row["p_null"] == 1.0
    assert np.std(table.filter(null="circular_shift")["draws"][0].to_numpy()) > 0.01


def test_a_permutation_reaches_every_arrangement_inside_a_fifth(make_scores):
    """Ten sentences, two a fifth: the mean over all 2^5 arrangements is the null's mean."""
    by_seed, labels = make_scores(recipes=("a",), n_problems=2, n_sentences=10)
    scores = {0: by_seed[0].filter(split="test", fold=0)}
    row = (
        _nulls(scores, labels, "importance_abs", 4000)
        .filter(null="position_stratified")
        .row(0, named=True)
    )
    own = scores[0].sort("sentence_idx")
    pairs = [range(place, place + 2) for place in range(0, 10, 2)]
    values = [
        spearman(own["target_value"].to_numpy()[list(itertools.chain(*order))], own["score"])
        for order in itertools.product(*(itertools.permutations(pair) for pair in pairs))
    ]
    assert len(values) == 32
    assert row["null_mean"] == pytest.approx(
        np.mean(values), abs=4 * np.std(values) / np.sqrt(4000)
    )
    assert len(set(np.round(row["draws"], 6))) == len(set(np.round(values, 6)))


def test_seeds_are_averaged_inside_a_problem_before_problems(make_scores):
    scores, labels = make_scores(recipes=("a",), seeds=(0, 1, 2))
    together = _nulls(scores, labels, "anchor_binary")
    alone = [_nulls({seed: frame}, labels, "anchor_binary") for seed, frame in scores.items()]
    for name in ("value", "null_mean"):
        parts = np.mean([table[name].to_numpy() for table in alone], axis=0)
        assert together[name].to_list() == pytest.approx(parts.tolist())
    draws = np.mean([np.stack(table["draws"].to_list()) for table in alone], axis=0)
    assert np.stack(together["draws"].to_list()) == pytest.approx(draws, abs=1e-6)


def test_equal_scores_get_equal_draws_whatever_the_recipe_protocol_or_layer(make_scores):
    scores, labels = make_scores(recipes=("a",))
    copy = scores[0].with_columns(recipe=pl.lit("b"))
    held_out = scores[0].with_columns(protocol=pl.lit("holdout").cast(scores[0].schema["protocol"]))
    both = {0: pl.concat([held_out, scores[0], copy])}
    table = _nulls(both, labels, "anchor_binary")
    for null in NULL_KINDS:
        mine = table.filter(null=null)
        assert mine.height == 3
        assert mine["draws"].n_unique() == 1
    assert table.equals(_nulls(both, labels, "anchor_binary"))
    assert not table.equals(_nulls(both, labels, "anchor_binary", seed=1))


def test_a_signal_stands_out_and_noise_does_not(make_scores):
    strong = _nulls(*make_scores(recipes=("a",), signal=20.0), "anchor_binary", 400)
    assert strong["p_null"].max() == pytest.approx(1 / 401)
    assert (strong["value"] > strong["null_high"]).all()
    p = [
        value
        for seed in range(60)
        for value in _nulls(
            *make_scores(recipes=("a",), signal=0.0, n_problems=4, rng_seed=seed),
            "anchor_binary",
            39,
        )["p_null"]
    ]
    # Noise does not know its seed, so p is uniform on 1/40 ... 1, shared by the labels' draws.
    assert 0.4 < np.mean(p) < 0.62
    assert np.mean(np.array(p) <= 0.1) < 0.2


def test_what_is_undefined_has_no_draws_and_is_not_counted(make_scores):
    scores, labels = make_scores(recipes=("a", "b"))
    flat = (
        pl.when((pl.col("recipe") == "b") | (pl.col("problem_id") == 2))
        .then(0.5)
        .otherwise("score")
    )
    table = _nulls(
        {0: scores[0].with_columns(flat.cast(pl.Float32).alias("score"))}, labels, "importance_abs"
    )
    assert table.filter(recipe="a")["n_problems"].to_list() == [6, 6]
    undefined = table.filter(recipe="b")
    assert undefined["n_problems"].to_list() == [0, 0]
    assert undefined["draws"].list.len().to_list() == [0, 0]
    assert undefined.select("value", "p_null", "null_low").null_count().row(0) == (2, 2, 2)


def test_no_draws_asked_for_give_an_empty_table(make_scores):
    assert _nulls(*make_scores(), "anchor_binary", 0).is_empty()


def test_the_observed_labels_count_as_one_draw():
    assert null_p(1.0, np.zeros(99)) == 1 / 100
    assert null_p(0.0, np.zeros(99)) == 1.0
