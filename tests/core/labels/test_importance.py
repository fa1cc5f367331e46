"""Published measures against hand-computed values, the edge rules, and the laws they keep."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from taprobe_core.errors import ConfigError, DataError, LabelError, SchemaError
from taprobe_core.labels import (
    Rollout,
    answer_kl,
    published_measures,
    read_solutions,
    trigram_cosine,
    trigram_masked_dissimilar,
)

FIELDS = {
    "accuracy",
    "resampling_importance_accuracy",
    "resampling_importance_kl",
    "counterfactual_importance_accuracy",
    "counterfactual_importance_kl",
    "different_trajectories_fraction",
    "overdeterminedness",
}


def differs(a: str, b: str) -> bool:
    return a != b


def bank(*rows: tuple[str, str]) -> list[Rollout]:
    """Rollouts as (answer, resampled sentence); "7" is right."""
    return [Rollout(answer, answer == "7", sentence) for answer, sentence in rows]


SENTENCES = ["first one", "second one", "third one"]


def test_hand_computed_example() -> None:
    first = bank(("7", "first one"), ("9", "other"), ("9", "other"), ("7", "else"), ("", "other"))
    second = bank(("7", "second one"), ("7", "second one"), ("7", "x"), ("9", "y"))
    third = bank(("7", "third one"), ("7", "z"))
    one, two, three = published_measures(SENTENCES, [first, second, third], differs, kl_alpha=1.0)

    assert one["accuracy"] == 2 / 4
    assert one["resampling_importance_accuracy"] == 3 / 4 - 2 / 4
    assert one["counterfactual_importance_accuracy"] == 1 / 3 - 3 / 4
    assert one["different_trajectories_fraction"] == 3 / 4
    assert one["overdeterminedness"] == 1 - 3 / 4
    # P: 7 twice, 9 twice; Q: 7 three times, 9 once; one pseudo-count each.
    expected = 0.5 * math.log(0.5 / (4 / 6)) + 0.5 * math.log(0.5 / (2 / 6))
    assert one["resampling_importance_kl"] == pytest.approx(expected, rel=1e-12)
    # P: dissimilar 9, 9, 7; Q: the second bank and the similar 7 of the first.
    expected = 0.4 * math.log(0.4 / (5 / 7)) + 0.6 * math.log(0.6 / (2 / 7))
    assert one["counterfactual_importance_kl"] == pytest.approx(expected, rel=1e-12)

    assert two["counterfactual_importance_accuracy"] == 1 / 2 - 1.0
    assert two["resampling_importance_accuracy"] == 1.0 - 3 / 4
    assert three == dict.fromkeys(FIELDS, 0.0) | {"accuracy": 1.0}


def test_without_dissimilar_rollouts_the_counterfactual_importances_are_zero() -> None:
    same = bank(("7", "first one"), ("9", "first one"))
    one, _ = published_measures(SENTENCES[:2], [same, bank(("9", "x"))], differs)
    assert one["counterfactual_importance_accuracy"] == 0.0
    assert one["counterfactual_importance_kl"] == 0.0
    assert one["different_trajectories_fraction"] == 0.0
    assert one["overdeterminedness"] == 0.5
    assert one["resampling_importance_accuracy"] == -0.5


def test_successor_is_the_next_sentence_with_data_but_resampling_needs_its_neighbour() -> None:
    first, third = bank(("9", "x"), ("9", "y")), bank(("7", "x"), ("9", "x"))
    for missing in ([], bank(("", "x"))):
        one, two, _ = published_measures(SENTENCES, [first, missing, third], differs)
        assert one["counterfactual_importance_accuracy"] == -0.5
        assert one["resampling_importance_accuracy"] == 0.0
        assert one["resampling_importance_kl"] == 0.0
        assert two == dict.fromkeys(FIELDS, 0.0)


def test_without_any_successor_only_the_accuracy_remains() -> None:
    one, two = published_measures(SENTENCES[:2], [bank(("7", "x")), []], differs)
    assert one == dict.fromkeys(FIELDS, 0.0) | {"accuracy": 1.0}
    assert two == dict.fromkeys(FIELDS, 0.0)


def test_the_answer_none_counts_for_accuracy_but_not_in_counterfactual_sets() -> None:
    first = bank(("None", "x"), ("7", "x"), ("9", "first one"))
    second = bank(("None", "x"), ("7", "x"))
    one, _ = published_measures(SENTENCES[:2], [first, second], differs)
    assert one["accuracy"] == 1 / 3
    assert one["resampling_importance_accuracy"] == 1 / 2 - 1 / 3
    assert one["different_trajectories_fraction"] == 1 / 2
    assert one["counterfactual_importance_accuracy"] == 0.0


def test_sentences_under_four_characters_carry_no_data() -> None:
    banks = [bank(("9", "x")), bank(("9", "x")), bank(("7", "x"))]
    one, two, _ = published_measures(["first one", "Ok.", "third one"], banks, differs)
    assert two == dict.fromkeys(FIELDS, 0.0)
    assert one["counterfactual_importance_accuracy"] == -1.0


def test_similarity_is_asked_once_per_distinct_sentence() -> None:
    asked: list[tuple[str, str]] = []

    def record(a: str, b: str) -> bool:
        asked.append((a, b))
        return True

    published_measures(SENTENCES[:1], [bank(*[("7", "x"), ("9", "x"), ("9", "y")] * 50)], record)
    assert sorted(asked) == [("first one", "x"), ("first one", "y")]


def test_refuses_banks_that_do_not_match_and_a_pseudo_count_of_zero() -> None:
    with pytest.raises(LabelError, match="1 rollout banks for 2 sentences"):
        published_measures(SENTENCES[:2], [[]], differs)
    for alpha in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ConfigError, match="kl_alpha"):
            published_measures([], [], differs, kl_alpha=alpha)


def test_kl_of_disjoint_answers_is_the_price_of_the_pseudo_count() -> None:
    p, q = bank(("7", "x")), bank(("9", "x"))
    assert answer_kl(p, q, 1e-9) == pytest.approx(math.log(1e9), rel=1e-6)
    # (2/3, 1/3) against (1/3, 2/3)
    assert answer_kl(p, q, 1.0) == pytest.approx(math.log(2) / 3, rel=1e-12)
    assert answer_kl(p, p * 3, 1e-9) == 0.0


rollouts = st.builds(
    Rollout, st.sampled_from(["7", "8", "9", "None", ""]), st.booleans(), st.sampled_from("abcd")
)
traces = st.lists(st.lists(rollouts, max_size=12), min_size=1, max_size=5)


@given(traces, st.randoms(use_true_random=False), st.sampled_from([1e-9, 0.5, 1.0]))
def test_measures_are_in_range_and_blind_to_the_order_of_rollouts(
    banks: list[list[Rollout]], rng: random.Random, alpha: float
) -> None:
    names = [f"name {letter}" for letter in "abcdef"[: len(banks)]]

    def is_dissimilar(a: str, b: str) -> bool:
        return a[-1] != b

    found = published_measures(names, banks, is_dissimilar, alpha)
    for measured in found:
        assert set(measured) == FIELDS
        assert all(math.isfinite(value) for value in measured.values())
        assert measured["resampling_importance_kl"] >= 0
        assert measured["counterfactual_importance_kl"] >= 0
        assert abs(measured["counterfactual_importance_accuracy"]) <= 1
        assert 0 <= measured["different_trajectories_fraction"] <= 1
        assert 0 <= measured["overdeterminedness"] < 1
    shuffled = [rng.sample(bank, len(bank)) for bank in banks]
    assert published_measures(names, shuffled, is_dissimilar, alpha) == found


words = st.text("abc 01#.", max_size=12)


@given(words, words)
def test_trigram_cosine_is_symmetric_and_between_zero_and_one(a: str, b: str) -> None:
    cosine = trigram_cosine(a, b)
    assert cosine == trigram_cosine(b, a)
    assert 0.0 <= cosine <= 1.0
    assert trigram_cosine(a, a) == 1.0
    assert trigram_masked_dissimilar(a, b) == (cosine < 0.8)


@given(words, st.integers(0, 10**6), st.integers(0, 10**6))
def test_numbers_make_no_difference(text: str, one: int, two: int) -> None:
    assert trigram_cosine(f"{text} {one}.", f"{text} {two}.") == 1.0


def test_trigram_cosine_of_a_small_pair() -> None:
    # "abcd" has abc, bcd; "abce" has abc, bce.
    assert trigram_cosine("abcd", "abce") == pytest.approx(0.5)
    assert trigram_cosine("abc", "xyz") == 0.0
    assert trigram_cosine("", "abc") == 0.0
    assert not trigram_masked_dissimilar("abcd", "abce", threshold=0.5)


def row(**changes: object) -> dict[str, object]:
    return {"answer": "7", "is_correct": True, "chunk_resampled": "x", "extra": [1]} | changes


def test_reading_solutions_keeps_graded_rows_and_counts_the_others() -> None:
    rows = [row(), row(answer=""), row(answer=None), row(is_correct=None), {"error": "timeout"}]
    found = read_solutions(rows, "chunk_0/solutions.json")
    assert found.rollouts == [
        Rollout("7", True, "x"),
        Rollout("", True, "x"),
        Rollout("", True, "x"),
    ]
    assert (found.n_errors, found.n_ungraded) == (1, 1)


@pytest.mark.parametrize("nothing", [None, "", " ", False, [], {}, float("nan")])
def test_a_row_whose_error_says_nothing_is_an_answer(nothing: object) -> None:
    rows = [row(error=nothing), row(error="timeout"), {"error": {"code": 429}}]

    found = read_solutions(rows, "chunk_0/solutions.json")

    assert (len(found.rollouts), found.n_errors) == (1, 2)


def test_reading_solutions_lists_every_faulty_row() -> None:
    rows = [row(answer=7), row(), [], {"answer": "7", "is_correct": 1}]
    with pytest.raises(SchemaError, match=r"chunk_3/solutions\.json") as caught:
        read_solutions(rows, "chunk_3/solutions.json")
    assert caught.value.faults == (
        "row 0: answer is int",
        "row 2 is a list, not an object",
        "row 3: is_correct is int",
        "row 3: chunk_resampled is absent",
    )


@pytest.mark.parametrize("value", [None, "[]", {"a": 1}])
def test_reading_solutions_refuses_what_is_no_list(value: object) -> None:
    with pytest.raises(DataError, match=r"rollouts are .* in here"):
        read_solutions(value, "here")
