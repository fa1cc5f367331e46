"""The text that a trained reasoner wrote -> a trace, or a continuation.

A reasoner may write anything. A rest that breaks off has no answer, like a rollout of the dataset
that ran out of tokens; a base trace is taken only if the policy could have said it, because only
then is the truth about it known. What does not belong here: producing text (`sampling`).
"""

from __future__ import annotations

import re

from taprobe_core.demo.policy import told_trace
from taprobe_core.demo.task import Problem
from taprobe_core.demo.trace import Continuation, Trace
from taprobe_core.errors import DataError

THINK_END = "\n</think>"

_SENTENCE = re.compile(r"(\s*)(\S.*?[.?!])(?=\s|\Z)", re.DOTALL)
_BOXED = re.compile(r"\\boxed\{\s*([^{}\s][^{}]*)\}")


def split_sentences(thinking: str) -> tuple[list[str], list[str], str]:
    """Split after each closing mark that whitespace or the end follows.

    Returns:
        The sentences, what stands before each of them, and what is left after the last mark.
    """
    texts, separators, end = [], [], 0
    for match in _SENTENCE.finditer(thinking):
        separators.append(match[1])
        texts.append(match[2])
        end = match.end()
    return texts, separators, thinking[end:]


def boxed(text: str) -> str:
    """Return the first boxed text that is not empty, or an empty text."""
    match = _BOXED.search(text)
    return match[1].strip() if match else ""


def read_trace(problem: Problem, solution: str) -> Trace | None:
    """Read a whole solution; None if the policy could not have written it.

    Args:
        problem: the problem.
        solution: everything after the prompt.
    """
    thinking, tag, rest = solution.partition(THINK_END)
    texts, separators, left = split_sentences(thinking)
    if not tag or left or not texts or separators[0] or set(separators[1:]) - {" ", "\n\n"}:
        return None
    try:
        trace = told_trace(problem, texts, separators)
    except DataError:
        return None
    return trace if trace.ending == tag + rest else None


def read_continuation(problem: Problem, text: str) -> Continuation:
    """Read a resampled rest.

    Args:
        problem: the problem.
        text: everything after the prefix.
    """
    thinking, _, _ = text.partition(THINK_END)
    match = _SENTENCE.match(thinking)
    first = match[2] if match else thinking.strip()
    answer = boxed(text)
    return Continuation(text, first, answer, answer == str(problem.answer))


def read_answer(problem: Problem, text: str) -> Continuation:
    """Read an answer that was forced: what follows an opened box.

    Args:
        problem: the problem.
        text: everything after the opening brace.
    """
    answer = text.partition("}")[0].strip() if "}" in text else ""
    return Continuation(text, "", answer, answer == str(problem.answer))
