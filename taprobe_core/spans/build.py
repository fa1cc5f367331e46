"""Problems and sentences to the two tables that the model is run on, and the proof that they hold.

Every problem goes one way: choose the text view, walk the sentences, tokenize once, place the
ranges, cut after the last span. From texts, spans and sentences alone `cover_faults` then proves
that they belong together, one line per fault; it does not use the walk, so a defect in that is
seen. What does not belong here: how each step works (`tokens`).

The invariant: a problem is in `texts` and `spans` with all its sentences, or in `skipped` with its
reason, never in both and never in neither.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import polars as pl

from taprobe_core import tables
from taprobe_core.errors import NotEnoughDataError, SpanError
from taprobe_core.spans.tokens import TextView, bos_id, tokenize_text, view_text, walk_sentences

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


_Sentences = tuple[list[int], list[str]]
"""Indices and texts of one problem's sentences, in order."""

_TEXTS_COLUMNS: dict[str, Any] = {
    "problem_id": pl.Int64,
    "text": pl.String,
    "text_view": pl.Enum(["base", "flattened"]),
    "token_ids": pl.List(pl.Int32),
    "n_tokens": pl.Int64,
    "bos_token_id": pl.Int64,
    "input_sha256": pl.String,
}
_SPANS_COLUMNS: dict[str, Any] = dict.fromkeys(tables.SPANS.columns, pl.Int64)
_SKIPPED_COLUMNS: dict[str, Any] = {
    **dict.fromkeys(tables.SKIPPED.columns, pl.String),
    "problem_id": pl.Int64,
}


@dataclass(frozen=True)
class SpanTables:
    """What the spans stage makes.

    Attributes:
        texts: `tables.TEXTS`, by problem_id.
        spans: `tables.SPANS`, by problem_id and sentence_idx.
        skipped: `tables.SKIPPED`, stage `spans`.
    """

    texts: pl.DataFrame
    spans: pl.DataFrame
    skipped: pl.DataFrame


@dataclass(frozen=True)
class _Skip:
    problem_id: int
    stage: str
    error: str
    what: str
    where: str
    fix: str | None


def make_spans(
    problems: pl.DataFrame,
    sentences: pl.DataFrame,
    tokenizer: PreTrainedTokenizerFast,
    text_view: TextView,
    on_bad_problem: Literal["skip", "fail"],
    max_tokens: int | None = None,
) -> SpanTables:
    """Place every sentence of every problem in the text that the model reads.

    Args:
        problems: `tables.PROBLEMS`.
        sentences: `tables.SENTENCES`; all sentences, the last one included.
        tokenizer: the model's own fast tokenizer.
        text_view: `base` or `flattened`, see `view_text`.
        on_bad_problem: leave a problem out that cannot be placed, or fail on the first.
        max_tokens: the longest text that the model takes, BOS included; None for any. A longer one
            is left out here, so that all later stages are of the same problems.

    Raises:
        SpanError: a problem cannot be placed, or is too long, and `on_bad_problem` is `fail`.
        NotEnoughDataError: no problem can be placed.
        ModelError: the tokenizer gives no offsets.
    """
    bos_id(tokenizer)
    own = _sentences_by_problem(sentences)
    texts: list[dict[str, Any]] = []
    spans: list[dict[str, int]] = []
    skipped: list[_Skip] = []
    for problem in problems.sort("problem_id").iter_rows(named=True):
        problem_id = problem["problem_id"]
        try:
            text, placed = _place_problem(
                problem, own.get(problem_id, ([], [])), tokenizer, text_view
            )
            _check_length(text, max_tokens)
        except SpanError as fault:
            where = f"problem {problem_id}, {fault.where}"
            if on_bad_problem == "fail":
                raise SpanError(fault.what, where, fault.fix) from None
            name = type(fault).__name__
            skipped.append(_Skip(problem_id, "spans", name, fault.what, where, fault.fix))
        else:
            texts.append(text)
            spans.extend(placed)
    if not texts:
        raise _nothing_placed(skipped)
    return _checked(texts, spans, skipped)


def input_sha256(token_ids: Sequence[int], ranges: Sequence[tuple[int, int]]) -> str:
    """Return the hash that identifies token ids and token ranges together.

    sha256 over: the number of tokens, the token ids, the ranges row by row; all as little-endian
    32-bit integers.
    """
    parts = ([len(token_ids)], token_ids, np.ravel(ranges))
    return hashlib.sha256(b"".join(np.asarray(part, "<i4").tobytes() for part in parts)).hexdigest()


def _sentences_by_problem(sentences: pl.DataFrame) -> dict[int, _Sentences]:
    grouped = (
        sentences.lazy()
        .sort("problem_id", "sentence_idx")
        .group_by("problem_id", maintain_order=True)
        .agg("sentence_idx", "sentence")
        .collect()
    )
    return {problem_id: (index, own) for problem_id, index, own in grouped.iter_rows()}


def _place_problem(
    problem: Mapping[str, Any],
    own: _Sentences,
    tokenizer: PreTrainedTokenizerFast,
    text_view: TextView,
) -> tuple[dict[str, Any], list[dict[str, int]]]:
    index, sentences = own
    if not sentences or list(index) != list(range(len(sentences))):
        raise SpanError(
            f"{len(sentences)} sentences whose sentence_idx does not count up from 0 without gaps",
            "table 'sentences'",
            "build the rollouts again",
        )
    part = view_text(problem, sentences, text_view)
    chars = walk_sentences(part.text, sentences, part.start, part.end)
    tokenized = tokenize_text(part.text, tokenizer)
    ranges = tokenized.place(chars)
    # In a causal model no later token can change a span's hidden states.
    token_ids = tokenized.token_ids[: ranges[-1][1]]
    text = {
        "problem_id": problem["problem_id"],
        "text": part.text,
        "text_view": text_view,
        "token_ids": token_ids,
        "n_tokens": len(token_ids),
        "bos_token_id": bos_id(tokenizer),
        "input_sha256": input_sha256(token_ids, ranges),
    }
    spans = [
        {
            "problem_id": problem["problem_id"],
            "sentence_idx": at,
            "start_char": start_char,
            "end_char": end_char,
            "start_token": start_token,
            "end_token": end_token,
            "n_tokens": end_token - start_token,
        }
        for at, (start_char, end_char), (start_token, end_token) in zip(
            index, chars, ranges, strict=True
        )
    ]
    return text, spans


def _check_length(text: Mapping[str, Any], max_tokens: int | None) -> None:
    if max_tokens is not None and text["n_tokens"] > max_tokens:
        raise SpanError(
            f"the text has {text['n_tokens']} tokens, but the model takes {max_tokens}",
            "its text up to the last sentence",
            "take a model with a longer context, or leave the problem out: "
            f"rollouts.exclude_ids: [{text['problem_id']}], or rollouts.on_bad_problem: skip",
        )


def _nothing_placed(skipped: Sequence[_Skip]) -> NotEnoughDataError:
    if not skipped:
        return NotEnoughDataError("there is no problem", "table 'problems'", "build the rollouts")
    first = skipped[0]
    reasons = "; ".join(f"problem {skip.problem_id}: {skip.what}" for skip in skipped[:3])
    more = f"; and {len(skipped) - 3} more" if len(skipped) > 3 else ""
    return NotEnoughDataError(
        f"none of {len(skipped)} problem(s) can be placed in its text ({reasons}{more})",
        first.where,
        first.fix,
    )


def _checked(
    texts: Sequence[Mapping[str, Any]],
    spans: Sequence[Mapping[str, int]],
    skipped: Sequence[_Skip],
) -> SpanTables:
    left_out = [asdict(skip) for skip in skipped]
    return SpanTables(
        tables.check_table(pl.DataFrame(texts, _TEXTS_COLUMNS), tables.TEXTS, "stage spans"),
        tables.check_table(pl.DataFrame(spans, _SPANS_COLUMNS), tables.SPANS, "stage spans"),
        tables.check_table(pl.DataFrame(left_out, _SKIPPED_COLUMNS), tables.SKIPPED, "stage spans"),
    )


def cover_faults(texts: pl.DataFrame, spans: pl.DataFrame, sentences: pl.DataFrame) -> list[str]:
    """Return what is wrong with the spans; an empty list means that they hold.

    Checked for each text: every sentence has one span, in order and without gaps; the characters of
    the span are the sentence, whitespace aside; only whitespace lies between spans; token 0 is the
    only BOS, where there is one; token ranges are sorted, hold a token, lie behind BOS, share at
    most one token with the next, and the text ends with the last; the hash is that of the content.

    Args:
        texts: `tables.TEXTS`.
        spans: `tables.SPANS`.
        sentences: `tables.SENTENCES`; problems without a text are skipped ones and are not checked.
    """
    placed = {
        key[0]: frame for key, frame in spans.partition_by("problem_id", as_dict=True).items()
    }
    own = {
        key[0]: frame for key, frame in sentences.partition_by("problem_id", as_dict=True).items()
    }
    faults = []
    for text in texts.iter_rows(named=True):
        problem_id = text["problem_id"]
        mine = placed.pop(problem_id, spans.clear()).sort("sentence_idx")
        wanted = own.get(problem_id, sentences.clear()).sort("sentence_idx")
        found = _text_faults(text, mine, wanted)
        faults += [f"problem {problem_id}: {fault}" for fault in found]
    faults += [f"problem {problem_id}: has spans but no text" for problem_id in sorted(placed)]
    return faults


def _text_faults(
    text: Mapping[str, Any], spans: pl.DataFrame, sentences: pl.DataFrame
) -> Iterator[str]:
    n_sentences = len(sentences)
    if not n_sentences or spans["sentence_idx"].to_list() != list(range(n_sentences)):
        yield f"{len(spans)} spans do not number {n_sentences} sentences from 0 without gaps"
        return
    chars = list(zip(spans["start_char"], spans["end_char"], strict=True))
    ranges = list(zip(spans["start_token"], spans["end_token"], strict=True))
    yield from _char_faults(text["text"], chars, sentences["sentence"].to_list())
    n_before = 0 if text["bos_token_id"] is None else 1
    yield from _range_faults(ranges, text["n_tokens"], n_before)
    yield from _token_faults(text)
    if (spans["n_tokens"] != spans["end_token"] - spans["start_token"]).any():
        yield "n_tokens of a span is not the length of its token range"
    if input_sha256(text["token_ids"], ranges) != text["input_sha256"]:
        yield "input_sha256 is not the hash of these token ids and spans"


def _char_faults(
    text: str, chars: Sequence[tuple[int, int]], sentences: Sequence[str]
) -> Iterator[str]:
    reached = chars[0][0]
    for index, ((start, end), sentence) in enumerate(zip(chars, sentences, strict=True)):
        if not _is_tight(text[start:end]) or not _same(text[start:end], sentence):
            yield f"sentence {index}: characters [{start}, {end}) are not the sentence"
        if start < reached or text[reached:start].strip():
            yield f"sentence {index}: character {start} does not follow {reached} over whitespace"
        reached = end


def _is_tight(part: str) -> bool:
    return part != "" and part == part.strip()


def _same(one: str, other: str) -> bool:
    return "".join(one.split()) == "".join(other.split())


def _range_faults(ranges: Sequence[tuple[int, int]], n_tokens: int, n_before: int) -> Iterator[str]:
    reached = n_before
    for index, (start, end) in enumerate(ranges):
        if not n_before <= start < end <= n_tokens:
            yield (
                f"sentence {index}: token range [{start}, {end}) is not within "
                f"[{n_before}, {n_tokens})"
            )
        if start < reached - 1 or end < reached:
            yield f"sentence {index}: token range [{start}, {end}) runs back behind {reached}"
        reached = end
    if reached != n_tokens:
        yield f"{n_tokens} tokens, but the last sentence ends at {reached}"


def _token_faults(text: Mapping[str, Any]) -> Iterator[str]:
    token_ids, bos = text["token_ids"], text["bos_token_id"]
    if len(token_ids) != text["n_tokens"]:
        yield f"{len(token_ids)} token ids, n_tokens is {text['n_tokens']}"
    if bos is None:
        return
    if token_ids[0] != bos or token_ids.count(bos) != 1:
        yield f"BOS {bos} stands {token_ids.count(bos)} times, token 0 is {token_ids[0]}"
