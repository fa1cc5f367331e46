"""Traces and resampled rollouts -> files in the dataset's own layout.

    <model>/<sampling>/<setting>/problem_<id>/
        problem.json  base_solution.json  chunks.json  chunks_labeled.json
        chunk_<i>/solutions.json

The same loader reads these files and the published ones. Labels are computed by `importance` from
the rollouts written beside them, so they can be recomputed from the files to the last bit. Two
things are left out: `forced_*` keys, because nothing was sampled after a forced answer, and
`full_cot` of rollouts, which is prompt + prefix_without_chunk + rollout and would double the size.

What does not belong here: who reasons (a `Sampler`), and publishing the folder atomically, which
the caller does. Invariant: bytes depend on the arguments alone; a problem's files do not depend on
which other models, settings or problems are written.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from taprobe_core.demo.policy import PolicySampler
from taprobe_core.demo.task import Problem
from taprobe_core.demo.trace import Continuation, Sampler, Trace, seeded
from taprobe_core.demo.truth import choose_problems
from taprobe_core.errors import ConfigError, NotEnoughDataError
from taprobe_core.importance import Rollout, published_measures, trigram_masked_dissimilar
from taprobe_core.study.config import DemoSource

SETTINGS = {"correct_base_solution": True, "incorrect_base_solution": False}
"""The demo's settings, and whether their base traces end in the right answer."""

MAX_TRIES = 1000
"""Whole traces drawn in search of one with the wanted grade."""

_FOLDER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def write_demo_rollouts(
    folder: Path,
    source: DemoSource,
    model_dirs: Sequence[str],
    sampling: str,
    settings: Sequence[str],
    *,
    sampler_of: Callable[[str], Sampler] | None = None,
) -> None:
    """Write the demo's rollouts into the empty folder `folder`.

    All models and settings share the problems; a model folder's name seeds its draws, so two names
    are two models. Repeated names are written once.

    Args:
        folder: existing empty folder, or one to create.
        source: number of problems, rollouts per sentence, and seed.
        model_dirs: model folders.
        sampling: sampling folder.
        settings: names from `SETTINGS`.
        sampler_of: who reasons, by model folder; the policy for every model if left out.

    Raises:
        ConfigError: unknown setting, a name that is not one folder, or `folder` is not empty.
        NotEnoughDataError: a sampler gave no base trace of the wanted grade in `MAX_TRIES` tries.
    """
    _check(folder, [*model_dirs, sampling], settings)
    problems = choose_problems(source.n_problems, source.seed)
    for model_dir in dict.fromkeys(model_dirs):
        sampler = sampler_of(model_dir) if sampler_of else PolicySampler()
        for setting in dict.fromkeys(settings):
            target = folder / model_dir / sampling / setting
            for problem in problems:
                _write_problem(
                    target / f"problem_{problem.id}", problem, sampler, source, model_dir, setting
                )


def _check(folder: Path, names: Sequence[str], settings: Sequence[str]) -> None:
    unknown = sorted(set(settings) - set(SETTINGS))
    if unknown:
        raise ConfigError(
            f"the demo has no setting {unknown}", "settings", f"choose from {sorted(SETTINGS)}"
        )
    for name in names:
        if not _FOLDER.fullmatch(name):
            raise ConfigError(
                f"{name!r} cannot be a folder of the demo",
                "models.*.rollouts_dir or rollouts.sampling",
                "use letters, digits, '.', '_' and '-', starting with a letter or digit",
            )
    if folder.is_dir() and next(folder.iterdir(), None) is not None:
        raise ConfigError("the demo's folder is not empty", str(folder), "empty or remove it")


def _write_problem(
    folder: Path,
    problem: Problem,
    sampler: Sampler,
    source: DemoSource,
    model_dir: str,
    setting: str,
) -> None:
    seed = (source.seed, model_dir, setting, problem.id)
    trace = _base_trace(problem, sampler, seed, SETTINGS[setting])
    texts = [sentence.text for sentence in trace.sentences]
    banks = [
        sampler.continuations(problem, texts[:i], source.n_rollouts, seeded(*seed, i))
        for i in range(len(texts))
    ]
    _write_json(folder / "problem.json", _problem_row(problem))
    _write_json(folder / "base_solution.json", _base_row(problem, trace))
    _write_json(folder / "chunks.json", _chunks_row(problem, trace))
    _write_json(folder / "chunks_labeled.json", _labeled_rows(trace, banks))
    for i, bank in enumerate(banks):
        rows = _solution_rows(texts, i, bank)
        _write_json(folder / f"chunk_{i}" / "solutions.json", rows, indent=None)


def _base_trace(
    problem: Problem, sampler: Sampler, seed: tuple[str | int, ...], wanted: bool
) -> Trace:
    rng = seeded(*seed, "base")
    for _ in range(MAX_TRIES):
        trace = sampler.trace(problem, rng)
        if trace.is_correct == wanted:
            return trace
    raise NotEnoughDataError(
        f"no {'correct' if wanted else 'incorrect'} base trace in {MAX_TRIES} tries",
        f"problem {problem.id}",
        "give another seed, or a sampler with an accuracy between 0.25 and 0.75",
    )


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


def _labeled_rows(trace: Trace, banks: Sequence[Sequence[Continuation]]) -> list[dict[str, Any]]:
    rollouts = [
        [Rollout(rest.answer, rest.is_correct, rest.first_sentence) for rest in bank]
        for bank in banks
    ]
    texts = [sentence.text for sentence in trace.sentences]
    measures = published_measures(texts, rollouts, trigram_masked_dissimilar)
    return [
        {
            "chunk": sentence.text,
            "chunk_idx": index,
            "function_tags": [sentence.function_tag],
            "depends_on": [str(earlier) for earlier in sentence.depends_on],
            **measured,
            "summary": sentence.summary,
        }
        for index, (sentence, measured) in enumerate(zip(trace.sentences, measures, strict=True))
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


def _write_json(path: Path, content: Any, indent: int | None = 2) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    separators = (",", ":") if indent is None else None
    text = json.dumps(content, indent=indent, separators=separators, allow_nan=False)
    # Bytes, so that no platform turns line ends.
    path.write_bytes(text.encode("ascii"))
