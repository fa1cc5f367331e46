"""Prove from the tables alone that texts, spans and sentences belong together.

In: the three tables. Out: one line per fault, none when all is well; an asset check shows them.
What does not belong here: making the tables. The walk is not used, so a defect in it is seen.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import polars as pl

from taprobe_core.spans.build import input_sha256


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
