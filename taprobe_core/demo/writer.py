"""What reasoners gave -> files in the dataset's own layout; a copy with every kind of damage.

    <model>/<sampling>/<setting>/problem_<id>/
        problem.json  base_solution.json  chunks.json  chunks_labeled.json
        chunk_<i>/solutions.json
    <model>/<sampling>/<setting>_forced_answer/problem_<id>/chunk_<i>/solutions.json

The same loader reads these files and the published ones. Labels are computed by `labels.measures`
from the rollouts written beside them, so they can be recomputed from the files to the last bit. One
key is the demo's own: `true_importance`, which published labels cannot have. One is left out:
`full_cot` of rollouts, which is prompt + prefix_without_chunk + rollout and would double the size.

In the damaged copy each damage is one file or one run of folders of one problem, and all of them
are listed in `damage.json`, so that whatever reads rollouts can be held to finding these and
nothing else. Where rollouts are damaged, the labels are computed again from what is left, as a
generator would have done: a label that differs from its rollouts is a damage of its own.

What does not belong here: who reasons, finding damage (`labels.audit`), and publishing the folder
atomically, which the caller does. Invariants: a problem's files depend on its own entry alone; the
clean folder is only read; equal arguments give equal bytes.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from taprobe_core.demo.task import Continuation, Problem, Reasoned, Trace, seeded
from taprobe_core.demo.truth import TRUE_IMPORTANCE, exact_importance, measures
from taprobe_core.errors import ConfigError, NotEnoughDataError
from taprobe_core.labels import (
    Rollout,
    published_measures,
    read_solutions,
    trigram_masked_dissimilar,
)
from taprobe_core.labels.audit import Kind, cut_prefix

FORCED_SUFFIX = "_forced_answer"
"""What the dataset appends to a setting's name for its forced branch."""


class Entry(NamedTuple):
    """What one model has to say about one problem in one setting."""

    model_dir: str
    setting: str
    reasoned: Reasoned


def write_rollouts(folder: Path, sampling: str, entries: Iterable[Entry]) -> None:
    """Write entries into the empty folder `folder`."""
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


MANIFEST = "damage.json"

SNAPSHOT_SHARE = 0.6
"""Rollouts that an older label file knew, the first ones of every sentence."""

N_BLOCK = 3
"""Consecutive banks that a missing block lacks."""


@dataclass(frozen=True, slots=True)
class Damage:
    """One damage.

    Attributes:
        kind: what the audit calls it.
        problem_id: the problem.
        setting: its setting's folder.
        model: its model's folder.
        file: what was damaged, below the rollouts folder; the first folder of a missing block.
        done: what was done to it.
        n: rows, sentences, folders or files that were changed.
    """

    kind: Kind
    problem_id: int
    setting: str
    model: str
    file: str
    done: str
    n: int


class _Done(NamedTuple):
    file: str
    done: str
    n: int


_Hurt: TypeAlias = Callable[[Path, random.Random], "_Done | None"]
"""Damage a problem's folder; None, and nothing changed, where the problem does not lend itself."""


def write_dirty_copy(clean: Path, folder: Path, seed: int = 0) -> list[Damage]:
    """Copy a rollouts folder and damage the copy, once in each of eleven ways.

    Each damage is in a problem of its own (in one model and setting) and, while there are enough
    problems, under an id of its own.
    """
    _check_target(clean, folder)
    shutil.copytree(clean, folder, copy_function=shutil.copyfile, dirs_exist_ok=True)
    places = [base.parent for base in sorted(folder.glob("*/*/*/problem_*/base_solution.json"))]
    seeded("dirty", seed).shuffle(places)
    damages: list[Damage] = []
    for name, (kind, hurt) in _DAMAGES.items():
        used = {damage.problem_id for damage in damages}
        # A stable sort: unused ids first, in shuffled order.
        places.sort(key=lambda place: _problem_id(place) in used)
        place, done = _first_that_takes(places, name, hurt, seed)
        places.remove(place)
        relative = place.relative_to(folder)
        model, _, setting = relative.parts[:3]
        file = (relative / done.file).as_posix()
        damages.append(Damage(kind, _problem_id(place), setting, model, file, done.done, done.n))
    damages.sort(key=lambda damage: damage.file)
    rows = [asdict(damage) for damage in damages]
    write_json(folder / MANIFEST, {"seed": seed, "damages": rows})
    return damages


def _check_target(clean: Path, folder: Path) -> None:
    if folder.is_dir() and next(folder.iterdir(), None) is not None:
        raise ConfigError("the dirty copy's folder is not empty", str(folder), "empty or remove it")
    if folder.resolve().is_relative_to(clean.resolve()):
        raise ConfigError(
            "the dirty copy would lie in the clean folder", str(folder), "name a folder elsewhere"
        )


def _first_that_takes(places: list[Path], name: str, hurt: _Hurt, seed: int) -> tuple[Path, _Done]:
    rng = seeded("dirty", seed, name)
    for place in places:
        done = hurt(place, rng)
        if done is not None:
            return place, done
    raise NotEnoughDataError(
        f"no undamaged problem is left for: {name}",
        "the clean rollouts folder",
        f"give a folder with more problems: each of the {len(_DAMAGES)} damages takes one",
    )


def _problem_id(place: Path) -> int:
    return int(place.name.removeprefix("problem_"))


def _corrupt_prefix(place: Path, rng: random.Random) -> _Done | None:
    texts = _texts(place)
    repeated = [i for i in range(len(texts)) if cut_prefix(texts, i) != " ".join(texts[:i])]
    if not repeated:
        return None
    index = rng.choice(repeated)
    file = _bank_name(index)
    rows = _load(place / file)
    for row in rows:
        row["prefix_without_chunk"] = cut_prefix(texts, index)
    write_json(place / file, rows, indent=None)
    return _Done(file, f"every copy of {texts[index]!r} deleted from the prefix", len(rows))


def _remove_block(place: Path, rng: random.Random) -> _Done | None:
    n_sentences = len(_texts(place))
    if n_sentences < N_BLOCK + 2:
        return None
    first = rng.randrange(1, n_sentences - N_BLOCK)
    block = range(first, first + N_BLOCK)
    for index in block:
        shutil.rmtree(place / f"chunk_{index}")
    return _Done(f"chunk_{first}", f"folders chunk_{first} to chunk_{block[-1]} removed", N_BLOCK)


def _remove_one(place: Path, rng: random.Random) -> _Done | None:
    name = f"chunk_{rng.randrange(1, len(_texts(place)))}"
    shutil.rmtree(place / name)
    return _Done(name, f"folder {name} removed", 1)


def _restore_older_labels(place: Path, rng: random.Random) -> _Done | None:
    before = _load(place / "chunks_labeled.json")
    older = _labeled(place, SNAPSHOT_SHARE)
    n = sum(new != old for new, old in zip(older, before, strict=True))
    if not n:
        return None
    write_json(place / "chunks_labeled.json", older)
    done = f"measures computed from the first {SNAPSHOT_SHARE:.0%} of the rollouts"
    return _Done("chunks_labeled.json", done, n)


def _fail_rows(place: Path, rng: random.Random) -> _Done | None:
    def fail(row: dict[str, Any]) -> dict[str, Any]:
        kept = {key: row[key] for key in ("chunk_removed", "prefix_without_chunk")}
        return kept | {"error": "API error: 503 Service Unavailable"}

    return _change_rows(place, rng, fail, "replaced by an error, labels computed again")


def _empty_answers(place: Path, rng: random.Random) -> _Done | None:
    def stop(row: dict[str, Any]) -> dict[str, Any]:
        half = row["rollout"][: len(row["rollout"]) // 2]
        return row | {"rollout": half, "answer": "", "is_correct": False}

    return _change_rows(place, rng, stop, "cut before their answer, labels computed again")


def _ungrade(place: Path, rng: random.Random) -> _Done | None:
    return _change_rows(
        place, rng, lambda row: row | {"is_correct": None}, "ungraded, labels computed again"
    )


def _change_rows(
    place: Path,
    rng: random.Random,
    change: Callable[[dict[str, Any]], dict[str, Any]],
    done: str,
) -> _Done | None:
    file = _bank_name(rng.randrange(len(_texts(place))))
    rows = _load(place / file)
    n = max(1, len(rows) * 2 // 5)
    for index in rng.sample(range(len(rows)), n):
        rows[index] = change(rows[index])
    write_json(place / file, rows, indent=None)
    write_json(place / "chunks_labeled.json", _labeled(place))
    return _Done(file, f"{n} of {len(rows)} rows {done}", n)


def _cut_bank(place: Path, rng: random.Random) -> _Done | None:
    file = _bank_name(rng.randrange(len(_texts(place))))
    return _cut(place, file)


def _fail_base(place: Path, rng: random.Random) -> _Done | None:
    prompt = _load(place / "base_solution.json")["prompt"]
    row = {"prompt": prompt, "error": "API error: 503 Service Unavailable"}
    write_json(place / "base_solution.json", row)
    return _Done("base_solution.json", "solution replaced by an error", 1)


def _remove_labels(place: Path, rng: random.Random) -> _Done | None:
    (place / "chunks_labeled.json").unlink()
    return _Done("chunks_labeled.json", "file removed", 1)


def _cut_problem(place: Path, rng: random.Random) -> _Done | None:
    return _cut(place, "problem.json")


def _cut(place: Path, file: str) -> _Done:
    data = (place / file).read_bytes()
    (place / file).write_bytes(data[: len(data) // 2])
    return _Done(file, f"cut after {len(data) // 2} of {len(data)} bytes", 1)


_DAMAGES: dict[str, tuple[Kind, _Hurt]] = {
    # First what not every problem takes.
    "prefix corruption": ("corrupted_prefix", _corrupt_prefix),
    "missing block": ("missing_block", _remove_block),
    "older label snapshot": ("label_mismatch", _restore_older_labels),
    "gap": ("gap", _remove_one),
    "error rows": ("error_rows", _fail_rows),
    "empty answers": ("empty_answers", _empty_answers),
    "ungraded rows": ("ungraded_rows", _ungrade),
    "cut rollouts": ("unreadable", _cut_bank),
    "failed base solution": ("unreadable", _fail_base),
    "missing labels": ("unreadable", _remove_labels),
    "cut problem": ("unreadable", _cut_problem),
}


def _labeled(place: Path, share: float = 1.0) -> list[dict[str, Any]]:
    """Return the problem's labelled rows, measures computed from the files' first rollouts."""
    rows: list[dict[str, Any]] = _load(place / "chunks_labeled.json")
    banks = list(_banks(place, len(rows), share))
    made = published_measures([row["chunk"] for row in rows], banks, trigram_masked_dissimilar)
    return [row | measures for row, measures in zip(rows, made, strict=True)]


def _banks(place: Path, n_sentences: int, share: float) -> Iterator[list[Rollout]]:
    for index in range(n_sentences):
        rows = _load(place / _bank_name(index))
        yield read_solutions(rows[: int(len(rows) * share)], str(place)).rollouts


def _texts(place: Path) -> list[str]:
    return [row["chunk"] for row in _load(place / "chunks_labeled.json")]


def _bank_name(index: int) -> str:
    return f"chunk_{index}/solutions.json"


def _load(path: Path) -> Any:
    return json.loads(path.read_bytes())
