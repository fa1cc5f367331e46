"""From the three JSON files of one problem to rows that keep the tables' contracts.

Lenient in what may be absent: a nickname, tags, a summary, forced measures, any measure at all
(null). Strict in what is present: a value of the wrong type or out of range is a fault, never
repaired and never dropped. All faults of a file come in one error, each with its JSON path, what
was found and what is wanted. Whether the sentences tile the text belongs in `spans`.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from taprobe_core.errors import DataError
from taprobe_core.rollouts.fields import ABSENT, Fields, raise_faults, read_object, shown
from taprobe_core.rollouts.strict_json import load_json

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"

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
    fields = read_object(load_json(path), "$", faults)
    row = {
        "problem": fields.required_text("problem"),
        "gt_answer": fields.text("gt_answer"),
        "subject": fields.text("type"),
        "level": fields.text("level"),
        "nickname": fields.text("nickname"),
    }
    raise_faults(faults, path)
    return row


def _base_solution(path: Path, problem_id: int) -> dict[str, Any]:
    faults: list[str] = []
    fields = read_object(load_json(path), "$", faults)
    failure = fields.row.get("error")
    if failure is not None:
        raise DataError(
            f"the base solution failed upstream: {shown(failure)}",
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
    raise_faults(faults, path)
    return row


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


def _sentences(path: Path, problem_id: int) -> list[dict[str, Any]]:
    faults: list[str] = []
    value = load_json(path)
    if not isinstance(value, list) or not value:
        faults.append(f"$: found {shown(value)}, want a list of at least one sentence")
        value = []
    rows = [
        _sentence(read_object(item, f"$[{index}]", faults), problem_id, index)
        for index, item in enumerate(value)
    ]
    raise_faults(faults, path)
    return rows


def _sentence(fields: Fields, problem_id: int, index: int) -> dict[str, Any]:
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
        "depends_on": fields.indices("depends_on"),
        **{name: fields.number(name, *bounds) for name, bounds in MEASURES.items()},
        "summary": fields.text("summary"),
        "true_importance": fields.number("true_importance", -1.0, 1.0),
    }


def _digest(texts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        data = text.encode()
        # The length keeps ("ab", "c") and ("a", "bc") apart.
        digest.update(len(data).to_bytes(8, "big"))
        digest.update(data)
    return digest.hexdigest()
