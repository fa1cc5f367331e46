"""Where the reasoning stands in a trace: found by its sentences, not by the first tag.

Tags are also said: a prompt explains them before it opens the reasoning, a template leaves the
opening one to the model or to nobody, a reasoner quotes one. The sentences are known, though, and
differ from the reasoning in whitespace only, so of all places where it may begin and end, it is the
one that they fill.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import NamedTuple

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"

_OPEN = re.compile(re.escape(THINK_OPEN), re.IGNORECASE)
_CLOSE = re.compile(re.escape(THINK_CLOSE), re.IGNORECASE)


class Thinking(NamedTuple):
    """The reasoning, text[start:end].

    Attributes:
        start: behind the opening tag; where nothing opens it, behind the prompt.
        end: before the closing tag; the end of the text where nothing closes it.
        is_filled: whether the sentences are this part, whitespace aside.
        is_opened: whether a tag stands before it.
    """

    start: int
    end: int
    is_filled: bool
    is_opened: bool


def find_thinking(text: str, n_prompt: int, sentences: Sequence[str]) -> Thinking:
    """Find the reasoning of a trace.

    Places where it may begin, the likelier first: behind a tag with which the completion begins;
    behind the last tag of the prompt, if the prompt does not close it again; behind the other tags
    of the completion; behind the prompt; behind the other tags of the prompt. It ends before a
    closing tag or with the text. Tags may be in capitals. The first place that the sentences fill
    is taken; where they fill none, the first place, to the last closing tag, so that whoever places
    the sentences can say where they differ.

    Args:
        text: prompt and completion.
        n_prompt: characters of the prompt.
        sentences: all sentences of the reasoning, in order.
    """
    starts = list(_starts(text, n_prompt))
    expected = "".join("".join(sentences).split())
    solid, places = _solid(text)
    if expected:
        for start, is_opened in starts:
            first = places[start]
            after = first + len(expected)
            if solid.startswith(expected, first):
                close = _CLOSE.match(solid, after)
                if close or after == len(solid):
                    end = _char_of(places, after) if close else len(text)
                    return Thinking(start, end, is_filled=True, is_opened=is_opened)
    start, is_opened = starts[0]
    closes = [match.start() for match in _CLOSE.finditer(text, start)]
    end = closes[-1] if closes else len(text)
    return Thinking(start, end, is_filled=False, is_opened=is_opened)


def _starts(text: str, n_prompt: int) -> Iterator[tuple[int, bool]]:
    ends = [match.end() for match in _OPEN.finditer(text)]
    in_prompt = [end for end in ends if end <= n_prompt]
    behind = [end for end in ends if end > n_prompt]
    if behind and _OPEN.fullmatch(text[n_prompt : behind[0]].strip()):
        yield behind.pop(0), True
    if in_prompt and not _CLOSE.search(text, in_prompt[-1], n_prompt):
        yield in_prompt.pop(), True
    yield from ((end, True) for end in behind)
    yield n_prompt, False
    yield from ((end, True) for end in reversed(in_prompt))


def _solid(text: str) -> tuple[str, list[int]]:
    """The text without whitespace, and for each of its places the solid characters before it."""
    places = [0]
    solid = []
    for char in text:
        if not char.isspace():
            solid.append(char)
        places.append(len(solid))
    return "".join(solid), places


def _char_of(places: Sequence[int], solid_at: int) -> int:
    """The character of the text that is the solid character `solid_at`."""
    return bisect_right(places, solid_at) - 1
