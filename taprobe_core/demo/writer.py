"""What reasoners gave -> files in the dataset's own layout.

    <model>/<sampling>/<setting>/problem_<id>/
        problem.json  base_solution.json  chunks.json  chunks_labeled.json
        chunk_<i>/solutions.json
    <model>/<sampling>/<setting>_forced_answer/problem_<id>/chunk_<i>/solutions.json

The same loader reads these files and the published ones. Labels are computed by `importance` from
the rollouts written beside them, so they can be recomputed from the files to the last bit. One key
is the demo's own: `true_importance`, which published labels cannot have. One is left out:
`full_cot` of rollouts, which is prompt + prefix_without_chunk + rollout and would double the size.

What does not belong here: who reasons, and publishing the folder atomically, which the caller does.
Invariant: a problem's files depend on its own entry alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from taprobe_core.demo.labelling import TRUE_IMPORTANCE, exact_importance, measures
from taprobe_core.demo.task import Problem
from taprobe_core.demo.trace import Continuation, Reasoned, Trace

FORCED_SUFFIX = "_forced_answer"
"""What the dataset appends to a setting's name for its forced branch."""


class Entry(NamedTuple):
    """What one model has to say about one problem in one setting."""

    model_dir: str
    setting: str
    reasoned: Reasoned


def write_rollouts(folder: Path, sampling: str, entries: Iterable[Entry]) -> None:
    """Write entries into the empty folder `folder`.

    Args:
        folder: existing empty folder, or one to create.
        sampling: sampling folder.
        entries: each (model, setting, problem) once.
    """
    for model_dir, setting, reasoned in entries:
        below = folder / model_dir / sampling
        name = f"problem_{reasoned.problem.id}"
        _write_problem(below / setting / name, reasoned)
        if any(reasoned.forced):
            _write_banks(below / f"{setting}{FORCED_SUFFIX}" / name, reasoned, reasoned.forced)


def _write_problem(folder: Path, reasoned: Reasoned) -> None:
    problem, trace = reasoned.problem, reasoned.trace
    write_json(folder / "problem.json", _problem_row(problem))
    write_json(folder / "base_solution.json", _base_row(problem, trace))
    write_json(folder / "chunks.json", _chunks_row(problem, trace))
    write_json(folder / "chunks_labeled.json", _labeled_rows(reasoned))
    _write_banks(folder, reasoned, reasoned.rollouts)


def _write_banks(folder: Path, reasoned: Reasoned, banks: Sequence[Sequence[Continuation]]) -> None:
    for i, bank in enumerate(banks):
        rows = _solution_rows(reasoned.texts, i, bank)
        write_json(folder / f"chunk_{i}" / "solutions.json", rows, indent=None)


def _problem_row(problem: Problem) -> dict[str, str]:
    return {
        "problem": problem.statement,
        "level": "Level 1",
        "type": "Arithmetic",
        "gt_solution": problem.reference,
        "gt_answer": str(problem.answer),
        "nickname": "Order of operations",
    }


def _base_row(problem: Problem, trace: Trace) -> dict[str, Any]:
    solution = trace.thinking + trace.ending
    return {
        "prompt": problem.prompt,
        "solution": solution,
        "full_cot": problem.prompt + solution,
        "answer": trace.answer,
        "is_correct": trace.is_correct,
    }


def _chunks_row(problem: Problem, trace: Trace) -> dict[str, Any]:
    return {
        "source_text": problem.prompt + trace.thinking + trace.ending,
        "solution_text": trace.thinking,
        "chunks": [sentence.text for sentence in trace.sentences],
    }


def _labeled_rows(reasoned: Reasoned) -> list[dict[str, Any]]:
    rows = zip(
        reasoned.trace.sentences, measures(reasoned), exact_importance(reasoned), strict=True
    )
    return [
        {
            "chunk": sentence.text,
            "chunk_idx": index,
            "function_tags": [sentence.function_tag],
            "depends_on": [str(earlier) for earlier in sentence.depends_on],
            **measured,
            "summary": sentence.summary,
            TRUE_IMPORTANCE: exact,
        }
        for index, (sentence, measured, exact) in enumerate(rows)
    ]


def _solution_rows(
    texts: Sequence[str], removed: int, bank: Sequence[Continuation]
) -> list[dict[str, Any]]:
    prefix = " ".join(texts[:removed])
    return [
        {
            "chunk_removed": texts[removed],
            "prefix_without_chunk": prefix,
            "chunk_resampled": rest.first_sentence,
            "rollout": rest.text,
            "answer": rest.answer,
            "is_correct": rest.is_correct,
        }
        for rest in bank
    ]


def write_json(path: Path, content: Any, indent: int | None = 2) -> None:
    """Write a JSON file as the dataset's are written; folders above it are created."""
    path.parent.mkdir(parents=True, exist_ok=True)
    separators = (",", ":") if indent is None else None
    text = json.dumps(content, indent=indent, separators=separators, allow_nan=False)
    # Bytes, so that no platform turns line ends.
    path.write_bytes(text.encode("ascii"))
