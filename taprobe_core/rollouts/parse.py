"""From the three JSON files of one problem to rows that keep the tables' contracts.

Lenient in what may be absent: a nickname, tags, a summary, forced measures, any measure at all
(null). Strict in what is present: a value of the wrong type or out of range is a fault, never
repaired and never dropped. All faults of a file come in one error, each with its JSON path, what
was found and what is wanted. Whether the sentences tile the text belongs in `spans`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from taprobe_core.errors import DataError, SchemaError
from taprobe_core.rollouts.strict_json import load_json

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"

MEASURES: Mapping[str, tuple[float, float]] = {
    "accuracy": (0.0, 1.0),
    "resampling_importance_accuracy": (-1.0, 1.0),
    "resampling_importance_kl": (0.0, float("inf")),
    "counterfactual_importance_accuracy": (-1.0, 1.0),
    "counterfactual_importance_kl": (0.0, float("inf")),
    "forced_importance_accuracy": (-1.0, 1.0),
    "forced_importance_kl": (0.0, float("inf")),
    "different_trajectories_fraction": (0.0, 1.0),
    "overdeterminedness": (0.0, 1.0),
}
"""Published measures of a sentence and their ranges; KL in nats, all others shares."""

_LISTED = 20
_INDEX = re.compile(r"[0-9]{1,9}")
_ABSENT = object()


@dataclass(frozen=True)
class ProblemRecord:
    """One problem: a row for `tables.PROBLEMS` and its rows for `tables.SENTENCES`."""

    problem: dict[str, Any]
    sentences: list[dict[str, Any]]


def parse_problem(files: Mapping[str, Path], problem_id: int) -> ProblemRecord:
    """Parse one problem.

    Args:
        files: path of each of `problem.json`, `base_solution.json`, `chunks_labeled.json`.
        problem_id: id from the folder's name; the files do not state one.

    Returns:
        The record. `thinking_*_char` index code points of `base_text`: from behind the first
        `<think>` to the next `</think>`, or to the end where the trace never closes it.

    Raises:
        SchemaError: a file breaks the dataset's layout; lists all faults of that file.
        DataError: a file is not JSON, or the base solution failed upstream.
    """
    statement = _statement(files["problem.json"])
    base = _base_solution(files["base_solution.json"], problem_id)
    sentences = _sentences(files["chunks_labeled.json"], problem_id)
    texts = [row["sentence"] for row in sentences]
    problem = {
        "problem_id": problem_id,
        **statement,
        **base,
        "n_sentences": len(sentences),
        "text_sha256": _digest([base["base_text"], *texts]),
    }
    return ProblemRecord(problem, sentences)


def _statement(path: Path) -> dict[str, Any]:
    faults: list[str] = []
    fields = _object(load_json(path), "$", faults)
    row = {
        "problem": fields.required_text("problem"),
        "gt_answer": fields.text("gt_answer"),
        "subject": fields.text("type"),
        "level": fields.text("level"),
        "nickname": fields.text("nickname"),
    }
    _raise_faults(faults, path)
    return row


def _base_solution(path: Path, problem_id: int) -> dict[str, Any]:
    faults: list[str] = []
    fields = _object(load_json(path), "$", faults)
    failure = fields.row.get("error")
    if failure is not None:
        raise DataError(
            f"the base solution failed upstream: {_shown(failure)}",
            f"{path}, $.error",
            f"leave problem {problem_id} out with rollouts.problem_ids, or take another revision",
        )
    prompt = fields.required_text("prompt")
    base_text = _base_text(fields, prompt)
    start = base_text.find(THINK_OPEN) + len(THINK_OPEN)
    end = base_text.find(THINK_CLOSE, start)
    end = len(base_text) if end < 0 else end
    if not faults:
        if THINK_OPEN not in base_text:
            faults.append(f"$.prompt: found no {THINK_OPEN}, want it before the reasoning")
        elif not base_text[start:end].strip():
            faults.append(f"$.solution: found no text behind {THINK_OPEN}, want the reasoning")
    row = {
        "prompt": prompt,
        "base_text": base_text,
        "thinking_start_char": start,
        "thinking_end_char": end,
        "answer": fields.text("answer"),
        "is_correct": fields.flag("is_correct"),
    }
    _raise_faults(faults, path)
    return row


def _base_text(fields: _Fields, prompt: str) -> str:
    solution, full = fields.text("solution"), fields.text("full_cot")
    if solution is None and full is None:
        fields.fault("solution", _ABSENT, "a text (or full_cot)")
    if full is None:
        return prompt + (solution or "")
    want = prompt + (solution or "")
    got = full if solution is not None else full[: len(prompt)]
    if got != want:
        pairs = enumerate(zip(got, want, strict=False))
        differs = next((i for i, (a, b) in pairs if a != b), min(len(got), len(want)))
        fields.fault("full_cot", f"...{full[differs:]}", f"prompt + solution (char {differs})")
    return full


def _sentences(path: Path, problem_id: int) -> list[dict[str, Any]]:
    faults: list[str] = []
    value = load_json(path)
    if not isinstance(value, list) or not value:
        faults.append(f"$: found {_shown(value)}, want a list of at least one sentence")
        value = []
    rows = [
        _sentence(_object(item, f"$[{index}]", faults), problem_id, index)
        for index, item in enumerate(value)
    ]
    _raise_faults(faults, path)
    return rows


def _sentence(fields: _Fields, problem_id: int, index: int) -> dict[str, Any]:
    text = fields.required_text("chunk")
    stated = fields.row.get("chunk_idx", _ABSENT)
    if isinstance(stated, bool) or stated != index:
        fields.fault("chunk_idx", stated, f"{index}, the row's place")
    tags = fields.texts("function_tags")
    return {
        "problem_id": problem_id,
        "sentence_idx": index,
        "sentence": text,
        "function_tag": tags[0] if tags else "unknown",
        "depends_on": fields.indices("depends_on"),
        **{name: fields.number(name, *bounds) for name, bounds in MEASURES.items()},
        "summary": fields.text("summary"),
    }


class _Fields:
    """Typed access to one JSON object; a null counts as absent, a fault is noted, not raised."""

    def __init__(self, row: Mapping[str, Any], at: str, faults: list[str]) -> None:
        self.row = row
        self.at = at
        self.faults = faults

    def fault(self, key: str, found: Any, want: str) -> None:
        self.faults.append(f"{self.at}.{key}: found {_shown(found)}, want {want}")

    def text(self, key: str) -> str | None:
        value = self.row.get(key)
        if value is None:
            return None
        if not isinstance(value, str):
            self.fault(key, value, "a text or null")
            return None
        return value if self._is_unicode(key, value) else None

    def required_text(self, key: str) -> str:
        value = self.row.get(key, _ABSENT)
        if not isinstance(value, str) or not value.strip():
            self.fault(key, value, "a text that is not blank")
            return ""
        return value if self._is_unicode(key, value) else ""

    def texts(self, key: str) -> list[str]:
        value = self.row.get(key)
        if value is None:
            return []
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            self.fault(key, value, "a list of texts or null")
            return []
        return [item for item in value if self._is_unicode(key, item)]

    def flag(self, key: str) -> bool | None:
        value = self.row.get(key)
        if value is not None and not isinstance(value, bool):
            self.fault(key, value, "true, false or null")
            return None
        return value

    def number(self, key: str, low: float, high: float) -> float | None:
        value = self.row.get(key)
        if value is None:
            return None
        # A bool is an int to Python.
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not low <= value <= high
        ):
            bounds = f"in [{low:g}, {high:g}]" if high < float("inf") else f"of at least {low:g}"
            self.fault(key, value, f"a number {bounds} or null")
            return None
        return float(value)

    def indices(self, key: str) -> list[int]:
        value = self.row.get(key)
        if value is None:
            return []
        items = value if isinstance(value, list) else [value]
        is_sound = isinstance(value, list) and all(
            not isinstance(item, bool)
            and isinstance(item, str | int)
            and _INDEX.fullmatch(str(item))
            for item in items
        )
        if not is_sound:
            self.fault(key, value, "a list of sentence indices or null")
            return []
        return [int(item) for item in items]

    def _is_unicode(self, key: str, value: str) -> bool:
        try:
            value.encode()
        except UnicodeEncodeError as error:
            self.fault(key, value, f"whole characters (half of a pair at char {error.start})")
            return False
        return True


def _object(value: Any, at: str, faults: list[str]) -> _Fields:
    if isinstance(value, dict):
        return _Fields(value, at, faults)
    faults.append(f"{at}: found {_shown(value)}, want an object")
    # The absent fields of what is no object are not faults of their own.
    return _Fields({}, at, [])


def _shown(value: Any) -> str:
    if value is _ABSENT:
        return "nothing"
    if value is None:
        return "null"
    if isinstance(value, dict):
        return "an object"
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _raise_faults(faults: Sequence[str], path: Path) -> None:
    if not faults:
        return
    more = len(faults) - _LISTED
    listed = [*faults[:_LISTED], *([f"... and {more} more"] if more > 0 else [])]
    raise SchemaError(
        f"{len(faults)} field(s) break the dataset's layout",
        str(path),
        "correct the file or fetch it again, or leave its problem out with rollouts.problem_ids",
        listed,
    )


def _digest(texts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        data = text.encode()
        # The length keeps ("ab", "c") and ("a", "bc") apart.
        digest.update(len(data).to_bytes(8, "big"))
        digest.update(data)
    return digest.hexdigest()
