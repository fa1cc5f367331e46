"""Place every sentence in the text that the model reads: characters first, then tokens.

In: problems and sentences. Out: one row per text (token ids, BOS first where the tokenizer has one)
and one row per sentence (half-open character and token ranges). What does not belong here: which
sentences exist (`rollouts`) and what is measured on a span (`activations`).

The invariant: the sentences cover their part of the text exactly, whitespace aside, and every token
that holds a character of a sentence is in that sentence's range. `cover_faults` proves it again
from the tables alone.
"""

from taprobe_core.spans.build import SpanTables, cover_faults, input_sha256, make_spans
from taprobe_core.spans.tokens import (
    TextPart,
    TokenizedText,
    bos_id,
    flatten_text,
    token_ranges,
    tokenize_text,
    view_text,
    walk_sentences,
)

__all__ = [
    "SpanTables",
    "TextPart",
    "TokenizedText",
    "bos_id",
    "cover_faults",
    "flatten_text",
    "input_sha256",
    "make_spans",
    "token_ranges",
    "tokenize_text",
    "view_text",
    "walk_sentences",
]
