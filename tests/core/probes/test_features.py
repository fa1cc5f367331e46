from __future__ import annotations

from typing import get_args

import numpy as np
import polars as pl
import pytest

from taprobe_core.errors import DataError, NonFiniteError, NotEnoughDataError
from taprobe_core.probes.features import (
    CAUSAL_POSITION_FEATURES,
    LEAKY_BLOCKS,
    LEAKY_FEATURES,
    POSITION_FEATURES,
    ProbeData,
    join_features,
)
from taprobe_core.study.probes import Feature

SIZES = {7: 3, 2: 4, 5: 2}
ROWS = [(2, 0), (2, 1), (2, 2), (5, 0), (7, 0), (7, 1)]
"""Labelled sentences: all but the last of each problem."""
Tables = dict[str, pl.DataFrame]
Activations = dict[str, dict[int, np.ndarray]]


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
        # Two blank tokens stand between any two sentences, and 9 before the first.
        "spans": full.with_columns(
            code.alias("n_tokens"),
            (7 + (code + 2).cum_sum().over("problem_id") - code).alias("start_token"),
        ).sample(fraction=1, shuffle=True, seed=1),
        "sentences": full.with_columns(pl.format("p{} s{}", *full.columns).alias("sentence")),
    }


@pytest.fixture
def activations() -> Activations:
    means = {
        pid: np.outer(pid * 10 + np.arange(n), [1, -1]).astype(np.float32)
        for pid, n in SIZES.items()
    }
    tokens = {
        pid: np.repeat(rows, rows[:, 0].astype(int), axis=0).astype(np.float16)
        for pid, rows in means.items()
    }
    return {"mean": means, "last": {pid: rows + 1 for pid, rows in means.items()}, "tokens": tokens}


@pytest.fixture
def attention() -> Tables:
    """Scores of every sentence, and of two heads; the last two sentences have none of a head."""
    full = _keys(SIZES, cut=0)
    code = (pl.col("problem_id") * 10 + pl.col("sentence_idx")).cast(pl.Float64)
    n = pl.col("problem_id").replace_strict(SIZES)
    score = pl.when(pl.col("sentence_idx") < n - 2).then(code + pl.col("head"))
    return {
        "scores": full.with_columns((code / 100).alias("attention_score")),
        "vertical": pl.concat(
            full.with_columns(pl.lit(head, pl.Int64).alias("head")).with_columns(
                score.alias("vertical_score")
            )
            for head in (11, 2)
        ),
    }


def test_every_member_shares_the_sorted_row_order(tables: Tables, activations: Activations) -> None:
    data = join_features(**tables, activations=activations)

    assert data.keys.rows() == ROWS
    assert data.problem_id.tolist() == [pid for pid, _ in ROWS]
    assert data.texts == [f"p{pid} s{index}" for pid, index in ROWS]
    codes = [pid * 10 + index for pid, index in ROWS]
    assert set(data.activations) == {"mean", "last"}
    assert data.activations["mean"].dtype == np.float32
    assert data.activations["mean"].tolist() == [[code, -code] for code in codes]
    assert data.activations["last"].tolist() == [[code + 1, 1 - code] for code in codes]
    assert data.position[:, 3].tolist() == codes
    assert data.labels.equals(tables["labels"].sort("problem_id", "sentence_idx"))
    assert (data.problems, data.dropped) == ((2, 5, 7), ())


def test_token_sets_are_those_of_the_labelled_sentences(
    tables: Tables, activations: Activations
) -> None:
    tokens = join_features(**tables, activations=activations).tokens

    assert tokens is not None
    assert tokens.values.dtype == np.float16
    assert tokens.offsets[0] == 0
    assert len(tokens.values) == tokens.offsets[-1]
    sets = np.split(tokens.values[:, 0], tokens.offsets[1:-1])
    for (pid, index), own in zip(ROWS, sets, strict=True):
        # The fixture gives each token its sentence's code, which is also how many there are.
        assert own.tolist() == [pid * 10 + index] * (pid * 10 + index)


def test_attention_has_the_simple_score_alone_where_heads_are_not_kept(
    tables: Tables, attention: Tables
) -> None:
    data = join_features(**tables, attention={"scores": attention["scores"]})

    assert data.attention_columns == ("attention_score",)
    assert data.vertical_attention is not None
    assert data.vertical_attention.dtype == np.float32
    expected = [[(pid * 10 + index) / 100] for pid, index in ROWS]
    np.testing.assert_allclose(data.vertical_attention, expected, rtol=1e-6)


def test_undefined_scores_of_heads_are_filled_and_marked(tables: Tables, attention: Tables) -> None:
    data = join_features(**tables, attention=attention)

    assert data.attention_columns == ("attention_score", "head_2", "head_11", "is_undefined")
    assert data.vertical_attention is not None
    # Defined: sentences 0 and 1 of problem 2, none of problem 5, sentence 0 of problem 7.
    assert data.vertical_attention[:, 1:].tolist() == [
        [22, 31, 0], [23, 32, 0], [22.5, 31.5, 1], [0, 0, 1], [72, 81, 0], [72, 81, 1],
    ]  # fmt: skip


@pytest.mark.parametrize("table", ["scores", "vertical"])
def test_a_sentence_without_attention_is_an_error(
    tables: Tables, attention: Tables, table: str
) -> None:
    lacking = (pl.col("problem_id") == 7) & (pl.col("sentence_idx") == 1)
    attention[table] = attention[table].filter(~lacking)

    with pytest.raises(DataError, match="1 without attention in problem 7"):
        join_features(**tables, attention=attention)


def test_causal_position_counts_the_tokens_so_far(tables: Tables) -> None:
    data = join_features(**tables)

    assert CAUSAL_POSITION_FEATURES == ("sentence_idx", "n_tokens_before", "n_tokens")
    assert data.causal_position.dtype == np.float32
    assert data.causal_position.tolist() == [
        [0, 0, 20], [1, 22, 21], [2, 45, 22], [0, 0, 50], [0, 0, 70], [1, 72, 71],
    ]  # fmt: skip


def test_what_needs_the_whole_trace_is_named() -> None:
    assert set(LEAKY_FEATURES) < set(POSITION_FEATURES)
    assert not set(LEAKY_FEATURES) & set(CAUSAL_POSITION_FEATURES)
    assert set(LEAKY_BLOCKS) < set(get_args(Feature))


def test_position_follows_the_labelled_sentences(tables: Tables) -> None:
    data = join_features(**tables)

    assert (data.activations, data.tokens, data.vertical_attention) == ({}, None, None)
    assert POSITION_FEATURES == ("sentence_idx", "n_sentences", "relative_position", "n_tokens")
    assert data.position.dtype == np.float32
    # The lone sentence of problem 5 has relative position 0, not 0/0.
    assert data.position[:, :3].tolist() == [
        [0, 3, 0], [1, 3, 0.5], [2, 3, 1], [0, 1, 0], [0, 2, 0], [1, 2, 1],
    ]  # fmt: skip


def test_rows_of_problems(tables: Tables) -> None:
    data: ProbeData = join_features(**tables)

    assert data.rows([7, 2]).tolist() == [0, 1, 2, 4, 5]


def test_a_problem_without_spans_is_dropped_and_reported(
    tables: Tables, activations: Activations
) -> None:
    tables["spans"] = tables["spans"].filter(pl.col("problem_id") != 5)
    del activations["mean"][5], activations["tokens"][5]

    data = join_features(**tables, activations=activations)

    assert data.dropped == (5,)
    assert data.problems == (2, 7)
    assert len(data.texts) == len(data.position) == 5


def test_no_problem_left_is_not_enough(tables: Tables) -> None:
    tables["spans"] = tables["spans"].clear()

    with pytest.raises(NotEnoughDataError, match="none of 3 labelled problems has spans"):
        join_features(**tables)


def test_all_gaps_are_listed_at_once(tables: Tables, activations: Activations) -> None:
    tables["spans"] = tables["spans"].filter(
        ~((pl.col("problem_id") == 2) & (pl.col.sentence_idx < 2))
    )
    tables["sentences"] = tables["sentences"].filter(pl.col("problem_id") != 5)
    del activations["tokens"][7]

    with pytest.raises(DataError) as error:
        join_features(**tables, activations=activations)

    assert "2 without span in problem 2" in str(error.value)
    assert "1 without text in problem 5" in str(error.value)
    assert "no activations (tokens) for problem 7" in str(error.value)


@pytest.mark.parametrize(
    ("pooling", "shape", "message"),
    [
        ("mean", (3, 2), r"activations \(mean\) of problem 2 are \[3, 2\], its spans 4"),
        ("last", (4,), r"activations \(last\) of problem 2 are \[4\], its spans 4"),
        ("mean", (4, 3), "d_model of mean differs between problems: {2: 3, 5: 2, 7: 2}"),
        ("tokens", (4, 2), r"activations \(tokens\) of problem 2 are \[4, 2\], its tokens 86"),
    ],
)
def test_activations_of_another_shape_are_refused(
    tables: Tables,
    activations: Activations,
    pooling: str,
    shape: tuple[int, ...],
    message: str,
) -> None:
    activations[pooling][2] = np.zeros(shape, dtype=np.float32)

    with pytest.raises(DataError, match=message):
        join_features(**tables, activations=activations)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize(("pooling", "row"), [("last", 1), ("tokens", 70), ("tokens", 140)])
def test_a_value_that_is_no_number_is_named(
    tables: Tables, activations: Activations, pooling: str, row: int, value: float
) -> None:
    activations[pooling][7][row, 0] = value

    with pytest.raises(NonFiniteError, match=rf"1 activation rows \({pooling}\).*\[\(7, 1\)\]"):
        join_features(**tables, activations=activations)


def test_a_bad_token_of_a_sentence_without_label_is_not_read(
    tables: Tables, activations: Activations
) -> None:
    activations["tokens"][7][141, 0] = np.nan

    assert join_features(**tables, activations=activations).tokens is not None
