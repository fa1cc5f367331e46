from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from taprobe_core.evaluation.summary import best_seeds
from taprobe_core.tables import BEST_SEEDS, PROTOCOLS, SPLITS, check_table

METRIC = {"probe": "pr_auc", "other": "pr_auc"}


def _per_problem(
    values: dict[tuple[str, int, int], tuple[float | None, float | None]],
) -> pl.DataFrame:
    """(recipe, fold, seed) -> value on validation and on test; fold f tests problem f."""
    rows = [
        (recipe, "lopo", split, fold, seed, fold if split == "test" else 100 + fold, value)
        for (recipe, fold, seed), pair in values.items()
        for split, value in zip(("val", "test"), pair, strict=True)
    ]
    schema = {
        "recipe": pl.String,
        "protocol": pl.Enum(PROTOCOLS),
        "split": pl.Enum(SPLITS),
        "fold": pl.Int32,
        "seed": pl.Int64,
        "problem_id": pl.Int64,
        "primary": pl.Float64,
    }
    return pl.DataFrame(rows, schema, orient="row")


def _best(values, k=2) -> dict:
    table = check_table(best_seeds(_per_problem(values), k, METRIC), BEST_SEEDS, "test")
    (row,) = table.to_dicts()
    return row


def test_validation_chooses_seeds_fold_by_fold():
    row = _best(
        {
            ("probe", 0, 0): (0.1, 0.9),
            ("probe", 0, 1): (0.3, 0.2),
            ("probe", 0, 2): (0.2, 0.4),
            ("probe", 1, 0): (0.5, 0.6),
            ("probe", 1, 1): (0.4, 0.8),
            ("probe", 1, 2): (0.1, 0.1),
        }
    )
    assert row["seeds"] == [1, 0]
    assert row["value"] == pytest.approx(np.mean([0.5, 0.5]))
    assert row["best_seed"] == pytest.approx(np.mean([0.2, 0.6]))
    assert row["best_of_k"] == pytest.approx(np.mean([0.3, 0.7]))
    # First and second choices, folds averaged: (0.2 + 0.6) / 2 and (0.4 + 0.8) / 2.
    assert row["best_of_k_std"] == pytest.approx(np.std([0.4, 0.6], ddof=1))
    assert (row["k"], row["n_seeds"], row["n_folds"]) == (2, 3, 2)


def test_ties_go_to_the_lower_seed_and_undefined_validation_is_last():
    row = _best(
        {("probe", 0, 3): (0.4, 0.1), ("probe", 0, 1): (0.4, 0.2), ("probe", 0, 0): (None, 0.9)},
        k=1,
    )
    assert row["seeds"] == [1]
    assert row["best_of_k"] == row["best_seed"] == 0.2


def test_more_seeds_than_there_are_is_all_of_them():
    row = _best({("probe", 0, 0): (0.4, 0.1), ("probe", 0, 1): (0.5, 0.3)}, k=9)
    assert (row["k"], row["best_of_k"], row["value"]) == (2, pytest.approx(0.2), pytest.approx(0.2))


def test_no_test_value_influences_the_choice():
    rng = np.random.default_rng(0)
    keys = [("probe", fold, seed) for fold in range(5) for seed in range(6)]
    val = rng.random(len(keys))
    chosen = [
        _best({key: (v, t) for key, v, t in zip(keys, val, rng.random(len(keys)), strict=True)})[
            "seeds"
        ]
        for _ in range(5)
    ]
    assert all(each == chosen[0] for each in chosen)
