"""Text to token ids with exactly one BOS, or none; sentences to character and token ranges.

Characters come first, by one walk over the text that is blind to whitespace. The dataset's
sentences were cut from the text, stripped, and merged with single spaces, so they differ from it in
whitespace only. One in twelve occurs more than once, which makes any search for a sentence a guess;
a walk never guesses. Then the whole text is tokenized once, so that a token at a sentence's border
is the one the model would see.

The invariant of characters: the ranges are in order, disjoint, tight (both ends are not
whitespace), and only whitespace lies outside them. Of tokens: token 0 is BOS and no other token is,
where the tokenizer has a BOS token, and where it has none the tokens are those of the text; a
sentence's range holds every token that holds one of its characters. Offsets of byte-level
tokenizers may include a leading space, repeat (one character in several tokens), or leave
characters out (a normaliser composed them); all three keep the invariant.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from taprobe_core.errors import ModelError, SpanError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


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


Ranges = list[tuple[int, int]]


@dataclass(frozen=True)
class TokenizedText:
    """Token ids of one text, and the characters of each token.

    Attributes:
        token_ids: [token]; BOS at 0 where the tokenizer has one.
        offsets: half-open character ranges of the tokens after BOS, or of all where there is none.
    """

    token_ids: list[int]
    offsets: Ranges

    def place(self, chars: Ranges) -> Ranges:
        """Return the half-open range in `token_ids` of each character range."""
        n_before = len(self.token_ids) - len(self.offsets)
        return [
            (start + n_before, end + n_before) for start, end in token_ranges(self.offsets, chars)
        ]


def bos_id(tokenizer: PreTrainedTokenizerFast) -> int | None:
    """Return the tokenizer's BOS id; None where it has none.

    Raises:
        ModelError: the tokenizer gives no offsets.
    """
    if not tokenizer.is_fast:
        raise ModelError(
            "the tokenizer gives no character offsets", _name(tokenizer), "add a tokenizer.json"
        )
    bos = tokenizer.bos_token_id
    return None if bos is None else int(bos)


def tokenize_text(text: str, tokenizer: PreTrainedTokenizerFast) -> TokenizedText:
    """Tokenize the whole text once and put exactly one BOS before it, where the tokenizer has one.

    A text that begins with BOS keeps its own.

    Args:
        text: what the model reads.
        tokenizer: a fast tokenizer.

    Raises:
        SpanError: BOS occurs inside the text, or the tokenizer fails on it.
        ModelError: the tokenizer gives no offsets.
    """
    bos = bos_id(tokenizer)
    token_ids, offsets = _encoded(text, tokenizer)
    if bos is None:
        return TokenizedText(token_ids, offsets)
    if token_ids and token_ids[0] == bos:
        token_ids, offsets = token_ids[1:], offsets[1:]
    if bos in token_ids:
        at = token_ids.index(bos)
        raise SpanError(
            f"the text holds the BOS token {tokenizer.bos_token!r} again at token {at + 1}",
            f"character {offsets[at][0]}",
            "leave the problem out with rollouts.problem_ids",
        )
    return TokenizedText([bos, *token_ids], offsets)


def _encoded(text: str, tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], Ranges]:
    try:
        # verbose=False: the tokenizer's own length warning names a limit that is not the model's.
        encoded = tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
    except BaseException as error:
        # A panic of the library beneath is no Exception: it is raised past every handler of those.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = (str(error).strip().splitlines() or [""])[0]
        raise SpanError(
            f"{_name(tokenizer)} fails on the text of {len(text)} characters that begins with "
            f"{text[:_EXCERPT_CHARS]!r} ({type(error).__name__}: {reason})",
            "its whole text",
            "use the model's own tokenizer.json, or leave the problem out with "
            "rollouts.problem_ids",
        ) from error
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    return list(ids), [(start, end) for start, end in offsets]


def _name(tokenizer: PreTrainedTokenizerFast) -> str:
    file = tokenizer.init_kwargs.get("tokenizer_file")
    return f"tokenizer {file or tokenizer.name_or_path or type(tokenizer).__name__!r}"


def token_ranges(
    offsets: Sequence[tuple[int, int]], chars: Sequence[tuple[int, int]]
) -> list[tuple[int, int]]:
    """Return the half-open token range of each character range.

    The first token is the first that ends after the range starts; the end is the first token, not
    before it, that starts where the range ends or later. So a token that straddles a border belongs
    to both neighbours, and every range holds a token. Characters that no token claims belong to the
    token before them. O(n log n), no scan per sentence.

    Args:
        offsets: half-open character range of each token, in text order, [token].
        chars: half-open character ranges, each not empty, [span].

    Raises:
        SpanError: there is no token at all, or a range is empty.

    Example:
        >>> token_ranges([(0, 2), (2, 6), (6, 7)], [(0, 2), (3, 7)])
        [(0, 1), (1, 3)]
    """
    if not chars:
        return []
    where = np.asarray(chars, dtype=np.int64).reshape(-1, 2)
    if not len(offsets) or (where[:, 0] >= where[:, 1]).any():
        empty = int(np.argmax(where[:, 0] >= where[:, 1]))
        what = f"sentence {empty} has no characters" if len(offsets) else "the text has no tokens"
        raise SpanError(
            what,
            f"sentence {empty}",
            "leave its problem out: rollouts.exclude_ids, or rollouts.on_bad_problem: skip",
        )
    # Running bounds make both columns sorted, as the binary search needs. They change nothing
    # unless a normaliser's offsets step back, and then widen a range, never narrow it.
    bounds = np.asarray(offsets, dtype=np.int64)
    starts = np.minimum.accumulate(bounds[::-1, 0])[::-1]
    ends = np.maximum.accumulate(bounds[:, 1])
    ends = np.maximum(ends, np.append(starts[1:], where[:, 1].max()))
    first = np.searchsorted(ends, where[:, 0], side="right")
    stop = np.maximum(np.searchsorted(starts, where[:, 1], side="left"), first + 1)
    return list(zip(first.tolist(), stop.tolist(), strict=True))
