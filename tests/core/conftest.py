"""Scores as a stage would write them, for the tests of what is computed from scores."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import polars as pl
import pytest

from taprobe_core.tables import SCORES, check_table, schema_of

MadeScores = tuple[dict[int, pl.DataFrame], pl.DataFrame]


@pytest.fixture(scope="session")
def make_scores() -> Callable[..., MadeScores]:
    """Return `_make_scores`, which returns scores by seed and the labels they belong to."""
    return _make_scores


def _make_scores(
    recipes: tuple[str, ...] = ("a", "b"),
    seeds: tuple[int, ...] = (0,),
    n_problems: int = 7,
    n_sentences: int = 20,
    signal: float = 3.0,
    protocol: str = "lopo",
    rng_seed: int = 0,
) -> MadeScores:
    """Every fold tests one problem and validates on the next; scores are probabilities.

    Problems differ in length. The target is |importance|, a tenth of the sentences are anchors, and
    later recipes see less of the signal.
    """
    rng = np.random.default_rng(rng_seed)
    lengths = n_sentences + np.arange(n_problems)
    labels = pl.DataFrame(
        {
            "problem_id": np.repeat(np.arange(n_problems), lengths),
            "sentence_idx": np.concatenate([np.arange(n) for n in lengths]),
            "importance_signed": rng.normal(0, 0.2, lengths.sum()).clip(-1, 1),
        }
    ).with_columns(importance_abs=pl.col("importance_signed").abs())
    rank = pl.col("importance_abs").rank("ordinal", descending=True).over("problem_id")
    labels = labels.with_columns(
        (rank <= 3).alias("is_anchor"),
        pl.lit(None, pl.Float64).alias("true_importance"),
        pl.lit(None, pl.Boolean).alias("is_true_anchor"),
    )
    by_seed = {}
    for seed in seeds:
        parts = []
        for place, recipe in enumerate(recipes):
            for fold in range(n_problems):
                for split, problem in (("val", (fold + 1) % n_problems), ("test", fold)):
                    own = labels.filter(problem_id=problem)
                    noise = np.random.default_rng([seed, place, fold, len(split)])
                    raw = signal / (1 + place) * own["importance_abs"].to_numpy()
                    raw = raw + noise.normal(size=own.height)
                    parts.append(
                        own.select(
                            "problem_id",
                            "sentence_idx",
                            recipe=pl.lit(recipe),
                            protocol=pl.lit(protocol),
                            fold=pl.lit(fold),
                            split=pl.lit(split),
                            score=pl.Series(1 / (1 + np.exp(-raw))),
                            target_value=pl.col("importance_abs"),
                            is_positive=pl.col("is_anchor"),
                        )
                    )
        scores = pl.concat(parts).cast(schema_of(SCORES))
        by_seed[seed] = check_table(scores, SCORES, "made scores")
    return by_seed, labels
