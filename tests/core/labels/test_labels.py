from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from taprobe_core import tables
from taprobe_core.errors import LabelError, NotEnoughDataError
from taprobe_core.labels.make import anchors, make_labels, unlabelled
from taprobe_core.rollouts import FolderRollouts, read_rollouts
from taprobe_core.study.config import Labels, MirrorSource, Model, Rollouts, StandInCheckpoint

PERCENTILES = st.one_of(st.integers(1, 99).map(float), st.floats(0.5, 99.5))
IMPORTANCES = st.lists(st.sampled_from([0.0, 0.01, 0.02, 0.25, 1.0]), min_size=1, max_size=60)


# --- anchors


@given(
    values=st.lists(st.integers(1, 10**6), min_size=1, max_size=300, unique=True),
    percentile=PERCENTILES,
)
def test_both_rules_agree_where_no_two_values_are_equal(
    values: list[int], percentile: float
) -> None:
    place = (len(values) - 1) * percentile / 100
    # Beside a whole place numpy's own rounding decides whether that value still enters.
    assume(place == round(place) or abs(place - round(place)) > 1e-6)

    by_rank = anchors(values, percentile, "rank")

    assert by_rank.tolist() == anchors(values, percentile, "legacy").tolist()
    assert by_rank.sum() >= 1


@given(values=IMPORTANCES, percentile=PERCENTILES)
def test_rank_takes_the_most_important_earlier_first_and_no_zero(
    values: list[float], percentile: float
) -> None:
    importance = np.array(values)

    chosen = anchors(importance, percentile, "rank")

    wanted = len(values) - int(np.ceil(np.round((len(values) - 1) * percentile / 100, 9)))
    assert chosen.sum() == min(wanted, (importance > 0).sum())
    order = [(-value, index) for index, value in enumerate(values)]
    inside = [order[i] for i in np.flatnonzero(chosen)]
    outside = [order[i] for i in np.flatnonzero(~chosen & (importance > 0))]
    assert not inside or not outside or max(inside) < min(outside)


@given(
    values=IMPORTANCES, low=PERCENTILES, high=PERCENTILES, rule=st.sampled_from(["rank", "legacy"])
)
def test_a_higher_percentile_never_adds_an_anchor(
    values: list[float], low: float, high: float, rule: str
) -> None:
    low, high = sorted((low, high))

    few, many = anchors(values, high, rule), anchors(values, low, rule)

    assert not (few & ~many).any()


def test_ties_and_zeros() -> None:
    tied = [0.3, 0.1, 0.3, 0.3, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    mostly_zero = [0.0] * 19 + [0.5]

    assert np.flatnonzero(anchors(tied, 90, "legacy")).tolist() == [0, 2, 3]
    assert np.flatnonzero(anchors(tied, 90, "rank")).tolist() == [0]
    assert anchors(mostly_zero, 90, "legacy").all()
    assert np.flatnonzero(anchors(mostly_zero, 90, "rank")).tolist() == [19]
    assert not anchors([0.0] * 5, 90, "rank").any()
    assert anchors([], 90, "rank").tolist() == []


def test_a_place_that_rounds_up_by_a_hair_costs_no_anchor() -> None:
    assert 375 * 8.8 / 100 > 33

    assert anchors(np.arange(1, 377), 8.8, "rank").sum() == 376 - 33


# --- labels


def sentence(index: int, problem_id: int = 1, **changes: Any) -> dict[str, Any]:
    return {
        "problem_id": problem_id,
        "sentence_idx": index,
        "sentence": f"Sentence {index}.",
        "function_tag": "unknown",
        "depends_on": [],
        "accuracy": 0.5,
        "resampling_importance_accuracy": 0.0,
        "resampling_importance_kl": 0.0,
        "counterfactual_importance_accuracy": 0.0,
        "counterfactual_importance_kl": 0.0,
        "forced_importance_accuracy": None,
        "forced_importance_kl": None,
        "different_trajectories_fraction": 0.5,
        "overdeterminedness": 0.29,
        "summary": None,
        **changes,
    }


def frame(*rows: dict[str, Any]) -> pl.DataFrame:
    sentences = pl.DataFrame(rows, schema=tables.schema_of(tables.SENTENCES))
    return tables.check_table(sentences, tables.SENTENCES, "test")


def importance(value: float) -> dict[str, float]:
    return {"counterfactual_importance_accuracy": value}


def test_every_cause_of_a_zero_has_its_status() -> None:
    sentences = frame(
        sentence(0, **importance(-0.24)),
        sentence(1, different_trajectories_fraction=0.0),
        sentence(2),
        sentence(3, accuracy=None, different_trajectories_fraction=None),
        sentence(4, accuracy=1 / 103),
        sentence(5, different_trajectories_fraction=None),
        sentence(6),
    )

    labels = make_labels(sentences, Labels(drop_last_sentence=False))

    assert labels["label_status"].to_list() == [
        "measured", "no_dissimilar", "equal_rates", "missing_rollouts", "missing_rollouts",
        "missing_rollouts", "last_sentence",
    ]  # fmt: skip
    assert set(labels["label_status"]) == set(tables.LABEL_STATUS)


def test_a_label_keeps_sign_counts_and_error() -> None:
    sentences = frame(sentence(1, accuracy=0.6), sentence(0, **importance(-0.24)), sentence(2))

    row = make_labels(sentences, Labels()).row(0, named=True)

    assert (row["sentence_idx"], row["n_sentences"], row["is_anchor"]) == (0, 2, True)
    assert (row["importance_signed"], row["importance_abs"]) == (-0.24, 0.24)
    assert (row["n_rollouts"], row["n_correct"], row["n_dissimilar"]) == (100, 50, 50)
    assert row["n_dissimilar_correct"] == 18
    assert row["importance_se"] == pytest.approx((0.36 * 0.64 / 49 + 0.24 / 99) ** 0.5)


def test_the_successor_is_the_next_sentence_with_rollouts() -> None:
    gap = sentence(1, accuracy=None, different_trajectories_fraction=None, **importance(0.0))
    sentences = frame(sentence(0, **importance(-0.24)), gap, sentence(2, accuracy=0.6))

    labels = make_labels(sentences, Labels())

    assert labels["n_dissimilar_correct"].to_list() == [18, None]
    resampling = make_labels(sentences, Labels(field="resampling_importance_accuracy"))
    assert resampling["importance_se"].to_list() == [None, None]


def test_the_error_and_status_belong_to_the_field() -> None:
    rows = [
        sentence(0, resampling_importance_accuracy=0.1, forced_importance_accuracy=0.4,
                 different_trajectories_fraction=0.0),
        sentence(1, accuracy=0.6, forced_importance_accuracy=0.0),
    ]  # fmt: skip

    resampling = make_labels(frame(*rows), Labels(field="resampling_importance_accuracy"))
    forced = make_labels(frame(*rows), Labels(field="forced_importance_accuracy"))

    assert resampling["label_status"].to_list() == ["measured"]
    assert resampling["importance_se"][0] == pytest.approx((0.25 / 99 + 0.24 / 99) ** 0.5)
    assert forced["importance_signed"].to_list() == [0.4]
    assert forced["importance_se"].to_list() == [None]


def test_the_last_sentence_is_dropped_unless_it_is_the_only_one() -> None:
    sentences = frame(sentence(0), sentence(1), sentence(2), sentence(0, problem_id=2))

    dropped = make_labels(sentences, Labels())
    kept = make_labels(sentences, Labels(drop_last_sentence=False))

    columns = ("problem_id", "sentence_idx", "n_sentences")
    assert dropped.select(columns).rows() == [(1, 0, 2), (1, 1, 2), (2, 0, 1)]
    assert kept["n_sentences"].to_list() == [3, 3, 3, 1]


ABSENT: dict[str, Any] = {"counterfactual_importance_accuracy": None}


def test_a_missing_measure_costs_its_problem_and_is_not_a_zero() -> None:
    whole = [sentence(i, problem_id=5, **importance(0.1 * i)) for i in range(4)]
    sentences = frame(
        *whole,
        sentence(0), sentence(1, **ABSENT), sentence(2),
        *(sentence(i, problem_id=9, **ABSENT) for i in range(7)),
    )  # fmt: skip

    labels, skipped = make_labels(sentences, Labels()), unlabelled(sentences, Labels())

    assert labels.equals(make_labels(frame(*whole), Labels()))
    assert skipped.select("problem_id", "stage", "error").rows() == [
        (1, "labels", "LabelError"),
        (9, "labels", "LabelError"),
    ]
    first = skipped.row(0, named=True)
    assert first["what"].startswith(
        "1 of 2 sentences have no counterfactual_importance_accuracy, first sentence 1"
    )
    assert first["where"] == "problem 1, sentence 1"
    assert "rollouts.exclude_ids: [1]" in first["fix"]
    with pytest.raises(LabelError, match=r"1 of 2 sentences have no .* in problem 1, sentence 1"):
        make_labels(sentences, Labels(), on_bad_problem="fail")


def test_a_measure_that_is_not_the_label_may_be_missing() -> None:
    sentences = frame(*(sentence(i, **ABSENT, forced_importance_accuracy=0.1) for i in range(3)))

    labels = make_labels(sentences, Labels(field="forced_importance_accuracy"))

    assert labels["importance_signed"].to_list() == [0.1, 0.1]


def test_no_measure_at_all_gives_the_first_reasons() -> None:
    sentences = frame(*(sentence(0, problem_id=i, **ABSENT) for i in range(5)))

    with pytest.raises(NotEnoughDataError) as caught:
        make_labels(sentences, Labels())

    assert "none of 5 problem(s) can be labelled (problem 0: 1 of 1" in caught.value.what
    assert caught.value.what.endswith("; and 2 more)")


def test_a_missing_measure_of_a_dropped_sentence_does_not_matter() -> None:
    last: dict[str, Any] = {"counterfactual_importance_accuracy": None}

    labels = make_labels(frame(sentence(0), sentence(1, **last)), Labels())

    assert labels.height == 1


def test_no_sentences_make_no_labels() -> None:
    assert make_labels(frame(sentence(0)).clear(), Labels()).height == 0


def test_the_bound_on_rollouts_bounds_the_counts() -> None:
    sentences = frame(sentence(0, overdeterminedness=0.25), sentence(1))

    assert make_labels(sentences, Labels())["n_rollouts"].to_list() == [100]
    assert make_labels(sentences, Labels(), n_max=8)["n_rollouts"].to_list() == [8]


# --- the published dataset


REAL = {
    # model, setting: sentences, median standard error of those that have one, share of zeros
    ("deepseek-r1-distill-llama-8b", "correct_base_solution"): (818, 0.0377, 0.334),
    ("deepseek-r1-distill-llama-8b", "incorrect_base_solution"): (543, 0.0608, 0.204),
    ("deepseek-r1-distill-qwen-14b", "correct_base_solution"): (695, 0.0195, 0.473),
    ("deepseek-r1-distill-qwen-14b", "incorrect_base_solution"): (885, 0.0267, 0.354),
}


@pytest.mark.real_data
@pytest.mark.parametrize(("name", "setting"), REAL)
def test_labels_of_the_published_rollouts(real_rollouts: Path, name: str, setting: str) -> None:
    n_labels, median_se, zero_share = REAL[name, setting]
    options = Rollouts(source=MirrorSource(kind="mirror", folder=str(real_rollouts)))
    checkpoint = StandInCheckpoint(kind="stand_in", architecture="qwen2")
    model = Model(rollouts_dir=name, checkpoint=checkpoint, n_layers=4)
    sentences = read_rollouts(FolderRollouts(real_rollouts), model, options, setting).sentences

    labels = make_labels(sentences, Labels())
    legacy = make_labels(sentences, Labels(tie_rule="legacy"))

    assert labels.height == n_labels
    assert labels["importance_se"].median() == pytest.approx(median_se, abs=5e-5)
    assert (labels["importance_abs"] == 0).mean() == pytest.approx(zero_share, abs=1e-3)
    assert labels["n_rollouts"].null_count() == 0
    assert labels["n_dissimilar_correct"].null_count() <= 1
    zero = labels.filter(pl.col("importance_abs") == 0)["label_status"]
    assert set(zero) == {"no_dissimilar", "equal_rates"}
    assert set(labels["label_status"]) == {"no_dissimilar", "equal_rates", "measured"}
    for (problem_id,), own in legacy.group_by("problem_id"):
        threshold = np.percentile(own["importance_abs"].to_numpy(), 90)
        assert own["is_anchor"].to_list() == (own["importance_abs"] >= threshold).to_list()
        ranked = labels.filter(problem_id=problem_id)
        assert ranked["is_anchor"].sum() <= own["is_anchor"].sum()
        assert ranked["is_anchor"].sum() == own.height - math.ceil(0.9 * (own.height - 1))
