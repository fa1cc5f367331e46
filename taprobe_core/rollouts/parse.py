"""From the three JSON files of one problem to rows that keep the tables' contracts.

Lenient in what may be absent: a nickname, tags, a summary, forced measures, any measure at all
(null). Strict in what is read: a value of the wrong type or out of range is a fault, never repaired
and never dropped; all faults of a file come in one error, each with its JSON path, what was found
and what is wanted. What no stage reads is worth no problem: where it is not usable it is null in
the table, and a note says so. Keys that are not of the layout are not looked at.

Where the reasoning stands in a trace is found by its sentences, not by the first tag. Tags are also
said: a prompt explains them before it opens the reasoning, a template leaves the opening one to the
model or to nobody, a reasoner quotes one. The sentences are known, though, and differ from the
reasoning in whitespace only, so of all places where it may begin and end, it is the one that they
fill. Whether they tile the text exactly belongs in `spans`.
"""

from __future__ import annotations

import hashlib
import re
import sys
from bisect import bisect_right
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from taprobe_core.errors import DataError
from taprobe_core.rollouts.fields import ABSENT, Fields, load_json, raise_faults, read_object, shown
from taprobe_core.rollouts.solutions import states_failure

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


MEASURES: Mapping[str, tuple[float, float]] = {
    "accuracy": (0.0, 1.0),
    "resampling_importance_accuracy": (-1.0, 1.0),
    "resampling_importance_kl": (0.0, sys.float_info.max),
    "counterfactual_importance_accuracy": (-1.0, 1.0),
    "counterfactual_importance_kl": (0.0, sys.float_info.max),
    "forced_importance_accuracy": (-1.0, 1.0),
    "forced_importance_kl": (0.0, sys.float_info.max),
    "different_trajectories_fraction": (0.0, 1.0),
    "overdeterminedness": (0.0, 1.0),
}
"""Published measures of a sentence and their ranges; KL in nats, all others shares."""

SHARES = (
    "accuracy",
    "different_trajectories_fraction",
    "overdeterminedness",
    "counterfactual_importance_accuracy",
)
"""Measures that labels of every kind read, because the counts of rollouts follow from them."""


@dataclass(frozen=True)
class ProblemRecord:
    """One problem.

    Attributes:
        problem: a row for `tables.PROBLEMS`.
        sentences: its rows for `tables.SENTENCES`.
        notes: values that no stage reads and that are null in the rows because they are not
            usable; each as `file: path: found X, want Y`.
    """

    problem: dict[str, Any]
    sentences: list[dict[str, Any]]
    notes: list[str] = field(default_factory=list)


def parse_problem(
    files: Mapping[str, Path], problem_id: int, label_field: str = SHARES[-1]
) -> ProblemRecord:
    """Parse one problem.

    Args:
        files: path of each of `problem.json`, `base_solution.json`, `chunks_labeled.json`.
        problem_id: id from the folder's name; the files do not state one.
        label_field: the measure that becomes the label; it and `SHARES` are read, others are not.

    Returns:
        The record. `thinking_*_char` index code points of `base_text`; see `find_thinking`.

    Raises:
        SchemaError: a file breaks the dataset's layout; lists all faults of that file.
        DataError: a file is not JSON, or the base solution failed upstream.
    """
    notes: list[str] = []
    statement = _statement(files["problem.json"], notes)
    base = _base_solution(files["base_solution.json"], problem_id, notes)
    read = {*SHARES, label_field, "true_importance"}
    sentences = _sentences(files["chunks_labeled.json"], problem_id, read, notes)
    texts = [row["sentence"] for row in sentences]
    base |= _thinking(files["base_solution.json"], base, texts)
    problem = {
        "problem_id": problem_id,
        **statement,
        **{name: base[name] for name in _BASE},
        "n_sentences": len(sentences),
        "text_sha256": _digest([base["base_text"], *texts]),
    }
    return ProblemRecord(problem, sentences, notes)


_BASE = (
    "prompt",
    "base_text",
    "thinking_start_char",
    "thinking_end_char",
    "answer",
    "is_correct",
)


def _statement(path: Path, notes: list[str]) -> dict[str, Any]:
    faults: list[str] = []
    unread: list[str] = []
    fields = read_object(load_json(path), "$", faults)
    spare = Fields(fields.row, "$", unread)
    row = {
        "problem": fields.required_text("problem"),
        "gt_answer": spare.text("gt_answer"),
        "subject": spare.text("type"),
        "level": spare.text("level"),
        "nickname": spare.text("nickname"),
    }
    raise_faults(faults, path)
    notes += _noted(path, unread)
    return row


def _base_solution(path: Path, problem_id: int, notes: list[str]) -> dict[str, Any]:
    faults: list[str] = []
    unread: list[str] = []
    fields = read_object(load_json(path), "$", faults)
    spare = Fields(fields.row, "$", unread)
    if states_failure(fields.row):
        raise DataError(
            f"the base solution failed upstream: {shown(fields.row['error'])}",
            f"{path}, $.error",
            f"leave the problem out: rollouts.exclude_ids: [{problem_id}], or take another "
            "revision",
        )
    prompt = fields.required_text("prompt")
    row = {
        "prompt": prompt,
        "base_text": _base_text(fields, prompt),
        "answer": spare.text("answer"),
        "is_correct": spare.flag("is_correct"),
    }
    raise_faults(faults, path)
    notes += _noted(path, unread)
    return row


def _thinking(path: Path, base: Mapping[str, Any], sentences: Sequence[str]) -> dict[str, int]:
    text, n_prompt = base["base_text"], len(base["prompt"])
    thinking = find_thinking(text, n_prompt, sentences)
    faults = []
    if not thinking.is_filled and not thinking.is_opened:
        faults.append(
            f"$.prompt: found no {THINK_OPEN} that opens the reasoning, want it at the end of the "
            "prompt or in the solution"
        )
    elif not text[thinking.start : thinking.end].strip():
        faults.append(f"$.solution: found no text behind {THINK_OPEN}, want the reasoning")
    raise_faults(faults, path)
    return {"thinking_start_char": thinking.start, "thinking_end_char": thinking.end}


def _noted(path: Path, unread: Iterable[str]) -> list[str]:
    return [f"{path.name}: {fault}" for fault in unread]


def _base_text(fields: Fields, prompt: str) -> str:
    solution, full = fields.text("solution"), fields.text("full_cot")
    if fields.row.get("solution") is None and fields.row.get("full_cot") is None:
        fields.fault("solution", ABSENT, "a text (or full_cot)")
    if full is None:
        return prompt + (solution or "")
    want = prompt + (solution or "")
    got = full if solution is not None else full[: len(prompt)]
    if got != want:
        pairs = enumerate(zip(got, want, strict=False))
        differs = next((i for i, (a, b) in pairs if a != b), min(len(got), len(want)))
        fields.fault("full_cot", f"...{full[differs:]}", f"prompt + solution (char {differs})")
    return full


def _sentences(
    path: Path, problem_id: int, read: Collection[str], notes: list[str]
) -> list[dict[str, Any]]:
    faults: list[str] = []
    unread: list[str] = []
    value = load_json(path)
    if not isinstance(value, list) or not value:
        faults.append(f"$: found {shown(value)}, want a list of at least one sentence")
        value = []
    rows = [
        _sentence(read_object(item, f"$[{index}]", faults), problem_id, index, read, unread)
        for index, item in enumerate(value)
    ]
    raise_faults(faults, path)
    notes += _noted(path, unread)
    return rows


def _sentence(
    fields: Fields, problem_id: int, index: int, read: Collection[str], unread: list[str]
) -> dict[str, Any]:
    spare = Fields(fields.row, fields.at, unread)

    def measure(name: str, low: float, high: float) -> float | None:
        return (fields if name in read else spare).number(name, low, high)

    text = fields.required_text("chunk")
    stated = fields.row.get("chunk_idx", ABSENT)
    if isinstance(stated, bool) or stated != index:
        fields.fault("chunk_idx", stated, f"{index}, the row's place")
    tags = fields.texts("function_tags")
    return {
        "problem_id": problem_id,
        "sentence_idx": index,
        "sentence": text,
        "function_tag": tags[0] if tags else "unknown",
        "depends_on": spare.indices("depends_on"),
        **{name: measure(name, *bounds) for name, bounds in MEASURES.items()},
        "summary": spare.text("summary"),
        "true_importance": measure("true_importance", -1.0, 1.0),
    }


def _digest(texts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        data = text.encode()
        # The length keeps ("ab", "c") and ("a", "bc") apart.
        digest.update(len(data).to_bytes(8, "big"))
        digest.update(data)
    return digest.hexdigest()
