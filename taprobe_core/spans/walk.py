"""Sentences to character ranges, by one walk over the text that is blind to whitespace.

The dataset's sentences were cut from the text, stripped, and merged with single spaces, so they
differ from it in whitespace only. One in twelve occurs more than once, which makes any search for a
sentence a guess; a walk never guesses. What does not belong here: tokens.

The invariant: the ranges are in order, disjoint, tight (both ends are not whitespace), and only
whitespace lies outside them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from taprobe_core.errors import SpanError

TextView = Literal["base", "flattened"]

_EXCERPT_CHARS = 24
_FIX = (
    "compare chunks_labeled.json with base_solution.json, fetch both from one dataset revision, or "
    "leave the problem out with rollouts.exclude_ids, or rollouts.on_bad_problem: skip"
)


class TextPart(NamedTuple):
    """A text and the part of it, text[start:end], that its sentences cover."""

    text: str
    start: int
    end: int


def flatten_text(prompt: str, sentences: Sequence[str]) -> str:
    """Return the text that resampling conditioned on: sentences joined by one space.

    Args:
        prompt: the problem's prompt, up to and including the opening think tag and its newline.
        sentences: all sentences of the trace, in order.

    Source:
        The rollout prompt of the Thought Anchors generator: prompt, then the earlier sentences
        joined by one space and stripped.
    """
    return prompt + " ".join(sentences).strip()


def view_text(problem: Mapping[str, Any], sentences: Sequence[str], view: TextView) -> TextPart:
    """Return the text that the model reads and the part that the sentences cover.

    Args:
        problem: one row of `tables.PROBLEMS`.
        sentences: the problem's sentences, in order.
        view: `base` is the trace as the model wrote it, `flattened` as the rollouts continued it.

    Raises:
        SpanError: the thinking range does not lie in the base text, or it begins in the prompt,
            behind which the flattened view would repeat it.
    """
    if view == "flattened":
        prompt = problem["prompt"]
        begun = prompt[problem["thinking_start_char"] :].strip()
        if begun:
            raise SpanError(
                f"the prompt already begins the reasoning ({_excerpt(begun)}), which the flattened "
                "text would repeat",
                f"prompt, character {problem['thinking_start_char']}",
                "set spans.text_view to base, or leave the problem out with rollouts.exclude_ids, "
                "or rollouts.on_bad_problem: skip",
            )
        text = flatten_text(prompt, sentences)
        return TextPart(text, len(prompt), len(text))
    text = problem["base_text"]
    start, end = problem["thinking_start_char"], problem["thinking_end_char"]
    if not 0 <= start <= end <= len(text):
        raise SpanError(
            f"thinking range [{start}, {end}) does not lie in the text of {len(text)} characters",
            "thinking_start_char, thinking_end_char",
            _FIX,
        )
    return TextPart(text, start, end)


def walk_sentences(
    text: str, sentences: Sequence[str], start: int, end: int
) -> list[tuple[int, int]]:
    r"""Return the character range of each sentence in text[start:end].

    Whitespace is what `str.isspace` says; all other characters must be equal, in order, and used
    up. The cost is linear in the text.

    Args:
        text: the whole text.
        sentences: all sentences of text[start:end], in order.
        start: first character of the covered part.
        end: one past its last character.

    Returns:
        One half-open range per sentence, in characters of `text`, first to last character that is
        not whitespace.

    Raises:
        SpanError: a sentence is empty, differs from the text, or text is left over.

    Example:
        >>> walk_sentences("So a.\n\nThen b.", ["So a.", "Then  b."], 0, 14)
        [(0, 5), (7, 14)]
    """
    solid_at = [at for at, char in enumerate(text[start:end], start) if not char.isspace()]
    solid = "".join(text[start:end].split())
    ranges: list[tuple[int, int]] = []
    cursor = 0
    for index, sentence in enumerate(sentences):
        expected = "".join(sentence.split())
        if not expected:
            raise SpanError(f"sentence {index} is empty", f"sentence {index}", _FIX)
        stop = cursor + len(expected)
        if solid[cursor:stop] != expected:
            raise _mismatch(index, expected, solid[cursor:stop], [*solid_at, end][cursor:])
        ranges.append((solid_at[cursor], solid_at[stop - 1] + 1))
        cursor = stop
    if cursor < len(solid):
        raise SpanError(
            f"{len(solid) - cursor} characters are left over after the last of {len(sentences)} "
            f"sentences: {_excerpt(text[solid_at[cursor] : end].rstrip())}",
            f"character {solid_at[cursor]}",
            _FIX,
        )
    return ranges


def _mismatch(index: int, expected: str, found: str, found_at: Sequence[int]) -> SpanError:
    pairs = enumerate(zip(expected, found, strict=False))
    first = next((at for at, (want, have) in pairs if want != have), len(found))
    have = _excerpt(found[first:]) if found[first:] else "the end of the text"
    return SpanError(
        f"sentence {index} differs from the text at its character {first} (whitespace not "
        f"counted): expected {_excerpt(expected[first:])}, found {have}",
        f"sentence {index}, character {found_at[first]}",
        _FIX,
    )


def _excerpt(text: str) -> str:
    # ascii(): look-alike and invisible characters are the usual cause, and must be told apart.
    shown = ascii(text[:_EXCERPT_CHARS])
    return f"{shown}..." if len(text) > _EXCERPT_CHARS else shown
