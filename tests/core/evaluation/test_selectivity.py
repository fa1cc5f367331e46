"""Task against control on the same problems, and the length of labels in bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import polars as pl
import pytest

from taprobe_core.evaluation.contrasts import control_values, selectivity
from taprobe_core.evaluation.summary import chance_pr_auc
from taprobe_core.metrics import pr_auc
from taprobe_core.study.config import Evaluation
from taprobe_core.tables import SELECTIVITY, check_table

FEW_DRAWS = Evaluation(n_bootstrap=200)


def units(*numbers: float | None, recipe: str = "probe", n_anchors: int = 2) -> pl.DataFrame:
    """Units of one recipe under LOPO, one per problem; None is undefined, without anchors."""
    return pl.DataFrame(
        {
            "recipe": recipe,
            "protocol": "lopo",
            "split": "test",
            "seed": 0,
            "problem_id": range(len(numbers)),
            "primary": numbers,
            "n_sentences": 20,
            "n_anchors": [0 if each is None else n_anchors for each in numbers],
        },
        schema_overrides={"primary": pl.Float64},
    )


def test_selectivity_is_the_paired_difference() -> None:
    task = units(0.5, 0.6, 0.7, 0.9, 0.4, 0.5, 0.6)
    control = units(0.2, 0.2, 0.3, None, 0.3, 0.2, 0.4, n_anchors=3)
    table = check_table(selectivity(task, control, FEW_DRAWS), SELECTIVITY, "test")
    (row,) = table.to_dicts()
    assert (row["n_problems"], row["n_undefined"], row["n_better"]) == (6, 1, 6)
    assert row["selectivity"] == pytest.approx(np.mean([0.3, 0.4, 0.4, 0.1, 0.3, 0.2]))
    # Both means are of the problems where both are defined.
    assert row["task_value"] == pytest.approx(0.55)
    assert row["task_value"] - row["control_value"] == pytest.approx(row["selectivity"])
    assert row["task_chance"] == pytest.approx(chance_pr_auc(20, 2))
    assert row["control_chance"] == pytest.approx(chance_pr_auc(20, 3))
    assert row["selectivity_low"] < row["selectivity"] < row["selectivity_high"]
    assert row["p_sign_flip"] == pytest.approx(2 / 2**6)


def test_only_recipes_with_a_control_have_a_selectivity() -> None:
    task = pl.concat([units(0.5, 0.6), units(0.4, 0.3, recipe="other")])
    table = selectivity(task, units(0.1, 0.2, recipe="other"), FEW_DRAWS)
    assert table["recipe"].to_list() == ["other"]
    assert table["selectivity_low"].to_list() == [None]
    assert "2 problems" in table["interval_note"][0]
    none = selectivity(task, control_values({}, pl.DataFrame()), FEW_DRAWS)
    assert none.is_empty()
    assert none.schema == table.schema


def test_validation_and_seeds_do_not_count_as_problems() -> None:
    task = units(0.5, 0.6, 0.7)
    noise = task.with_columns(split=pl.lit("val"), primary=pl.lit(0.0))
    seeds = pl.concat([task, task.with_columns(seed=pl.lit(1), primary=pl.col("primary") + 0.2)])
    (row,) = selectivity(pl.concat([seeds, noise]), units(0.1, 0.1, 0.1), FEW_DRAWS).to_dicts()
    assert row["n_problems"] == 3
    assert row["task_value"] == pytest.approx(0.7)


def test_a_control_is_measured_by_its_own_labels(make_scores: Callable[..., Any]) -> None:
    by_seed, labels = make_scores(recipes=("a",))
    is_even = pl.col("sentence_idx") % 2 == 0
    controls = {seed: scores.with_columns(is_positive=is_even) for seed, scores in by_seed.items()}
    found = control_values(controls, labels)
    for row in found.filter(split="test").iter_rows(named=True):
        own = controls[0].filter(split="test", fold=row["fold"])
        assert row["n_anchors"] == own["is_positive"].sum()
        assert row["primary"] == pytest.approx(
            pr_auc(own["is_positive"].to_numpy(), own["score"].to_numpy())
        )
