from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from taprobe_core.errors import DataError, NonFiniteError, NotEnoughDataError
from taprobe_core.features import LEAKY_FEATURES, POSITION_FEATURES, ProbeData, join_features

SIZES = {7: 3, 2: 4, 5: 2}
Tables = dict[str, pl.DataFrame]
Activations = dict[int, np.ndarray]


def _keys(sizes: dict[int, int], cut: int) -> pl.DataFrame:
    pairs = [(pid, index) for pid, n in sizes.items() for index in range(n - cut)]
    return pl.DataFrame(pairs, {"problem_id": pl.Int64, "sentence_idx": pl.Int64}, orient="row")


@pytest.fixture
def tables() -> Tables:
    """Labels of three problems without their last sentence, in no particular order."""
    full, labelled = _keys(SIZES, cut=0), _keys(SIZES, cut=1)
    signed = pl.Series("importance_signed", np.linspace(-0.5, 0.5, len(labelled)))
    kept = pl.col("problem_id").replace_strict({pid: n - 1 for pid, n in SIZES.items()})
    labels = labelled.with_columns(
        kept.alias("n_sentences"),
        signed,
        signed.abs().alias("importance_abs"),
        (signed > 0.4).alias("is_anchor"),
    )
    code = pl.col("problem_id") * 10 + pl.col("sentence_idx")
    return {
        "labels": labels.sample(fraction=1, shuffle=True, seed=0),
        "spans": full.with_columns(code.alias("n_tokens")),
        "sentences": full.with_columns(pl.format("p{} s{}", *full.columns).alias("sentence")),
    }


@pytest.fixture
def activations() -> Activations:
    return {
        pid: np.outer(pid * 10 + np.arange(n), [1, -1]).astype(np.float32)
        for pid, n in SIZES.items()
    }


def test_every_member_shares_the_sorted_row_order(tables: Tables, activations: Activations) -> None:
    data = join_features(**tables, activations=activations)

    rows = [(2, 0), (2, 1), (2, 2), (5, 0), (7, 0), (7, 1)]
    assert data.keys.rows() == rows
    assert data.problem_id.tolist() == [pid for pid, _ in rows]
    assert data.texts == [f"p{pid} s{index}" for pid, index in rows]
    codes = [pid * 10 + index for pid, index in rows]
    assert data.activations is not None
    assert data.activations.dtype == np.float32
    assert data.activations.tolist() == [[code, -code] for code in codes]
    assert data.position[:, 3].tolist() == codes
    expected = tables["labels"].sort("problem_id", "sentence_idx")
    assert data.importance_signed.tolist() == expected["importance_signed"].to_list()
    assert data.importance_abs.tolist() == expected["importance_abs"].to_list()
    assert data.is_anchor.tolist() == expected["is_anchor"].to_list()
    assert (data.problems, data.dropped) == ((2, 5, 7), ())


def test_position_follows_the_labelled_sentences(tables: Tables) -> None:
    data = join_features(**tables, activations=None)

    assert data.activations is None
    assert POSITION_FEATURES == ("sentence_idx", "n_sentences", "relative_position", "n_tokens")
    assert set(LEAKY_FEATURES) < set(POSITION_FEATURES)
    assert data.position.dtype == np.float32
    # The lone sentence of problem 5 has relative position 0, not 0/0.
    assert data.position[:, :3].tolist() == [
        [0, 3, 0], [1, 3, 0.5], [2, 3, 1], [0, 1, 0], [0, 2, 0], [1, 2, 1],
    ]  # fmt: skip


def test_rows_and_targets(tables: Tables) -> None:
    data: ProbeData = join_features(**tables, activations=None)

    assert data.rows([7, 2]).tolist() == [0, 1, 2, 4, 5]
    assert data.target("anchor_binary").tolist() == data.is_anchor.astype(float).tolist()
    assert data.target("importance_abs") is data.importance_abs
    assert data.target("importance_signed") is data.importance_signed


def test_a_problem_without_spans_is_dropped_and_reported(
    tables: Tables, activations: Activations
) -> None:
    tables["spans"] = tables["spans"].filter(pl.col("problem_id") != 5)
    del activations[5]

    data = join_features(**tables, activations=activations)

    assert data.dropped == (5,)
    assert data.problems == (2, 7)
    assert len(data.texts) == len(data.position) == 5


def test_no_problem_left_is_not_enough(tables: Tables) -> None:
    tables["spans"] = tables["spans"].clear()

    with pytest.raises(NotEnoughDataError, match="none of 3 labelled problems has spans"):
        join_features(**tables, activations=None)


def test_all_gaps_are_listed_at_once(tables: Tables, activations: Activations) -> None:
    tables["spans"] = tables["spans"].filter(
        ~((pl.col("problem_id") == 2) & (pl.col.sentence_idx < 2))
    )
    tables["sentences"] = tables["sentences"].filter(pl.col("problem_id") != 5)
    del activations[7]

    with pytest.raises(DataError) as error:
        join_features(**tables, activations=activations)

    assert "2 without span in problem 2" in str(error.value)
    assert "1 without text in problem 5" in str(error.value)
    assert "no activations for problem 7" in str(error.value)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (np.zeros((3, 2)), r"activations of problem 2 are \[3, 2\], its spans 4"),
        (np.zeros(4), r"activations of problem 2 are \[4\], its spans 4"),
        (np.zeros((4, 3)), "d_model differs between problems: {2: 3, 5: 2, 7: 2}"),
    ],
)
def test_activations_of_another_shape_are_refused(
    tables: Tables, activations: Activations, wrong: np.ndarray, message: str
) -> None:
    activations[2] = wrong.astype(np.float32)

    with pytest.raises(DataError, match=message):
        join_features(**tables, activations=activations)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_value_that_is_no_number_is_named(
    tables: Tables, activations: Activations, value: float
) -> None:
    activations[7][1, 0] = value

    with pytest.raises(NonFiniteError, match=r"1 activation rows.*\[\(7, 1\)\]"):
        join_features(**tables, activations=activations)
