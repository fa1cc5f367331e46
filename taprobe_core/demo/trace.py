"""What a reasoner gives: traces, and continuations of their prefixes.

Who reasons, the stochastic policy or a trained model, belongs elsewhere; so do files. Invariant: a
text is its sentences with their separators, so that joining them by one blank is another view of
the same sentences.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from taprobe_core.demo.task import Problem


@dataclass(frozen=True, slots=True)
class Sentence:
    """One sentence of a trace.

    Attributes:
        text: the sentence, 10 characters or more, one closing mark at its end.
        separator: what stands before it in the text: "", " " or a blank line.
        function_tag: the dataset's tag for what the sentence does.
        depends_on: indices of earlier sentences whose content it uses, ascending.
        summary: two to four words.
    """

    text: str
    separator: str
    function_tag: str
    depends_on: tuple[int, ...]
    summary: str


@dataclass(frozen=True, slots=True)
class Trace:
    """One whole solution.

    Attributes:
        sentences: the thinking.
        ending: what follows it: closing think tag and boxed answer.
        answer: the boxed answer; empty if there is none.
        is_correct: its grade.
    """

    sentences: tuple[Sentence, ...]
    ending: str
    answer: str
    is_correct: bool

    @property
    def thinking(self) -> str:
        """The sentences with their separators."""
        return "".join(sentence.separator + sentence.text for sentence in self.sentences)


@dataclass(frozen=True, slots=True)
class Continuation:
    """One resampled rest of a trace.

    Attributes:
        text: everything after the prefix, ending included.
        first_sentence: the sentence that stands where the removed one stood.
        answer: the boxed answer; empty if there is none.
        is_correct: its grade.
    """

    text: str
    first_sentence: str
    answer: str
    is_correct: bool


@dataclass(frozen=True, slots=True)
class Reasoned:
    """What one reasoner has to say about one problem.

    Attributes:
        problem: the problem.
        trace: the base trace.
        rollouts: per sentence, the rests that were resampled with this sentence removed.
        forced: per sentence, the answers that were forced before this sentence.
    """

    problem: Problem
    trace: Trace
    rollouts: list[list[Continuation]]
    forced: list[list[Continuation]]

    @property
    def texts(self) -> list[str]:
        """The sentences of the base trace."""
        return [sentence.text for sentence in self.trace.sentences]


FORCED_ANSWER = "\n</think>\n\nTherefore, the final answers is \\boxed{"
"""What forces an answer, in the dataset's own words."""


def seeded(*parts: str | int) -> random.Random:
    """Return a generator that depends on `parts` alone, not on the process or its hash seed."""
    # Reproducible draws are the point here; nothing is kept secret.
    return random.Random("/".join(map(str, parts)))  # noqa: S311
