"""Measure variants on the same texts, shuffled, in one process.

A unit is what a variant gets at once: one text on a CPU, all texts on an accelerator. In each
repetition every unit is run by every variant in a fresh random order, so that what else happens on
the machine falls on all of them alike; a ratio is taken within a repetition of a unit. On a CPU
the clock is CPU seconds of the process, on an accelerator wall seconds between synchronizations.
"""

from __future__ import annotations

import gc
import random
import shutil
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.extraction.texts import Text

Rows = dict[int, dict[int, torch.Tensor]]
"""Problem, layer: token states or pooled rows."""


class Job(NamedTuple):
    """What is asked of every variant.

    Attributes:
        title: heading of its table.
        layers: blocks whose output is wanted.
        is_pooled: sentence means on disk; otherwise token states in memory.
        is_checked: the rows are wanted back for comparison, so they stay float32; not timed.
    """

    title: str
    layers: tuple[int, ...]
    is_pooled: bool
    is_checked: bool = False

    @property
    def storage(self) -> str:
        """Type of the rows on disk."""
        return "float32" if self.is_checked else "float16"


Run = Callable[[Sequence[Text], Job, Path], Rows]


@dataclass(frozen=True)
class Variant:
    """One way to do a job.

    Attributes:
        name: its row's label.
        run: does it; writes into the folder when rows are asked for. None: it cannot be run.
        note: why it cannot be run, or what is to be known about the figure.
        share: part of the job that `run` does; its time is divided by this.
        is_slow: run once, whatever the repetitions.
    """

    name: str
    run: Run | None
    note: str = ""
    share: float = 1.0
    is_slow: bool = False


class Seconds(NamedTuple):
    """One measurement."""

    wall: float
    cpu: float


@dataclass
class Timings:
    """Seconds of one variant, by unit and repetition; None: it failed, `fault` says why."""

    variant: Variant
    seconds: dict[tuple[int, int], Seconds] = field(default_factory=dict)
    fault: str = ""


def synchronize(device: torch.device) -> None:
    """Wait until a device has done what it was given; every CUDA device, whichever is named."""
    if device.type == "cuda":
        for index in range(torch.cuda.device_count()):
            torch.cuda.synchronize(index)


def timed(device: torch.device, work: Callable[[], Any]) -> tuple[Any, Seconds]:
    """Run `work` and return its result and its seconds."""
    gc.collect()
    synchronize(device)
    wall, cpu = time.perf_counter(), time.process_time()
    result = work()
    synchronize(device)
    return result, Seconds(time.perf_counter() - wall, time.process_time() - cpu)


def measure(
    variants: Sequence[Variant],
    units: Sequence[Sequence[Text]],
    job: Job,
    folder: Path,
    device: torch.device,
    repetitions: int,
) -> list[Timings]:
    """Time every variant on every unit.

    A variant that fails is left out from then on, and its row says why.

    Args:
        variants: ways to do the job.
        units: texts given at once.
        job: the job.
        folder: absent, for rows; each variant has one folder in it for all units of a repetition,
            as a job does, so that what is made once a job is paid once; deleted after the last.
        device: whose work is waited for.
        repetitions: of every unit, of variants that are not slow.
    """
    timings = [Timings(variant) for variant in variants]
    rng = random.Random(0)  # noqa: S311
    for repetition in range(repetitions):
        with clean(folder) as place:
            folders = {id(timing): place / str(at) for at, timing in enumerate(timings)}
            for own in folders.values():
                own.mkdir()
            for unit, texts in enumerate(units):
                for timing in rng.sample(timings, len(timings)):
                    if _is_due(timing, repetition):
                        own = folders[id(timing)]
                        _measure_one(timing, (unit, repetition), texts, job, own, device)
                    if unit == len(units) - 1:
                        shutil.rmtree(folders[id(timing)])
    return timings


def _is_due(timing: Timings, repetition: int) -> bool:
    variant = timing.variant
    return variant.run is not None and not timing.fault and not (variant.is_slow and repetition)


def _measure_one(
    timing: Timings,
    at: tuple[int, int],
    texts: Sequence[Text],
    job: Job,
    folder: Path,
    device: torch.device,
) -> None:
    run = timing.variant.run
    assert run is not None
    try:
        _, timing.seconds[at] = timed(device, lambda: run(texts, job, folder))
    except Exception as error:  # noqa: BLE001  the other variants are still worth their time
        timing.fault = fault_text(error)


def fault_text(error: Exception) -> str:
    """Say in a few words why a variant failed; frees what an accelerator's allocator holds."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:100]


class clean:  # noqa: N801
    """A folder that is empty on entry and gone afterwards."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __enter__(self) -> Path:
        """Make the folder."""
        self._folder.mkdir(parents=True)
        return self._folder

    def __exit__(self, *fault: object) -> None:
        """Delete it with what is in it."""
        shutil.rmtree(self._folder)


class Spread(NamedTuple):
    """Median and range."""

    median: float
    low: float
    high: float


def total(timing: Timings, clock: str) -> float | None:
    """Seconds of the whole job: the sum over units of each unit's median; None if not measured.

    Args:
        timing: of one variant.
        clock: "cpu" or "wall".
    """
    by_unit: dict[int, list[float]] = {}
    for (unit, _), seconds in timing.seconds.items():
        by_unit.setdefault(unit, []).append(getattr(seconds, clock) / timing.variant.share)
    if timing.fault or not by_unit:
        return None
    return sum(statistics.median(each) for each in by_unit.values())


def speed(timing: Timings, other: Timings, clock: str) -> Spread | None:
    """How many times as fast as `other`: paired on unit and repetition.

    A slow variant's single run of a unit is paired with every run of the other.
    """
    ratios = []
    for (unit, repetition), seconds in timing.seconds.items():
        for (unit_b, repetition_b), theirs in other.seconds.items():
            is_pair = unit == unit_b and (
                repetition == repetition_b or timing.variant.is_slow or other.variant.is_slow
            )
            if is_pair:
                mine = getattr(seconds, clock) / timing.variant.share
                ratios.append(getattr(theirs, clock) / other.variant.share / mine)
    if not ratios or timing.fault or other.fault:
        return None
    return Spread(statistics.median(ratios), min(ratios), max(ratios))


def runs(timing: Timings) -> int:
    """Repetitions measured."""
    return len({repetition for _, repetition in timing.seconds})


def as_json(timing: Timings) -> Mapping[str, Any]:
    """Everything measured, for a file."""
    return {
        "variant": timing.variant.name,
        "note": timing.variant.note,
        "fault": timing.fault,
        "share": timing.variant.share,
        "seconds": [
            {"unit": unit, "repetition": repetition, "wall": each.wall, "cpu": each.cpu}
            for (unit, repetition), each in sorted(timing.seconds.items())
        ],
    }
