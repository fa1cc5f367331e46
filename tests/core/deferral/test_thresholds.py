from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from taprobe_core.deferral.plans import Objective, candidates, choose, decide, pair_grid

scored = st.lists(
    st.tuples(st.sampled_from([-3.0, 0.0, 0.1, 0.10000001, 0.5, 0.7, 1.0, 40.0]), st.booleans()),
    min_size=1,
    max_size=12,
)
objectives = st.builds(
    Objective,
    st.sampled_from(["budget", "error"]),
    st.sampled_from([0.0, 0.05, 0.2, 0.25, 0.5, 1.0]),
)


def _arrays(rows: list[tuple[float, bool]]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([s for s, _ in rows], np.float32), np.array([a for _, a in rows], bool)


def _by_loops(score, is_anchor, objective):
    """The rule as prose has it: every pair, every sentence, one at a time."""
    found = []
    for low in candidates(score):
        for high in candidates(score):
            if low > high:
                continue
            deferred = accepted = wrong = 0
            for value, anchor in zip(score, is_anchor, strict=True):
                if value >= high:
                    accepted, wrong = accepted + 1, wrong + (not anchor)
                elif value <= low:
                    accepted, wrong = accepted + 1, wrong + bool(anchor)
                else:
                    deferred += 1
            error = wrong / accepted if accepted else float("inf")
            found.append((error, deferred / len(score), low, high, deferred, accepted, wrong))
    if objective.kind == "budget":
        feasible = [row for row in found if row[1] <= objective.value + 1e-12]
        best = min(feasible)
    else:
        feasible = [row for row in found if row[0] <= objective.value]
        best = min(feasible, key=lambda row: (row[1], row[0], *row[2:])) if feasible else min(found)
    return (best[2], best[3], *best[4:], bool(feasible))


@settings(max_examples=25, deadline=None)
@given(scored, objectives)
def test_vectorised_search_equals_the_loops(rows, objective):
    score, is_anchor = _arrays(rows)
    assert tuple(choose(pair_grid(score, is_anchor), objective)) == _by_loops(
        score, is_anchor, objective
    )


@settings(max_examples=30, deadline=None)
@given(scored, st.floats(0, 1), st.floats(0, 1))
def test_a_bigger_budget_never_raises_the_error(rows, one, other):
    grid = pair_grid(*_arrays(rows))
    small, large = sorted((one, other))
    assert (
        choose(grid, Objective("budget", large)).error
        <= choose(grid, Objective("budget", small)).error
    )


@settings(max_examples=30, deadline=None)
@given(scored, st.floats(0, 1), st.floats(0, 1))
def test_a_looser_error_never_defers_more(rows, one, other):
    grid = pair_grid(*_arrays(rows))
    strict, loose = (choose(grid, Objective("error", value)) for value in sorted((one, other)))
    if strict.meets_objective:
        assert loose.meets_objective
        assert loose.n_deferred <= strict.n_deferred


@settings(max_examples=30, deadline=None)
@given(scored)
def test_every_pair_accounts_for_every_sentence_and_decides_as_counted(rows):
    score, is_anchor = _arrays(rows)
    grid = pair_grid(score, is_anchor)
    assert ((grid.n_deferred + grid.n_accepted) == score.size).all()
    for index in range(0, grid.negative.size, max(1, grid.negative.size // 7)):
        codes = decide(score, grid.negative[index], grid.positive[index])
        assert (codes == 2).sum() == grid.n_deferred[index]
        wrong = ((codes == 0) & is_anchor) | ((codes == 1) & ~is_anchor)
        assert wrong.sum() == grid.n_errors[index]


def test_positive_wins_where_both_hold():
    score = np.array([0.2, 0.5, 0.8], np.float32)
    assert decide(score, np.float32(0.5), np.float32(0.5)).tolist() == [0, 1, 1]


def test_nothing_accepted_counts_as_the_worst_error():
    grid = pair_grid(*_arrays([(0.5, True), (0.5, False)]))
    assert grid.error[grid.n_accepted == 0].tolist() == [float("inf")]
    assert choose(grid, Objective("budget", 1.0)).n_accepted > 0
    assert choose(grid, Objective("error", 0.1)).meets_objective is False


def test_candidates_reach_beyond_both_ends_even_where_a_millionth_is_lost():
    near = candidates(np.array([0.25, 0.75], np.float32))
    assert near[0] == np.float32(0.25 - 1e-6)
    assert near[-1] == np.float32(0.75 + 1e-6)
    assert near.size == 103
    far = candidates(np.array([4096.0, 8192.0], np.float32))
    assert far[0] < 4096.0
    assert far[-1] > 8192.0
    assert far.dtype == np.float32
    assert (np.diff(far) > 0).all()


@pytest.mark.parametrize(("budget", "n_deferred"), [(1 - 0.8, 2), (0.19, 0)])
def test_a_budget_of_a_fifth_allows_two_sentences_of_ten(budget, n_deferred):
    tied = [(0.5, True), (0.5, False)]
    rows = [*[(0.1, False)] * 6, *tied, *[(0.9, True)] * 2]
    assert choose(pair_grid(*_arrays(rows)), Objective("budget", budget)).n_deferred == n_deferred
