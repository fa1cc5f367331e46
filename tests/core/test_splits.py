from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from taprobe_core.errors import LeakageError, PlanError
from taprobe_core.splits import (
    SIDES,
    Fold,
    check_no_leakage,
    inner_folds,
    make_folds,
)
from taprobe_core.study.config import Splits

PUBLISHED = (
    330, 1591, 2050, 2137, 2189, 2236, 2238, 2870, 3360, 3448,
    3550, 3916, 3935, 4019, 4164, 4605, 4682, 6481, 6596, 6998,
)  # fmt: skip
HOLDOUT, LOPO = Splits(protocols=("holdout",)), Splits(protocols=("lopo",))
SMALLEST = Splits(protocols=("lopo",), lopo_validation="smallest")
some_ids = st.lists(st.integers(0, 10_000), min_size=3, max_size=40, unique=True)


def test_holdout_of_the_published_problems_is_the_known_one() -> None:
    (fold,) = make_folds(PUBLISHED, HOLDOUT)

    assert fold.test == (1591, 3935, 4019)
    assert fold.val == (2238, 3360, 4605)
    assert len(fold.train) == 14


def test_lopo_can_validate_on_the_smallest_ids() -> None:
    folds = make_folds(PUBLISHED, SMALLEST)

    assert [fold.test for fold in folds] == [(problem_id,) for problem_id in PUBLISHED]
    assert [fold.index for fold in folds] == list(range(20))
    assert sum(fold.val == (330, 1591, 2050) for fold in folds) == 17
    assert [fold.val for fold in folds[:3]] == [
        (1591, 2050, 2137),
        (330, 2050, 2137),
        (330, 1591, 2137),
    ]


def test_lopo_validates_on_every_problem_in_turn() -> None:
    folds = make_folds(PUBLISHED, LOPO)

    assert [fold.test for fold in folds] == [(problem_id,) for problem_id in PUBLISHED]
    assert folds[0].val == (1591, 2050, 2137)
    assert folds[18].val == (330, 1591, 6998)
    validated = Counter(problem_id for fold in folds for problem_id in fold.val)
    assert validated == dict.fromkeys(PUBLISHED, 3)


@pytest.mark.parametrize(
    ("n", "sizes"), [(3, (1, 1, 1)), (4, (2, 1, 1)), (5, (3, 1, 1)), (16, (11, 2, 3))]
)
def test_holdout_of_few_problems_keeps_every_side(n: int, sizes: tuple[int, int, int]) -> None:
    (fold,) = make_folds(range(n), HOLDOUT)

    assert (len(fold.train), len(fold.val), len(fold.test)) == sizes


def test_holdout_takes_room_for_test_from_the_larger_side() -> None:
    greedy = Splits(protocols=("holdout",), train_fraction=0.05, val_fraction=0.94)

    (fold,) = make_folds(range(3), greedy)

    assert (len(fold.train), len(fold.val), len(fold.test)) == (1, 1, 1)


@given(some_ids, st.integers(0, 99), st.floats(0.05, 0.6), st.floats(0.05, 0.35), st.randoms())
def test_sides_are_disjoint_and_cover_all_problems(
    ids: list[int], seed: int, train: float, val: float, rng: object
) -> None:
    splits = Splits(train_fraction=train, val_fraction=val, seed=seed)
    folds = make_folds(ids, splits)

    for fold in folds:
        check_no_leakage(fold)
        assert sorted(fold.train + fold.val + fold.test) == sorted(ids)
        assert all(list(side) == sorted(side) for side in (fold.train, fold.val, fold.test))
    tested = [fold.test for fold in folds if fold.protocol == "lopo"]
    assert tested == [(problem_id,) for problem_id in sorted(ids)]
    shuffled = list(ids)
    rng.shuffle(shuffled)  # type: ignore[attr-defined]
    assert make_folds([*shuffled, shuffled[0]], splits) == folds


def test_protocols_come_in_the_order_asked() -> None:
    folds = make_folds(range(4), Splits(protocols=("lopo", "holdout")))

    assert [fold.protocol for fold in folds] == ["lopo"] * 4 + ["holdout"]


@pytest.mark.parametrize("splits", [HOLDOUT, LOPO, SMALLEST])
def test_too_few_problems_name_protocol_count_and_fix(splits: Splits) -> None:
    with pytest.raises(PlanError, match=f"{splits.protocols[0]} needs 3 .*found n = 2") as error:
        make_folds([5, 9, 5], splits)

    assert error.value.fix is not None
    assert "max_problems" in error.value.fix


def test_a_fraction_that_empties_training_is_refused() -> None:
    hungry = Splits(protocols=("lopo",), train_fraction=0.05, val_fraction=0.9)

    with pytest.raises(PlanError, match="lopo with n = 3 problems leaves train empty"):
        make_folds([1, 2, 3], hungry)


@pytest.mark.parametrize(
    "fold",
    [
        Fold("holdout", 0, (1, 2), (3,), (2,)),
        Fold("holdout", 0, (1,), (2,), (2,)),
        Fold("lopo", 4, (2, 2), (3,), (4,)),
    ],
)
def test_a_planted_leak_is_found(fold: Fold) -> None:
    with pytest.raises(LeakageError, match=rf"problems \[2\].*{fold.protocol} fold {fold.index}"):
        check_no_leakage(fold)


# --- problems that one model and setting has, of those of the study


def sides_of(fold: Fold) -> dict[int, str]:
    return {problem_id: side for side in SIDES for problem_id in getattr(fold, side)}


@given(
    ids=st.lists(st.integers(0, 99), min_size=14, max_size=30, unique=True),
    data=st.data(),
    rule=st.sampled_from(["rotating", "smallest"]),
    k=st.sampled_from([0, 3]),
)
def test_what_is_absent_moves_no_other_problem(
    ids: list[int], data: st.DataObject, rule: str, k: int
) -> None:
    splits = Splits(lopo_validation=rule, inner_folds=k)
    absent = data.draw(st.sets(st.sampled_from(ids), max_size=1))
    whole = {(fold.protocol, fold.index): fold for fold in make_folds(ids, splits)}

    cut = make_folds(ids, splits, present=set(ids) - absent)

    for fold in cut:
        full = whole[fold.protocol, fold.index]
        wanted = {each: side for each, side in sides_of(full).items() if each not in absent}
        assert sides_of(fold) == wanted
        assert set(fold.absent) == absent - set(full.test)
        everywhere = [fold, *inner_folds(fold, splits)]
        assert all(not absent & set(sides_of(each)) for each in everywhere)
    left_out = whole.keys() - {(fold.protocol, fold.index) for fold in cut}
    assert all(set(whole[key].test) <= absent for key in left_out)


def test_a_fold_whose_tested_problem_is_absent_is_left_out() -> None:
    here = [each for each in range(14) if each != 2]

    folds = make_folds(range(14), LOPO, present=here)

    assert [(fold.index, fold.test) for fold in folds] == [(each, (each,)) for each in here]


def test_where_nobody_is_left_to_validate_the_next_problem_does() -> None:
    # Fold 1 tests problem 1 and validates on problem 2 alone.
    folds = make_folds(range(6), LOPO, present=[1, 0, 3, 4, 5])

    assert (folds[1].train, folds[1].val, folds[1].test) == ((0, 4, 5), (3,), (1,))


def test_a_side_that_is_emptied_names_the_fold_and_who_is_missing() -> None:
    with pytest.raises(
        PlanError, match=r"2 of 3 problems .*\[2\] have no rows.* empty in lopo fold 0"
    ):
        make_folds(range(3), LOPO, present=[0, 1])


def test_a_problem_of_no_fold_is_refused() -> None:
    with pytest.raises(PlanError, match=r"problems \[9\] are in no fold"):
        make_folds(range(5), LOPO, present=[0, 1, 9])


# --- inner folds


@given(some_ids, st.integers(0, 9), st.integers(2, 6))
def test_inner_folds_validate_every_learning_problem_once(
    ids: list[int], seed: int, k: int
) -> None:
    splits = Splits(seed=seed, inner_folds=k)
    for outer in make_folds(ids, splits):
        assert (outer.val, outer.inner) == ((), None)
        assert sorted(outer.train + outer.test) == sorted(ids)
        if len(outer.train) < k:
            with pytest.raises(PlanError, match=rf"{k} inner folds of {len(outer.train)}"):
                inner_folds(outer, splits)
            continue

        inner = inner_folds(outer, splits)

        assert [fold.inner for fold in inner] == list(range(k))
        assert sorted(each for fold in inner for each in fold.val) == list(outer.train)
        sizes = [len(fold.val) for fold in inner]
        assert max(sizes) - min(sizes) <= 1
        for fold in inner:
            check_no_leakage(fold, outer)
            assert sorted(fold.train + fold.val) == list(outer.train)
            assert (fold.test, fold.index, fold.protocol) == ((), outer.index, outer.protocol)
        assert inner_folds(outer, splits) == inner


def test_inner_folds_are_drawn_by_seed_and_fold() -> None:
    splits = Splits(protocols=("lopo",), inner_folds=4)
    folds = make_folds(PUBLISHED, splits)
    groups = [[inner.val for inner in inner_folds(fold, splits)] for fold in folds[:2]]
    reseeded = splits.model_copy(update={"seed": 1})

    assert groups[0] != groups[1]
    assert groups[0] != [inner.val for inner in inner_folds(folds[0], reseeded)]
    assert str(inner_folds(folds[2], splits)[1]) == "lopo fold 2 inner fold 1"
    # Written down: the same on every machine and under every version.
    assert groups[0][0] == (2189, 2238, 3360, 3935, 4605)


def test_without_inner_folds_there_are_none() -> None:
    assert inner_folds(make_folds(range(5), LOPO)[0], LOPO) == []


def test_an_inner_group_without_rows_is_left_out() -> None:
    splits = Splits(protocols=("lopo",), inner_folds=4)
    whole = make_folds(range(5), splits)[0]
    first = inner_folds(whole, splits)[0]
    (lost,) = first.val

    fold = make_folds(range(5), splits, present=set(range(5)) - {lost})[0]

    assert fold.absent == (lost,)
    assert [inner.inner for inner in inner_folds(fold, splits)] == [1, 2, 3]
    assert all(lost not in sides_of(inner) for inner in inner_folds(fold, splits))


def test_inner_folds_with_nothing_to_learn_from_are_refused() -> None:
    splits = Splits(protocols=("lopo",), inner_folds=2)
    fold = make_folds(range(3), splits, present=[0, 1])[0]

    with pytest.raises(PlanError, match=r"problems \[2\] have no rows.*lopo fold 0 inner fold"):
        inner_folds(fold, splits)


def test_an_inner_fold_that_holds_a_tested_problem_is_found() -> None:
    outer = Fold("lopo", 4, (1, 2, 3), (), (4,))

    with pytest.raises(LeakageError, match=r"problems \[4\] .*lopo fold 4 inner fold 0"):
        check_no_leakage(Fold("lopo", 4, (1, 4), (2,), (), inner=0), outer)
