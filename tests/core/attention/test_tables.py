"""Tables made from mass: open values are null, heads come from training problems, sums agree."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from taprobe_core.attention.tables import receiver_tables, vertical_tables
from taprobe_core.errors import NonFiniteError, NotEnoughDataError
from taprobe_core.splits import Fold
from taprobe_core.study import Attention

N_HEADS = 3


def shard(n_sentences: int, seed: int) -> dict[str, torch.Tensor]:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 30, n_sentences)
    share = rng.exponential(size=(N_HEADS, n_sentences, n_sentences + 1)) ** 3
    share[..., 1:] *= np.tri(n_sentences)
    share *= lengths[:, None] / share.sum(axis=-1, keepdims=True)
    return {
        "mass": torch.tensor(share[..., 1:], dtype=torch.float32),
        "bos_mass": torch.tensor(share[..., 0], dtype=torch.float32),
        "n_tokens": torch.tensor(lengths, dtype=torch.int32),
    }


def test_values_that_a_definition_leaves_open_are_null() -> None:
    attention = Attention(mode="full", proximity=(4, 16))
    tables = vertical_tables([(7, shard(9, 0)), (3, shard(1, 1))], attention)
    heads = tables["heads"]
    assert heads["problem_id"].to_list() == [7] * N_HEADS + [3] * N_HEADS
    assert heads["n_scores"].to_list() == [5] * N_HEADS + [0] * N_HEADS
    only = heads.filter(problem_id=3)
    for name in ("first_sentence_share", "distance_slope", "distance_r_squared"):
        assert only[name].null_count() == N_HEADS
        assert heads.filter(problem_id=7)[name].null_count() == 0
    kurtosis = tables["kurtosis"].filter(problem_id=7)
    assert kurtosis["proximity"].to_list() == [4, 16] * N_HEADS
    assert kurtosis["kurtosis"].is_null().to_list() == [False, True] * N_HEADS
    assert tables["vertical"].filter(problem_id=3)["vertical_score"].to_list() == [None] * N_HEADS
    assert tables["scores"].filter(problem_id=3)["attention_score"].to_list() == [0.0]


def test_mass_that_is_not_a_number_is_refused() -> None:
    bad = shard(6, 0)
    bad["mass"][0, 2, 1] = torch.nan
    with pytest.raises(NonFiniteError, match="not finite"):
        vertical_tables([(1, bad)], Attention(mode="full"))


def layered(
    attention: Attention, layers: list[int], n_sentences: int = 24
) -> tuple[pl.DataFrame, dict[int, pl.DataFrame]]:
    made = {
        layer: vertical_tables(
            [(problem, shard(n_sentences + problem, 10 * layer + problem)) for problem in range(6)],
            attention,
        )
        for layer in layers
    }
    kurtosis = pl.concat(
        tables["kurtosis"].with_columns(layer=pl.lit(layer, pl.Int64))
        for layer, tables in made.items()
    )
    return kurtosis, {layer: tables["vertical"] for layer, tables in made.items()}


FOLDS = [
    Fold("holdout", 0, (0, 1, 2), (3,), (4, 5)),
    Fold("lopo", 0, (2, 3, 4, 5), (1,), (0,)),
]


def test_heads_are_ranked_by_the_training_problems_of_the_fold() -> None:
    attention = Attention(mode="full", proximity=(4, 1), n_receiver_heads=4)
    kurtosis, vertical = layered(attention, [0, 2, 5])
    asked: list[int] = []

    def read(layer: int) -> pl.DataFrame:
        asked.append(layer)
        return vertical[layer]

    tables = receiver_tables(kurtosis, read, FOLDS, attention)
    for fold in FOLDS:
        expected = (
            kurtosis.filter(
                pl.col("problem_id").is_in(fold.train), pl.col("layer") != 0, proximity=4
            )
            .group_by("layer", "head")
            .agg(pl.col("kurtosis").mean())
            .sort("kurtosis", descending=True)
            .head(4)
        )
        found = tables["heads"].filter(protocol=fold.protocol)
        assert found["rank"].to_list() == [1, 2, 3, 4]
        assert found.select("layer", "head").equals(expected.select("layer", "head"))
        np.testing.assert_allclose(found["kurtosis"], expected["kurtosis"])
        assert set(found["n_problems"]) == {len(fold.train)}
        sides = tables["receiver_scores"].filter(protocol=fold.protocol)
        for split in ("train", "val", "test"):
            assert set(sides.filter(split=split)["problem_id"]) == set(getattr(fold, split))
    assert asked == sorted(set(tables["heads"]["layer"]))
    reliability = tables["reliability"].row(0, named=True)
    assert (reliability["proximity"], reliability["n_heads"]) == (4, 6)
    assert reliability["top_heads_kept"] == reliability["median_spearman"] == 1.0


@pytest.mark.parametrize("proximity", [(4, 40), (40, 4)])
def test_texts_too_short_for_a_proximity(proximity: Any) -> None:
    attention = Attention(mode="full", proximity=proximity)
    kurtosis, vertical = layered(attention, [1])
    if proximity[0] == 40:
        with pytest.raises(NotEnoughDataError, match="no head has a kurtosis"):
            receiver_tables(kurtosis, vertical.__getitem__, FOLDS, attention)
        return
    tables = receiver_tables(kurtosis, vertical.__getitem__, FOLDS, attention)
    last = tables["reliability"].row(1, named=True)
    assert (last["n_heads"], last["n_undefined"]) == (0, N_HEADS)
    for name in ("split_half_pearson", "top_heads_kept", "median_spearman"):
        assert last[name] is None
