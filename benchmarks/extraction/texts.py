"""Seeded texts: random token ids with sentence spans of about twenty tokens.

Lengths are drawn log-uniformly between the shape's bounds. Token 0 is the begin-of-sequence token;
a prompt without spans comes first, as in the traces that the project works on.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.extraction.shapes import Shape
from taprobe_core.activations.tasks import TextTask

N_PROMPT = 40
SENTENCE = (8, 32)


@dataclass(frozen=True)
class Text:
    """One text.

    Attributes:
        problem_id: its number.
        token_ids: ids, begin-of-sequence first.
        spans: half-open token range of each sentence, gapless from the prompt's end.
    """

    problem_id: int
    token_ids: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]

    def __len__(self) -> int:
        """Tokens."""
        return len(self.token_ids)

    def task(
        self,
        layers: Sequence[int],
        attention_layers: Sequence[int] = (),
        spans: Sequence[tuple[int, int]] | None = None,
    ) -> TextTask:
        """Return the text as work for the engine; `spans` stand in for its own."""
        return TextTask(
            problem_id=self.problem_id,
            token_ids=self.token_ids,
            spans=self.spans if spans is None else spans,
            layers=tuple(layers),
            attention_layers=tuple(attention_layers),
        )


def make_texts(shape: Shape, seed: int, n_texts: int | None = None) -> list[Text]:
    """Return texts of log-uniform lengths; the first n do not depend on how many are asked for."""
    rng = random.Random(seed)  # noqa: S311
    low, high = math.log(shape.shortest), math.log(shape.longest)
    return [
        make_text(shape, seed, round(math.exp(rng.uniform(low, high))), number)
        for number in range(shape.n_texts if n_texts is None else n_texts)
    ]


def make_text(shape: Shape, seed: int, n_tokens: int, number: int = 0) -> Text:
    """Return one text of a given length."""
    rng = random.Random(f"{seed} {number}")  # noqa: S311
    ids = (0, *(rng.randrange(2, shape.n_vocab) for _ in range(n_tokens - 1)))
    starts, at = [], min(N_PROMPT, n_tokens // 2)
    while at < n_tokens:
        starts.append(at)
        at += rng.randint(*SENTENCE)
    ends = [*starts[1:], n_tokens]
    return Text(number, ids, tuple(zip(starts, ends, strict=True)))
