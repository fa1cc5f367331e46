"""Work on items while the next ones are made: in order, bounded, and its errors are raised here."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from taprobe_core.activations.schedule import each_ahead
from taprobe_core.errors import DiskFullError


def test_without_threads_an_item_is_done_before_the_next_is_made() -> None:
    said: list[str] = []

    def items() -> Iterator[int]:
        for at in range(3):
            said.append(f"made {at}")
            yield at

    done = each_ahead(lambda at: said.append(f"done {at}"), items(), 0)
    assert [at for at, _ in done] == [0, 1, 2]
    assert said == [f"{what} {at}" for at in range(3) for what in ("made", "done")]


def test_threads_work_ahead_within_bounds_and_yield_in_order() -> None:
    made: list[int] = []
    gate = threading.Event()
    both = threading.Barrier(2, timeout=30)

    def items() -> Iterator[int]:
        for at in range(12):
            made.append(at)
            # More than can be pending were made before the first was let go.
            if at == 4:
                gate.set()
            yield at

    def work(at: int) -> int:
        assert gate.wait(30)
        both.wait()  # passed only by two threads at once
        return 10 * at

    found = []
    for pair in each_ahead(work, items(), 2):
        found.append(pair)
        assert len(made) <= len(found) + 5
    assert found == [(at, 10 * at) for at in range(12)]


def test_what_work_raises_is_raised_in_its_turn_and_the_rest_under_way_is_finished() -> None:
    done: list[int] = []

    def work(at: int) -> None:
        if at == 1:
            raise DiskFullError("no space left", "here", "free space")
        done.append(at)

    with pytest.raises(DiskFullError):
        list(each_ahead(work, iter(range(4)), 2))
    assert 0 in done
    assert threading.active_count() == 1 or not any(
        thread.name.startswith("ahead") for thread in threading.enumerate()
    )
