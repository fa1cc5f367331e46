"""Text to token ids with exactly one BOS, or none, and character ranges to token ranges.

The whole text is tokenized once, so that a token at a sentence's border is the one the model would
see. What does not belong here: where sentences lie (the walk).

The invariant: token 0 is BOS and no other token is, where the tokenizer has a BOS token, and where
it has none the tokens are those of the text; a sentence's range holds every token that holds
one of its characters. Offsets of byte-level tokenizers may include a leading space, repeat (one
character in several tokens), or leave characters out (a normaliser composed them); all three keep
the invariant.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from taprobe_core.errors import ModelError, SpanError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Ranges = list[tuple[int, int]]

_EXCERPT_CHARS = 24


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
