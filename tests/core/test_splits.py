from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from taprobe_core.errors import LeakageError, PlanError
from taprobe_core.splits import Fold, check_no_leakage, make_folds
from taprobe_core.study.config import Splits

PUBLISHED = (
    330, 1591, 2050, 2137, 2189, 2236, 2238, 2870, 3360, 3448,
    3550, 3916, 3935, 4019, 4164, 4605, 4682, 6481, 6596, 6998,
)  # fmt: skip
HOLDOUT, LOPO = Splits(protocols=("holdout",)), Splits(protocols=("lopo",))
some_ids = st.lists(st.integers(0, 10_000), min_size=3, max_size=40, unique=True)


def test_holdout_of_the_published_problems_is_the_known_one() -> None:
    (fold,) = make_folds(PUBLISHED, HOLDOUT)

    assert fold.test == (1591, 3935, 4019)
    assert fold.val == (2238, 3360, 4605)
    assert len(fold.train) == 14


def test_lopo_of_the_published_problems_validates_on_the_smallest_ids() -> None:
    folds = make_folds(PUBLISHED, LOPO)

    assert [fold.test for fold in folds] == [(problem_id,) for problem_id in PUBLISHED]
    assert [fold.index for fold in folds] == list(range(20))
    assert sum(fold.val == (330, 1591, 2050) for fold in folds) == 17
    assert [fold.val for fold in folds[:3]] == [
        (1591, 2050, 2137),
        (330, 2050, 2137),
        (330, 1591, 2137),
    ]


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


@pytest.mark.parametrize("splits", [HOLDOUT, LOPO])
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
