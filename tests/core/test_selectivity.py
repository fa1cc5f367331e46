from __future__ import annotations

import math

import numpy as np
import polars as pl
import pytest

from taprobe_core.errors import DataError
from taprobe_core.selectivity import control_labels, control_strata, online_code, selectivity
from taprobe_core.study.config import Evaluation


@pytest.fixture(scope="module")
def strata() -> list[str]:
    rng = np.random.default_rng(0)
    tags = rng.choice(["plan", "check", "compute", "recall"], 4000).tolist()
    return control_strata(tags, rng.random(4000), rng.integers(5, 60, 4000))


def test_strata_are_tag_fifth_and_third(strata):
    assert control_strata(["a", "a", "b"], [0.0, 0.5, 1.0], [1, 5, 9]) == [
        "a/0/0",
        "a/2/1",
        "b/4/2",
    ]
    assert len(set(strata)) == 4 * 5 * 3
    assert control_strata([], [], []) == []


def test_a_stratum_is_one_label_and_the_seed_decides_which(strata):
    labels = control_labels(strata, 0.1, seed=0)
    frame = pl.DataFrame({"stratum": strata, "label": labels})
    assert frame.group_by("stratum").agg(pl.col("label").n_unique())["label"].to_list() == [1] * 60
    assert np.array_equal(labels, control_labels(strata, 0.1, seed=0))
    assert not np.array_equal(labels, control_labels(strata, 0.1, seed=1))
    shuffled = np.random.default_rng(1).permutation(len(strata))
    again = control_labels([strata[row] for row in shuffled], 0.1, seed=0)
    assert np.array_equal(again, labels[shuffled])


@pytest.mark.parametrize("rate", [0.02, 0.1, 0.3, 0.5])
def test_the_control_has_the_base_rate_of_the_task(strata, rate):
    shares = [control_labels(strata, rate, seed).mean() for seed in range(20)]
    assert np.abs(np.array(shares) - rate).max() < 1 / 60


def test_selectivity_is_the_paired_difference():
    def values(*numbers: float | None) -> pl.DataFrame:
        return pl.DataFrame(
            {
                "recipe": ["probe"] * len(numbers),
                "protocol": ["lopo"] * len(numbers),
                "problem_id": range(len(numbers)),
                "value": numbers,
            },
            schema_overrides={"value": pl.Float64},
        )

    task, control = (
        values(0.5, 0.6, 0.7, None, 0.4, 0.5, 0.6),
        values(0.2, 0.2, 0.3, 0.3, 0.3, 0.2, 0.4),
    )
    (row,) = selectivity(task, control, Evaluation(n_bootstrap=200)).to_dicts()
    assert row["n_problems"] == 6
    assert row["delta"] == pytest.approx(np.mean([0.3, 0.4, 0.4, 0.1, 0.3, 0.2]))
    assert row["task_value"] == pytest.approx(0.55)
    assert row["delta_low"] < row["delta"] < row["delta_high"]
    assert selectivity(task, control.with_columns(recipe=pl.lit("x")), Evaluation()).is_empty()


def test_a_probe_that_knows_the_prevalence_alone_compresses_nothing():
    labels = np.arange(200) % 10 == 0
    code = online_code(
        100, [(labels[:50], np.full(50, 0.1)), (labels[50:], np.full(150, 0.1))], 0.1
    )
    assert code.compression == pytest.approx(1.0)
    assert code.bits == pytest.approx(300 * -(0.1 * math.log2(0.1) + 0.9 * math.log2(0.9)))


def test_code_length_is_the_log_loss_in_bits():
    code = online_code(10, [([True, False], [0.5, 0.25])], 0.5)
    assert code.bits == pytest.approx(10 + 1 - math.log2(0.75))
    assert code.compression == pytest.approx(12 / code.bits)
    certain = online_code(0, [([True, False], [1.0, 0.0])], 0.5)
    assert 0 < certain.bits < 1e-5
    wrong = online_code(0, [([True], [0.0])], 0.5)
    assert wrong.bits == pytest.approx(-math.log2(1e-7))


def test_blocks_that_do_not_fit_are_refused():
    with pytest.raises(DataError, match="2 labels and 1 prob"):
        online_code(1, [([True, False], [0.5])], 0.5)
    with pytest.raises(DataError, match="prevalence 0"):
        online_code(1, [], 0.0)
