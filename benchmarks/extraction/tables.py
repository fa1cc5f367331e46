"""Plain aligned text tables, and what a run was made with."""

from __future__ import annotations

import importlib.metadata
import platform
import shlex
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

import torch

from benchmarks.extraction.agreement import Agreement
from benchmarks.extraction.timing import Spread, Timings, runs, speed, total

LIBRARIES = ("transformers", "triton", "polars", "transformer-lens", "nnsight")


def environment(device: torch.device) -> dict[str, str]:
    """Return date, versions, device and command."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for name in LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": shlex.join(["python", "-m", "benchmarks.extraction", *sys.argv[1:]]),
        "device": _device(device),
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }


def _device(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(device)}"
    threads = f"{torch.get_num_threads()} thread(s), {torch.backends.cpu.get_cpu_capability()}"
    return f"{device.type}, {_processor()}, {threads}"


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:  # noqa: PTH123
            names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model n")]
    except OSError:
        names = []
    return names[0] if names else platform.processor()


def render(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table: the first column to the left, numbers to the right, the last to the left."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    last = len(head) - 1
    lines = []
    for row in (head, ["-" * width for width in widths], *rows):
        cells = [
            cell.ljust(width) if at in (0, last) else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


class Work(NamedTuple):
    """What a table's rates are rates of.

    Attributes:
        clock: "cpu" or "wall", the seconds that they are taken of.
        n_tokens: of all texts.
        flop: operations of the blocks that the job needs.
        gemm_rate: sustained FLOP/s of matrix products.
    """

    clock: str
    n_tokens: int
    flop: int
    gemm_rate: float


def comparison(
    timings: Sequence[Timings],
    agreements: dict[str, Agreement | None],
    work: Work,
    names: dict[str, str],
) -> str:
    """Return the table of one job.

    Args:
        timings: of every variant.
        agreements: by the variant's name.
        work: of the job.
        names: columns of ratios: heading to the variant it compares with.
    """
    by_name = {timing.variant.name: timing for timing in timings}
    head = ["variant", "wall s", "cpu s", "tokens/s", "TFLOP/s", "of GEMM", *names, "runs",
            "bit-equal", "max|d|/rms", "note"]  # fmt: skip
    rows = []
    for timing in timings:
        seconds = total(timing, work.clock)
        cells = [_number(total(timing, each), ".2f") for each in ("wall", "cpu")]
        if seconds is None:
            cells += ["-"] * (3 + len(names))
        else:
            cells += [f"{work.n_tokens / seconds:,.0f}", f"{work.flop / seconds / 1e12:.4g}"]
            cells += [f"{work.flop / seconds / work.gemm_rate:.1%}"]
            others = [by_name.get(other) for other in names.values()]
            cells += [
                spread(None if other is None else speed(timing, other, work.clock))
                for other in others
            ]
        cells += [str(runs(timing)), *_agreement(agreements.get(timing.variant.name))]
        rows.append([timing.variant.name, *cells, timing.fault or timing.variant.note])
    return render(head, rows)


def spread(each: Spread | None) -> str:
    """Return a median with its range."""
    return "-" if each is None else f"{each.median:.2f} [{each.low:.2f}, {each.high:.2f}]"


def _agreement(found: Agreement | None) -> list[str]:
    if found is None:
        return ["-", "-"]
    return [f"{found.n_equal}/{found.n_texts}", f"{found.worst:.1e}"]


def _number(value: Any, form: str) -> str:
    return "-" if value is None else format(value, form)
