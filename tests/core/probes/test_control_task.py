"""Labels of a control task, and the target that a recipe's control is fitted to."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import polars as pl
import pytest

from taprobe_core.errors import LabelError
from taprobe_core.probes.control_task import (
    control_labels,
    control_strata,
    control_target,
    kinds_of,
)
from taprobe_core.probes.features import ProbeData
from taprobe_core.probes.targets import TargetValues


@pytest.fixture(scope="module")
def strata() -> list[str]:
    rng = np.random.default_rng(0)
    tags = rng.choice(["plan", "check", "compute", "recall"], 4000).tolist()
    return control_strata(tags, rng.random(4000), rng.integers(5, 60, 4000))


def test_strata_are_tag_fifth_and_third(strata: list[str]) -> None:
    assert control_strata(["a", "a", "b"], [0.0, 0.5, 1.0], [1, 5, 9]) == [
        "a/0/0",
        "a/2/1",
        "b/4/2",
    ]
    assert len(set(strata)) == 4 * 5 * 3
    assert control_strata([], [], []) == []


def test_a_stratum_is_one_label_and_the_seed_decides_which(strata: list[str]) -> None:
    labels = control_labels(strata, 0.1, seed=0)
    frame = pl.DataFrame({"stratum": strata, "label": labels})
    assert frame.group_by("stratum").agg(pl.col("label").n_unique())["label"].to_list() == [1] * 60
    assert np.array_equal(labels, control_labels(strata, 0.1, seed=0))
    assert not np.array_equal(labels, control_labels(strata, 0.1, seed=1))
    shuffled = np.random.default_rng(1).permutation(len(strata))
    again = control_labels([strata[row] for row in shuffled], 0.1, seed=0)
    assert np.array_equal(again, labels[shuffled])


@pytest.mark.parametrize("rate", [0.02, 0.1, 0.3, 0.5])
def test_the_control_has_the_base_rate_of_the_task(strata: list[str], rate: float) -> None:
    shares = [control_labels(strata, rate, seed).mean() for seed in range(20)]
    assert np.abs(np.array(shares) - rate).max() < 1 / 60


def _rows(n_problems: int = 8, n: int = 25) -> ProbeData:
    rng = np.random.default_rng(3)
    total = n_problems * n
    index = np.tile(np.arange(n), n_problems)
    length = rng.integers(1, 40, total)
    position = np.column_stack([index, np.full(total, n), index / (n - 1), length])
    labels = pl.DataFrame(
        {
            "problem_id": np.repeat(np.arange(n_problems), n),
            "sentence_idx": index,
            "function_tag": rng.choice(["plan", "check", "compute"], total),
        }
    )
    causal = position[:, :3].astype(np.float32)
    return ProbeData(labels, [""] * total, position.astype(np.float32), causal)


def _task(n: int, share: float = 0.1) -> TargetValues:
    rng = np.random.default_rng(4)
    anchors = rng.random(n) < share
    weight = rng.random(n)
    return TargetValues(anchors.astype(float), rng.random(n), anchors, weight, np.ones(n, bool))


def test_a_control_changes_the_labels_and_nothing_else() -> None:
    data = _rows()
    task = _task(200)
    control = control_target(task, data, seed=0)
    assert control.is_positive is not None
    assert task.is_positive is not None
    assert np.array_equal(control.y, control.is_positive)
    assert np.array_equal(control.value, control.is_positive)
    assert control.weight is task.weight
    assert control.is_defined is task.is_defined
    assert abs(control.is_positive.mean() - task.is_positive.mean()) < 0.02
    # It knows the kind of a sentence, and no anchor.
    of_kind = pl.DataFrame({"kind": kinds_of(data), "label": control.is_positive})
    assert of_kind.group_by("kind").agg(pl.col("label").n_unique())["label"].max() == 1
    other = replace(task, is_positive=task.is_positive[::-1].copy(), value=task.value[::-1].copy())
    assert np.array_equal(control_target(other, data, seed=0).y, control.y)


def test_one_class_is_no_control() -> None:
    data = _rows()
    alike = replace(
        data,
        labels=data.labels.with_columns(function_tag=pl.lit("plan")),
        position=np.ones_like(data.position),
    )
    with pytest.raises(LabelError, match="two classes; kinds of sentences give 0 positives") as one:
        control_target(_task(200), alike, seed=0)
    assert "evaluation.selectivity.recipes" in str(one.value)
    signed = replace(_task(200), is_positive=None)
    with pytest.raises(LabelError, match=r"base rate of 0\.000"):
        control_target(signed, data, seed=0)
