"""Texts to traces and continuations: the policy's are read back, and no text is unreadable."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from taprobe_core.demo.policy import (
    boxed,
    drawn_answers,
    drawn_rollouts,
    drawn_trace,
    ending,
    read_answer,
    read_continuation,
    read_trace,
    split_sentences,
)
from taprobe_core.demo.task import N_TASKS, Continuation, Trace, problem, seeded

SOME = problem(4711)
TRACE = drawn_trace(SOME, seeded("reading"))
SOLUTION = TRACE.thinking + TRACE.ending

ANYTHING = st.one_of(
    st.text(max_size=80),
    st.lists(
        st.sampled_from(
            ["\n</think>", "\\boxed{", "7", "}", "}}", ".", "?", "!", " ", "\n\n", "Wait", "{", "x"]
        ),
        max_size=25,
    ).map("".join),
)


def test_traces_are_read_as_they_were_drawn() -> None:
    rng = seeded("round trip")
    for _ in range(60):
        some = problem(rng.randrange(N_TASKS))
        drawn = drawn_trace(some, rng)
        assert read_trace(some, drawn.thinking + drawn.ending) == drawn


def test_continuations_are_read_as_they_were_drawn() -> None:
    texts = [sentence.text for sentence in TRACE.sentences]
    for n_kept in range(len(texts)):
        for drawn in drawn_rollouts(SOME, texts[:n_kept], 5, seeded("rests", n_kept)):
            assert read_continuation(SOME, drawn.text) == drawn
        for drawn in drawn_answers(SOME, texts[:n_kept], 5, seeded("answers", n_kept)):
            assert read_answer(SOME, drawn.text) == drawn


BROKEN = {
    "nothing": "",
    "not closed": TRACE.thinking,
    "no sentence": TRACE.ending,
    "no boxed answer": TRACE.thinking + "\n</think>\n\nDone.",
    "another boxed answer": TRACE.thinking + ending(int(TRACE.answer) + 1),
    "more after the answer": SOLUTION + " Bye.",
    "a foreign sentence": "I guess so. " + SOLUTION,
    "a sentence of another place": "That looks right. " + SOLUTION,
    "half a sentence": TRACE.thinking + " And then" + TRACE.ending,
    "no last mark": TRACE.thinking[:-1] + TRACE.ending,
    "a blank at the end": TRACE.thinking + " " + TRACE.ending,
    "a blank at the start": " " + SOLUTION,
    "a wrong separator": re.sub(r"\. ", ".\n", SOLUTION, count=1),
    "two blanks": re.sub(r"\. ", ".  ", SOLUTION, count=1),
    "a missing sentence": SOLUTION[len(TRACE.sentences[0].text) + 1 :],
    "without its end": "".join(s.separator + s.text for s in TRACE.sentences[:-1]) + TRACE.ending,
}


@pytest.mark.parametrize("solution", BROKEN.values(), ids=list(BROKEN))
def test_what_the_policy_could_not_have_said_is_no_trace(solution: str) -> None:
    assert solution != SOLUTION
    assert read_trace(SOME, solution) is None
    assert read_trace(SOME, SOLUTION) == TRACE


def test_the_same_text_is_no_trace_of_another_problem() -> None:
    assert read_trace(problem(SOME.id + 1), SOLUTION) is None


RIGHT = str(SOME.answer)
RESTS = {
    "a whole one": (f" So it is. Yes.\n</think>\n\n\\boxed{{{RIGHT}}}", "So it is.", RIGHT),
    "an answer in the thinking": (
        f" So \\boxed{{{RIGHT}}} it is.",
        f"So \\boxed{{{RIGHT}}} it is.",
        RIGHT,
    ),
    "a wrong answer": (" No.\n</think>\n\n\\boxed{999}.", "No.", "999"),
    "the first of two answers": (" No.\n</think>\\boxed{1} \\boxed{2}", "No.", "1"),
    "empty boxes before the answer": (
        " No.\n</think>\\boxed{} \\boxed{ } \\boxed{ 8 }",
        "No.",
        "8",
    ),
    "it breaks off": (" So it is. And th", "So it is.", ""),
    "it breaks off in the first sentence": (" And th", "And th", ""),
    "it breaks off in the box": (" No.\n</think>\n\n\\boxed{1", "No.", ""),
    "a mark inside a number": (" It is 3.5 here. No.", "It is 3.5 here.", ""),
    "no thinking": (f"\n</think>\n\n\\boxed{{{RIGHT}}}", "", RIGHT),
    "nothing": ("", "", ""),
}


@pytest.mark.parametrize(("text", "first", "answer"), RESTS.values(), ids=list(RESTS))
def test_rests_of_any_shape(text: str, first: str, answer: str) -> None:
    is_correct = answer == RIGHT
    assert read_continuation(SOME, text) == Continuation(text, first, answer, is_correct)


@pytest.mark.parametrize(
    ("text", "answer"),
    [(f"{RIGHT}}}.", RIGHT), (f" {RIGHT} }} and", RIGHT), ("7}}", "7"), ("12", ""), ("}", "")],
)
def test_forced_answers_end_where_their_box_does(text: str, answer: str) -> None:
    assert read_answer(SOME, text) == Continuation(text, "", answer, answer == RIGHT)


@given(ANYTHING)
def test_no_text_is_unreadable(text: str) -> None:
    found = read_continuation(SOME, text)
    assert found.text == text
    assert found.first_sentence in text
    assert found.answer in text
    assert found.answer == boxed(text) == found.answer.strip()
    assert found.is_correct == (found.answer == RIGHT)
    assert isinstance(read_trace(SOME, text), Trace | None)
    assert read_answer(SOME, text).answer in text


@given(ANYTHING)
def test_splitting_loses_nothing(text: str) -> None:
    texts, separators, left = split_sentences(text)
    assert "".join(a + b for a, b in zip(separators, texts, strict=True)) + left == text
    for sentence in texts:
        assert sentence == sentence.strip()
        assert sentence[-1] in ".?!"
