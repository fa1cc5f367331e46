"""The policy: sound rules, exact resampling, exact truth, sentences that survive splitting."""

from __future__ import annotations

import re
from collections import Counter
from itertools import pairwise

import pytest
from scipy.stats import chi2_contingency

from taprobe_core.demo import choose_problems, true_importance, truth
from taprobe_core.demo.policy import (
    Policy,
    drawn_answers,
    drawn_rollouts,
    drawn_trace,
    policy,
    told_trace,
)
from taprobe_core.demo.rules import RIGHT_PLAN, State, moves
from taprobe_core.demo.task import N_TASKS, VERBS, Problem, problem, seeded
from taprobe_core.demo.wording import KINDS, dependencies
from taprobe_core.errors import DataError, PlanError
from taprobe_core.labels import Rollout, published_measures, trigram_masked_dissimilar

SAMPLE = [problem(i) for i in seeded("test", "sample").sample(range(N_TASKS), 6)]


def of_verb(verb: str) -> list[Problem]:
    ids = seeded("test", verb).sample(range(N_TASKS), 60)
    return [candidate for candidate in map(problem, ids) if candidate.verb == verb]


def reachable(solver: Policy) -> list[State]:
    found, waiting = {State()}, [State()]
    while waiting:
        for branch in solver.branches(waiting.pop()):
            if branch.after not in found:
                found.add(branch.after)
                waiting.append(branch.after)
    return list(found)


def test_ids_name_problems_one_to_one() -> None:
    assert len({problem(i)[1:] for i in range(N_TASKS)}) == N_TASKS
    assert {problem(i).verb for i in (0, N_TASKS // 2, N_TASKS - 1)} == set(VERBS)
    for outside in (-1, N_TASKS):
        with pytest.raises(IndexError, match="problem ids"):
            problem(outside)


def test_the_statement_has_the_stated_answer() -> None:
    some = Problem(0, "Find", a=3, b=4, c=5, d=2, e=6, f=3)
    assert some.statement == "Find z when x = 3 + 4 * 5, y = x - 2 and z = y + 6 * 3."
    assert some.answer == 39
    assert some.reference.endswith("z = 21 + 18 = \\boxed{39}.")
    assert some.prompt == (
        "Solve this math problem step by step. You MUST put your final answer in \\boxed{}. "
        f"Problem: {some.statement} Solution: \n<think>\n"
    )


@pytest.mark.parametrize("some", SAMPLE, ids=str)
def test_branches_are_a_distribution_and_their_text_tells_them_apart(some: Problem) -> None:
    solver = Policy(some)
    states = reachable(solver)
    spoken = {state.stage for state in states}
    assert spoken == set(KINDS) | {"start"}
    for state in states:
        branches = solver.branches(state)
        if state.stage == "answer":
            assert branches == ()
            continue
        assert sum(branch.probability for branch in branches) == pytest.approx(1.0, abs=1e-12)
        assert min(branch.probability for branch in branches) > 0
        # Each text once: a state is then a function of the text so far.
        assert len({branch.text for branch in branches}) == len(branches)
        assert state.value >= 0


def test_the_answer_is_the_end() -> None:
    with pytest.raises(KeyError):
        moves(SAMPLE[0], State("answer"))


def split(thinking: str) -> list[str]:
    """The dataset's splitting rule, written down independently."""
    pieces = [piece.strip() for piece in re.split(r"(?<=[.?!])(?=[ \n])|\n\n", thinking)]
    return [piece for piece in pieces if piece]


def test_sentences_survive_the_datasets_splitting() -> None:
    rng = seeded("split")
    separators: Counter[str] = Counter()
    for _ in range(300):
        trace = drawn_trace(problem(rng.randrange(N_TASKS)), rng)
        texts = [sentence.text for sentence in trace.sentences]
        assert split(trace.thinking) == texts
        assert min(map(len, texts)) >= 10
        assert trace.thinking == trace.thinking.strip()
        separators.update(sentence.separator for sentence in trace.sentences[1:])
    assert set(separators) == {" ", "\n\n"}
    assert 0.2 < separators["\n\n"] / separators.total() < 0.6


def test_accuracy_follows_the_verb() -> None:
    expected = {"Compute": 0.745, "Find": 0.60, "Evaluate": 0.48}
    for verb, wanted in expected.items():
        rates = [Policy(some).success(State()) for some in of_verb(verb)]
        assert sum(rates) / len(rates) == pytest.approx(wanted, abs=0.02)
    assert list(RIGHT_PLAN) == list(VERBS)


def test_exact_success_is_the_mean_of_many_draws() -> None:
    rng, n = seeded("success"), 2000
    for some in SAMPLE[:2]:
        exact = Policy(some).success(State())
        drawn = sum(drawn_trace(some, rng).is_correct for _ in range(n)) / n
        assert abs(drawn - exact) < 4 * (exact * (1 - exact) / n) ** 0.5


@pytest.mark.parametrize("length", [2, 4, 6])
def test_resampling_a_prefix_equals_whole_traces_that_begin_with_it(length: int) -> None:
    some = next(candidate for candidate in SAMPLE if candidate.verb == "Find")
    solver, rng = Policy(some), seeded("resampling", length)
    # Whole traces, grouped by what was decided so far, whatever the words.
    groups: dict[tuple[State, ...], list[list[str]]] = {}
    for _ in range(2500):
        drawn = [branch for branch, _ in solver.walk(State(), rng)]
        decided = tuple(branch.after for branch in drawn[:length])
        groups.setdefault(decided, []).append([branch.text for branch in drawn])
    whole = max(groups.values(), key=len)
    assert len(whole) > 150
    prefix = whole[0][:length]
    rests = drawn_rollouts(some, prefix, 2 * len(whole), rng)
    counts = (
        Counter((texts[length], texts[-1]) for texts in whole),
        Counter((rest.first_sentence, last_sentence(rest.text)) for rest in rests),
    )
    common = [key for key in counts[0] if counts[0][key] >= 8 and counts[1][key] >= 8]
    assert len(common) >= 4
    table = [
        [count[key] for key in common] + [count.total() - sum(count[key] for key in common) + 1]
        for count in counts
    ]
    assert chi2_contingency(table).pvalue > 0.01


def last_sentence(text: str) -> str:
    return split(text[: text.index("\n</think>")])[-1]


def test_replay_recovers_the_states_that_were_drawn() -> None:
    solver, rng = Policy(SAMPLE[0]), seeded("replay")
    for _ in range(100):
        drawn = [branch for branch, _ in solver.walk(State(), rng)]
        states = solver.replay([branch.text for branch in drawn])
        assert states == [State(), *(branch.after for branch in drawn)]


def test_replay_names_the_sentence_that_the_policy_cannot_say() -> None:
    first = Policy(SAMPLE[0]).branches(State())[0].text
    with pytest.raises(DataError, match=r"sentence 1 \('That looks right\.'\)"):
        drawn_rollouts(SAMPLE[0], [first, "That looks right."], 1, seeded("x"))


def test_labels_converge_to_the_truth() -> None:
    n = 400
    for some in choose_problems(4, seed=3)[:2]:
        rng = seeded("converge", some.id)
        texts = [sentence.text for sentence in drawn_trace(some, rng).sentences]
        banks = [
            [
                Rollout(rest.answer, rest.is_correct, rest.first_sentence)
                for rest in drawn_rollouts(some, texts[:i], n, rng)
            ]
            for i in range(len(texts))
        ]
        measures = published_measures(texts, banks, trigram_masked_dissimilar)
        true = true_importance(some, texts, trigram_masked_dissimilar)
        assert max(map(abs, true)) > 0.1
        assert true[-1] == 0.0
        for effect, measured in zip(true, measures, strict=True):
            n_dissimilar = max(1.0, n * measured["different_trajectories_fraction"])
            error = (0.25 / n_dissimilar + 0.25 / n) ** 0.5
            assert abs(measured["counterfactual_importance_accuracy"] - effect) < 4 * error


def test_true_importance_of_the_plan_by_hand() -> None:
    some = next(candidate for candidate in SAMPLE if candidate.verb == "Evaluate")
    solver = Policy(some)
    texts = [solver.branches(State())[0].text, KINDS["opening"].forms[0]]
    before = solver.replay(texts)[-1]
    products, in_order = KINDS["plan_products"].forms[0], KINDS["plan_in_order"].forms[0]
    after = {text: solver.replay([*texts, text])[-1] for text in (products, in_order)}
    effect = true_importance(some, [*texts, products], lambda _a, b: b == in_order)
    assert effect[2] == 0.0  # the last sentence has no successor
    whole = [branch.text for branch, _ in solver.walk(after[products], seeded("plan"))]
    effect = true_importance(some, [*texts, products, *whole], lambda _a, b: b == in_order)
    assert effect[2] == pytest.approx(
        solver.success(after[in_order]) - solver.success(after[products])
    )
    assert effect[2] < -0.5
    assert solver.success(before) > solver.success(after[in_order])


def test_dependencies_point_to_the_latest_attempt() -> None:
    kinds = [
        *("setup", "opening", "plan_in_order", "x_sum", "x_from_sum", "y", "z_sum", "z_from_sum"),
        *("check", "wait_order", "x_product", "x_from_product", "y", "z_product"),
        *("z_from_product", "answer"),
    ]
    assert dependencies(kinds) == [
        *((), (), (0,), (0, 2), (0, 3), (0, 4), (0, 2, 5), (0, 6), (7,), (2, 8)),
        *((0, 9), (0, 10), (0, 11), (0, 9), (12, 13), (14,)),
    ]


def test_every_dependency_is_an_earlier_sentence() -> None:
    rng = seeded("depends")
    for _ in range(100):
        trace = drawn_trace(SAMPLE[1], rng)
        for index, sentence in enumerate(trace.sentences):
            assert all(0 <= earlier < index for earlier in sentence.depends_on)
            assert all(a < b for a, b in pairwise(sentence.depends_on))


def test_chosen_problems_are_open_and_a_larger_choice_keeps_the_smaller() -> None:
    few, many = choose_problems(4, seed=1), choose_problems(12, seed=1)
    assert set(few) < set(many)
    assert many == sorted(many)
    assert len(set(many)) == 12
    assert all(0.25 <= Policy(some).success(State()) <= 0.75 for some in many)
    assert choose_problems(4, seed=2) != few


def test_asking_for_more_problems_than_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(truth, "N_TASKS", 3)
    with pytest.raises(PlanError, match="open problems, not 4"):
        choose_problems(4, seed=0)


def test_a_told_trace_is_the_drawn_one() -> None:
    rng = seeded("told")
    for _ in range(20):
        drawn = drawn_trace(SAMPLE[2], rng)
        texts = [sentence.text for sentence in drawn.sentences]
        separators = [sentence.separator for sentence in drawn.sentences]
        assert told_trace(SAMPLE[2], texts, separators) == drawn
        assert drawn.is_correct == (drawn.answer == str(SAMPLE[2].answer))
        assert f"\\boxed{{{drawn.answer}}}" in drawn.ending


def test_a_told_trace_must_be_whole() -> None:
    trace = drawn_trace(SAMPLE[0], seeded("whole"))
    texts = [sentence.text for sentence in trace.sentences][:2]
    with pytest.raises(DataError, match="the trace ends after"):
        told_trace(SAMPLE[0], texts, ["", " "])
    with pytest.raises(DataError, match=r"sentence 1 \('Nothing more\.'\)"):
        told_trace(SAMPLE[0], [texts[0], "Nothing more."], ["", " "])


def test_rests_begin_with_a_blank_after_a_prefix_only() -> None:
    texts = [sentence.text for sentence in drawn_trace(SAMPLE[3], seeded("lead")).sentences]
    for n_kept, lead in ((0, ""), (1, " "), (len(texts) - 1, " ")):
        for rest in drawn_rollouts(SAMPLE[3], texts[:n_kept], 20, seeded("rest", n_kept)):
            assert rest.text.startswith(lead + rest.first_sentence)
            assert split(rest.text[: rest.text.index("\n</think>")])[0] == rest.first_sentence
            assert rest.is_correct == (rest.answer == str(SAMPLE[3].answer))


def test_forced_answers_are_those_of_the_rests() -> None:
    texts = [sentence.text for sentence in drawn_trace(SAMPLE[4], seeded("forced")).sentences]
    rests = drawn_rollouts(SAMPLE[4], texts[:3], 30, seeded("forced", 3))
    answers = drawn_answers(SAMPLE[4], texts[:3], 30, seeded("forced", 3))
    assert [(each.answer, each.is_correct) for each in answers] == [
        (rest.answer, rest.is_correct) for rest in rests
    ]
    assert {each.first_sentence for each in answers} == {""}
    assert all(each.text == f"{each.answer}}}." for each in answers)


def test_a_policy_is_kept_for_its_problem() -> None:
    assert policy(SAMPLE[0]) is policy(SAMPLE[0])
    assert policy(SAMPLE[0]) is not policy(SAMPLE[1])
