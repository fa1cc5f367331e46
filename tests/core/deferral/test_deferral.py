from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from taprobe_core.deferral.plans import POINT_ESTIMATE, plan_deferrals, relabel_runs
from taprobe_core.errors import LabelError, PlanError
from taprobe_core.study.config import Deferral
from taprobe_core.tables import DECISIONS, PLANS, PROTOCOLS, SCORES, SPLITS, check_table, schema_of

Problem = list[tuple[float, bool]]


def _scores(folds: list[tuple[dict[int, Problem], dict[int, Problem]]]) -> pl.DataFrame:
    """Scores of one recipe; a fold is (val problems, test problems), a problem (score, anchor)s."""
    rows = [
        (problem_id, index, "linear_probe", "lopo", fold, split, score)
        for fold, sides in enumerate(folds)
        for split, problems in zip(("val", "test"), sides, strict=True)
        for problem_id, problem in problems.items()
        for index, (score, _) in enumerate(problem)
    ]
    schema = {
        "problem_id": pl.Int64,
        "sentence_idx": pl.Int64,
        "recipe": pl.String,
        "protocol": pl.Enum(PROTOCOLS),
        "fold": pl.Int32,
        "split": pl.Enum(SPLITS),
        "score": pl.Float32,
    }
    frame = pl.DataFrame(rows, schema, orient="row").with_columns(
        target_value=pl.lit(None, pl.Float64), is_positive=pl.lit(None, pl.Boolean)
    )
    return check_table(frame, SCORES, "test")


def _labels(*problems: dict[int, Problem]) -> pl.DataFrame:
    merged = {problem_id: rows for group in problems for problem_id, rows in group.items()}
    rows = [
        (problem_id, index, anchor)
        for problem_id, problem in merged.items()
        for index, (_, anchor) in enumerate(problem)
    ]
    schema = {"problem_id": pl.Int64, "sentence_idx": pl.Int64, "is_anchor": pl.Boolean}
    return pl.DataFrame(rows, schema, orient="row")


VAL = {1: [(0.1, False), (0.3, False), (0.5, True), (0.6, False), (0.9, True)]}
TEST = {2: [(0.2, False), (0.55, False), (0.58, True), (0.1, True), (0.95, True), (0.7, False)]}


def test_golden_by_hand():
    """Val scores 0.1 0.3 0.5 0.6 0.9, anchors 0.5 and 0.9: 0.5 and 0.6 stand the wrong way round.

    Budget 0.2: to defer one leaves one of four wrong, to defer none one of five, which is less.
    The lowest such pair takes 0.3 as negative and everything above: t_negative is 0.3 and
    t_positive the next of the 101 quantiles, 0.308.
    Error 0: both must be deferred; t_negative is 0.3, t_positive the quantile above 0.6, 0.612.
    """
    tables = plan_deferrals(
        _scores([(VAL, TEST)]), _labels(VAL, TEST), Deferral(budgets=(0.2,), errors=(0.0,))
    )
    budget, error = tables.plans.to_dicts()
    assert error["t_negative"] == pytest.approx([0.3])
    assert error["t_positive"] == pytest.approx([0.612])
    assert (error["val_deferral_rate"], error["val_accepted_error"]) == (0.4, 0.0)
    decisions = (
        tables.decisions.filter(objective="error").sort("sentence_idx")["decision"].to_list()
    )
    negative, positive, defer = "accept_negative", "accept_positive", "defer"
    assert decisions == [negative, defer, defer, negative, positive, positive]
    expected = {
        "n_total": 6,
        "n_deferred": 2,
        "n_accepted": 4,
        "n_accepted_errors": 2,
        "n_accepted_positives": 2,
        "n_anchors": 3,
        "n_missed_anchors": 1,
        "deferral_rate": 1 / 3,
        "accepted_error": 0.5,
        "accepted_anchor_recall": 0.5,
        "positive_precision": 0.5,
        "all_negative_error": 0.5,
        "n_banks": 3,
        "n_banks_all": 7,
        "meets_objective": True,
        "meets_objective_on_test": False,
        "guarantee": POINT_ESTIMATE,
    }
    assert {name: error[name] for name in expected} == expected
    assert (budget["val_deferral_rate"], budget["val_accepted_error"]) == (0.0, 0.2)
    assert budget["t_negative"] == pytest.approx([0.3])
    assert budget["t_positive"] == pytest.approx([0.308])


def test_error_is_pooled_over_accepted_sentences_not_averaged_over_folds():
    """10 of 100 wrong and 1 of 1 wrong are 11 of 101, not the mean of 0.1 and 1."""
    val = {1: [(0.0, False), (1.0, True)]}
    many = {2: [(0.0, index < 10) for index in range(100)]}
    one = {3: [(0.0, True)]}
    tables = plan_deferrals(
        _scores([(val, many), (val, one)]),
        _labels(val, many, one),
        Deferral(budgets=(0.0,), errors=()),
    )
    (plan,) = tables.plans.to_dicts()
    assert plan["n_folds"] == 2
    assert plan["accepted_error"] == 11 / 101
    assert len(plan["t_negative"]) == 2


def test_rates_over_nothing_are_null():
    val = {1: [(0.2, False), (0.8, True)]}
    test = {2: [(0.5, False), (0.5, True)]}
    tables = plan_deferrals(
        _scores([(val, test)]), _labels(val, test), Deferral(budgets=(), errors=(0.0,))
    )
    (plan,) = tables.plans.to_dicts()
    assert (plan["val_deferral_rate"], plan["n_accepted"]) == (0.0, 2)
    # An anchor and another sentence tied between the two force a gap around 0.5.
    gap = {1: [(0.2, False), (0.5, True), (0.5, False), (0.8, True)]}
    tables = plan_deferrals(
        _scores([(gap, test)]), _labels(gap, test), Deferral(budgets=(), errors=(0.0,))
    )
    (plan,) = tables.plans.to_dicts()
    assert plan["n_accepted"] == 0
    assert plan["accepted_error"] is None
    assert plan["accepted_anchor_recall"] is None
    assert plan["positive_precision"] is None
    assert plan["meets_objective_on_test"] is False


def test_an_error_that_nothing_meets_is_said():
    val = {1: [(0.5, False), (0.5, True)]}
    tables = plan_deferrals(
        _scores([(val, TEST)]), _labels(val, TEST), Deferral(budgets=(), errors=(0.1,))
    )
    assert tables.plans["meets_objective"].to_list() == [False]
    assert tables.plans["val_accepted_error"].to_list() == [0.5]


def test_an_objective_is_met_only_if_every_fold_meets_it():
    hopeless = {4: [(0.5, False), (0.5, True)]}
    folds = [(VAL, TEST), (hopeless, {3: TEST[2]})]
    tables = plan_deferrals(
        _scores(folds),
        _labels(VAL, TEST, hopeless, {3: TEST[2]}),
        Deferral(budgets=(), errors=(0.1,)),
    )
    assert tables.plans.select("n_folds", "meets_objective").rows() == [(2, False)]


def test_no_objectives_give_empty_tables_that_keep_their_contract():
    tables = plan_deferrals(
        _scores([(VAL, TEST)]), _labels(VAL, TEST), Deferral(budgets=(), errors=())
    )
    assert check_table(tables.plans, PLANS, "test").height == 0
    assert check_table(tables.decisions, DECISIONS, "test").height == 0


@pytest.mark.parametrize("side", [0, 1])
def test_a_fold_without_val_or_test_is_refused_by_name(side):
    fold = [VAL, TEST]
    fold[side] = {}
    with pytest.raises(PlanError, match=r"linear_probe.*lopo, fold 0\nFix: "):
        plan_deferrals(_scores([(fold[0], fold[1])]), _labels(VAL, TEST), Deferral())


def test_a_score_without_label_is_refused():
    with pytest.raises(
        LabelError, match=r"6 scored sentences have no label.*sentence 0 of problem 2"
    ):
        plan_deferrals(_scores([(VAL, TEST)]), _labels(VAL), Deferral())


problem = st.lists(
    st.tuples(st.sampled_from([0.0, 0.2, 0.5, 0.9]), st.booleans()), min_size=1, max_size=9
)


@settings(max_examples=25, deadline=None)
@given(problem, problem, problem)
def test_tables_keep_their_contract_and_add_up(first, second, third):
    folds = [({1: first}, {2: second, 3: third}), ({2: second}, {1: first})]
    labels = _labels({1: first, 2: second, 3: third})
    tables = plan_deferrals(_scores(folds), labels, Deferral(budgets=(0.0, 0.3), errors=(0.1,)))
    plans = check_table(tables.plans, PLANS, "test")
    decisions = check_table(tables.decisions, DECISIONS, "test")
    assert decisions.height == 3 * (len(first) + len(second) + len(third))
    for plan in plans.iter_rows(named=True):
        assert plan["n_deferred"] + plan["n_accepted"] == plan["n_total"]
        made = decisions.filter(
            objective=plan["objective"], objective_value=plan["objective_value"]
        )["decision"].to_list()
        assert made.count("defer") == plan["n_deferred"]
        assert made.count("accept_positive") == plan["n_accepted_positives"]
        assert 0 <= plan["n_missed_anchors"] <= min(plan["n_anchors"], plan["n_accepted_errors"])
        if plan["objective"] == "budget":
            assert plan["val_deferral_rate"] <= plan["objective_value"]


@settings(max_examples=40, deadline=None)
@given(st.dictionaries(st.integers(0, 3), st.sets(st.integers(0, 12)), min_size=1))
def test_runs_cover_the_deferred_and_count_each_bank_once(deferred):
    rows = [
        (problem_id, index, "linear_probe", "holdout", "budget", 0.2, 0, 0.5, decision)
        for problem_id, marked in deferred.items()
        for index, decision in (
            (index, "defer" if index in marked else "accept_negative") for index in range(13)
        )
    ]
    schema = schema_of(DECISIONS)
    shuffled = pl.DataFrame(rows, schema, orient="row").sample(fraction=1.0, shuffle=True, seed=1)
    runs = relabel_runs(check_table(shuffled, DECISIONS, "test"))
    for problem_id, marked in deferred.items():
        own = runs.filter(problem_id=problem_id)
        ranges = list(zip(own["start_sentence_idx"], own["end_sentence_idx"], strict=True))
        assert sorted(index for start, end in ranges for index in range(start, end)) == sorted(
            marked
        )
        assert all(start - 1 not in marked and end not in marked for start, end in ranges)
        assert own["n_banks"].sum() == len(marked | {index + 1 for index in marked})
        assert own["n_sentences"].sum() == len(marked)


def test_decisions_do_not_depend_on_row_order():
    other_val = {4: [(0.2, False), (0.4, True), (0.8, True)]}
    scores = _scores([(VAL, TEST), (other_val, {3: TEST[2]})])
    labels = _labels(VAL, TEST, other_val, {3: TEST[2]})
    shuffled = scores.sample(fraction=1.0, shuffle=True, seed=3)
    key = ["objective", "problem_id", "sentence_idx"]
    one, other = (plan_deferrals(each, labels, Deferral()) for each in (scores, shuffled))
    assert one.plans.equals(other.plans)
    assert one.decisions.sort(key).equals(other.decisions.sort(key))
    assert np.isfinite(one.decisions["score"].to_numpy()).all()
