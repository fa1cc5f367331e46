"""The two demo worlds: what the bundled reasoners said, and what the policy says at any size.

What does not belong here: file formats (`bundle`, `writer`), and publishing a folder atomically,
which the caller does. Invariant: a world depends on its arguments alone, and a larger one holds
the smaller: the first rollouts of each sentence, some of the problems.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from taprobe_core.demo.bundle import BUNDLE, SAMPLING, first_rollouts, read_manifest, read_records
from taprobe_core.demo.policy import drawn_answers, drawn_rollouts, drawn_trace
from taprobe_core.demo.task import SETTINGS, Problem, Reasoned, Trace, seeded
from taprobe_core.demo.tokenizer import train_tokenizer
from taprobe_core.demo.truth import choose_problems
from taprobe_core.demo.writer import Entry, write_rollouts
from taprobe_core.errors import ConfigError, PlanError
from taprobe_core.study.config import DemoSource, PolicySource

N_FORCED = 20
"""Forced answers per sentence, at most."""

_FOLDER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True, slots=True)
class DemoWorld:
    """Where a demo world lies.

    Attributes:
        rollouts_folder: a mirror of the dataset's layout.
        tokenizer_folder: `tokenizer.json` and `tokenizer_config.json`.
    """

    rollouts_folder: Path
    tokenizer_folder: Path

    @classmethod
    def at(cls, folder: Path) -> DemoWorld:
        """Return the world that `write_demo_world` or `write_policy_world` wrote there."""
        return cls(folder / "rollouts", folder / "tokenizer")


def write_demo_world(folder: Path, source: DemoSource, bundle: Path = BUNDLE) -> None:
    """Unpack the bundled reasoners' rollouts, all reasoners and settings.

    Args:
        folder: existing empty folder, or one to create.
        source: how many of the problems, in order of their ids, and of the rollouts.
        bundle: where to read.

    Raises:
        ConfigError: `folder` is not empty.
        PlanError: the bundle has fewer problems or rollouts.
        DataError: the bundle cannot be read.
    """
    _check_empty(folder)
    recipe = read_manifest(bundle)["recipe"]
    world = DemoWorld.at(folder)
    write_rollouts(world.rollouts_folder, SAMPLING, _bundled(source, bundle, recipe))
    world.tokenizer_folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        found = (bundle / next(iter(recipe["reasoners"])) / name).read_bytes()
        (world.tokenizer_folder / name).write_bytes(found)


def write_policy_world(
    folder: Path,
    source: PolicySource,
    model_dirs: Sequence[str],
    sampling: str,
    settings: Sequence[str],
) -> None:
    """Draw rollouts of the policy and train a tokenizer on its traces.

    All models and settings share the problems; a model folder's name seeds its draws, so two names
    are two models. Repeated names are written once.

    Args:
        folder: existing empty folder, or one to create.
        source: number of problems, rollouts per sentence, and seed.
        model_dirs: model folders.
        sampling: sampling folder.
        settings: names from `SETTINGS`.

    Raises:
        ConfigError: unknown setting, a name that is not one folder, or `folder` is not empty.
    """
    _check_names([*model_dirs, sampling], settings)
    _check_empty(folder)
    world = DemoWorld.at(folder)
    entries = _drawn(source, list(dict.fromkeys(model_dirs)), list(dict.fromkeys(settings)))
    write_rollouts(world.rollouts_folder, sampling, entries)
    train_tokenizer(world.tokenizer_folder, source.seed)


def _bundled(source: DemoSource, bundle: Path, recipe: Mapping[str, Any]) -> Iterator[Entry]:
    for name in ("n_problems", "n_rollouts"):
        if getattr(source, name) > recipe[name]:
            raise PlanError(
                f"the demo has {name} {recipe[name]}, not {getattr(source, name)}",
                f"rollouts.source.{name}",
                f"ask for {recipe[name]} or fewer, or use `kind: policy`",
            )
    for reasoner in recipe["reasoners"]:
        n_read = dict.fromkeys(SETTINGS, 0)
        for setting, reasoned, _ in read_records(bundle, reasoner):
            n_read[setting] += 1
            if n_read[setting] <= source.n_problems:
                yield Entry(reasoner, setting, first_rollouts(reasoned, source.n_rollouts))


def _drawn(
    source: PolicySource, model_dirs: Sequence[str], settings: Sequence[str]
) -> Iterator[Entry]:
    for problem in choose_problems(source.n_problems, source.seed):
        for model_dir in model_dirs:
            for setting in settings:
                seed = (source.seed, model_dir, setting, problem.id)
                yield Entry(model_dir, setting, _reasoned(problem, source, seed, setting))


def _reasoned(
    problem: Problem, source: PolicySource, seed: tuple[str | int, ...], setting: str
) -> Reasoned:
    trace = _base_trace(problem, seed, SETTINGS[setting])
    texts = [sentence.text for sentence in trace.sentences]
    prefixes = [texts[:i] for i in range(len(texts))]
    n, n_forced = source.n_rollouts, min(source.n_rollouts, N_FORCED)
    return Reasoned(
        problem,
        trace,
        [drawn_rollouts(problem, p, n, seeded(*seed, i)) for i, p in enumerate(prefixes)],
        [
            drawn_answers(problem, p, n_forced, seeded(*seed, i, "forced"))
            for i, p in enumerate(prefixes)
        ],
    )


def _base_trace(problem: Problem, seed: tuple[str | int, ...], grade: bool) -> Trace:
    # Ends: `choose_problems` takes problems that the policy gets right and wrong often enough.
    rng = seeded(*seed, "base")
    while True:
        trace = drawn_trace(problem, rng)
        if trace.is_correct == grade:
            return trace


def _check_names(names: Sequence[str], settings: Sequence[str]) -> None:
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


def _check_empty(folder: Path) -> None:
    if folder.is_dir() and next(folder.iterdir(), None) is not None:
        raise ConfigError("the demo's folder is not empty", str(folder), "empty or remove it")
