"""A trained reasoner -> the texts that a build needs: base traces, and rests of their prefixes.

Each draw has a stream of its own, named by seed, reasoner, setting, problem, sentence and purpose,
so that any of them can be made again alone. What does not belong here: which to make (`build`), and
how a text is sampled (`sampling`). Invariant: a text depends on weights, seed and place alone; more
texts begin with the same ones.
"""

from __future__ import annotations

from collections.abc import Sequence

from taprobe_core.demo.reading import read_trace
from taprobe_core.demo.sampling import MAX_NEW_TOKENS, Reasoner, uniforms
from taprobe_core.demo.settings import SETTINGS
from taprobe_core.demo.task import Problem
from taprobe_core.demo.trace import FORCED_ANSWER, Trace
from taprobe_core.errors import NotEnoughDataError

MAX_ANSWER_TOKENS = 16
"""Tokens of a forced answer, at most."""


def base_traces(
    reasoner: Reasoner, seed: int, name: str, problems: Sequence[Problem], n_candidates: int
) -> dict[str, list[Trace]]:
    """Sample base traces: per setting, each problem's first one of its grade.

    Args:
        reasoner: who reasons.
        seed: of the recipe.
        name: of the reasoner, a part of the streams' names.
        problems: the problems.
        n_candidates: whole solutions per problem in search of the two.

    Raises:
        NotEnoughDataError: no candidate of a grade that the policy could have said.
    """
    streams = [
        uniforms(n_candidates, MAX_NEW_TOKENS, seed, name, some.id, "base") for some in problems
    ]
    candidates = reasoner.complete([some.prompt for some in problems], streams)
    found: dict[str, list[Trace]] = {setting: [] for setting in SETTINGS}
    for some, texts in zip(problems, candidates, strict=True):
        traces = [trace for text in texts if (trace := read_trace(some, text))]
        for setting, grade in SETTINGS.items():
            first = next((trace for trace in traces if trace.is_correct == grade), None)
            if first is None:
                raise NotEnoughDataError(
                    f"no {'right' if grade else 'wrong'} base trace in {len(texts)} candidates",
                    f"{name}, problem {some.id}",
                    "raise n_candidates, or train the reasoner longer",
                )
            found[setting].append(first)
    return found


class Resampler:
    """Samples what follows the prefixes of base traces.

    Args:
        reasoner: who reasons.
        seed: of the recipe.
        place: reasoner and setting, parts of the streams' names.
    """

    def __init__(self, reasoner: Reasoner, seed: int, *place: str) -> None:
        self.reasoner = reasoner
        self.name: tuple[str | int, ...] = (seed, *place)

    def rests(
        self, at: Sequence[tuple[Problem, Trace, int]], n: int, purpose: str
    ) -> list[list[str]]:
        """Sample `n` rests per (problem, base trace, removed sentence).

        Args:
            at: where.
            n: how many.
            purpose: "rollouts", "truth" or "forced", a part of the streams' names.
        """
        is_forced = purpose == "forced"
        length = MAX_ANSWER_TOKENS if is_forced else MAX_NEW_TOKENS
        prompts = []
        for some, trace, index in at:
            prefix = " ".join(sentence.text for sentence in trace.sentences[:index])
            prompts.append(some.prompt + prefix + (FORCED_ANSWER if is_forced else ""))
        streams = [
            uniforms(n, length, *self.name, some.id, index, purpose) for some, _, index in at
        ]
        return self.reasoner.complete(prompts, streams, stop="}" if is_forced else None)
