from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from taprobe_core.errors import LabelError, NotEnoughDataError
from taprobe_core.evaluation.blocks import UNIT, distinct_rows, make_blocks


def test_blocks_hold_every_row_once_and_in_sentence_order(make_scores):
    by_seed, labels = make_scores(seeds=(3, 1))
    scored = make_blocks(by_seed, labels)
    assert scored.units.columns == list(UNIT)
    assert scored.units.equals(scored.units.sort(UNIT))
    assert not scored.has_truth
    seen = np.concatenate([block.units for block in scored.blocks])
    assert sorted(seen) == list(range(scored.units.height))
    for block in scored.blocks:
        for row, unit in enumerate(block.units):
            key = scored.units.row(int(unit), named=True)
            own = by_seed[key.pop("seed")].filter(**key).sort("sentence_idx")
            assert own["score"].to_list() == block.scores[row].tolist()
            assert own["target_value"].to_list() == block.target[row].tolist()
            assert own["is_positive"].to_list() == block.positive[row].tolist()
            start = scored.start[unit]
            assert scored.score[start : start + own.height].tolist() == own["score"].to_list()
        kept = labels.filter(problem_id=block.problem_id).sort("sentence_idx")
        assert block.labels["importance_abs"].tolist() == kept["importance_abs"].to_list()
        assert block.relative_position[[0, -1]].tolist() == [0.0, 1.0]


def test_row_order_does_not_matter(make_scores):
    by_seed, labels = make_scores()
    shuffled = {
        seed: frame.sample(fraction=1, shuffle=True, seed=5) for seed, frame in by_seed.items()
    }
    one, other = make_blocks(by_seed, labels), make_blocks(shuffled, labels.reverse())
    assert one.units.equals(other.units)
    for a, b in zip(one.blocks, other.blocks, strict=True):
        assert np.array_equal(a.scores, b.scores)
        assert np.array_equal(a.target, b.target)


def test_sentences_without_a_target_are_left_out_of_their_recipe_alone(make_scores):
    by_seed, labels = make_scores(recipes=("whole", "cut"))
    last = pl.col("sentence_idx") >= pl.col("sentence_idx").max().over("problem_id") - 3
    is_cut = (pl.col("recipe") == "cut") & last
    scores = {
        0: by_seed[0].with_columns(
            pl.when(~is_cut).then("target_value").alias("target_value"),
            pl.when(pl.col("recipe") != "cut").then("is_positive").alias("is_positive"),
        )
    }
    scored = make_blocks(scores, labels)
    name = scored.units["recipe"].to_numpy()
    for block in scored.blocks:
        (recipe,) = set(name[block.units])
        n_left_out = block.n_sentences - len(block.columns)
        assert n_left_out == (4 if recipe == "cut" else 0)
        assert block.ranks_anchors.all() == (recipe == "whole")
        assert np.isfinite(block.target).all()
        assert not block.positive[~block.ranks_anchors].any()
        assert len(block.labels["is_anchor"]) == len(block.columns)


def test_a_split_is_taken_out_of_each_block(make_scores):
    scored = make_blocks(*make_scores())
    units = np.concatenate([block.units for block in scored.of_split("test")])
    assert sorted(units) == np.flatnonzero((scored.units["split"] == "test").to_numpy()).tolist()
    assert list(scored.of_split("train")) == []


def test_a_problem_is_scored_whole_or_not_at_all(make_scores):
    by_seed, labels = make_scores()
    one_less = by_seed[0].filter(~((pl.col("problem_id") == 3) & (pl.col("sentence_idx") == 5)))
    with pytest.raises(LabelError, match=r"22 scores match 22 of 23 labels of problem 3 \(4 such"):
        make_blocks({0: one_less}, labels)
    with pytest.raises(LabelError, match=r"23 scores match 22 of 22 labels of problem 3"):
        make_blocks(
            by_seed, labels.filter(~((pl.col("problem_id") == 3) & (pl.col("sentence_idx") == 5)))
        )
    with pytest.raises(LabelError, match="match 0 of 0 labels of problem 3"):
        make_blocks(by_seed, labels.filter(pl.col("problem_id") != 3))
    with pytest.raises(NotEnoughDataError, match="no scores"):
        make_blocks({0: by_seed[0].clear()}, labels)


def test_equal_rows_are_found_over_all_matrices_together():
    a = np.array([[1.0, 2.0], [1.0, 2.0], [1.0, 3.0], [1.0, 2.0]])
    b = np.array([[True], [False], [True], [True]])
    first, kind = distinct_rows(a, b)
    assert first.tolist() == [0, 1, 2]
    assert kind.tolist() == [0, 1, 2, 0]
    assert distinct_rows(np.empty((0, 3)))[1].tolist() == []
