"""What it costs to keep the activations of texts: `python -m benchmarks.committing`.

20 texts x 16 layers, sentence means in float16, at two widths: 45 sentences of 512 dimensions (the
CPU shape of `benchmarks.extraction`) and 150 of 5,120 (14B). The passes are made beforehand, by a
tiny model whose rows are then replaced; what is timed is `Ours.run` from there on, which commits
each text as the pipeline does: hashed, with a manifest, flushed to the disk. `--before` is another
checkout, whose version is run in turn with this one, each run in a process of its own.

    python -m benchmarks.committing --before ../other --repetitions 5

Bar at the CPU shape: at most 0.3 CPU s. At 14B the bytes decide, so the CPU seconds of one `write`
and one sha256 of as many stand beside it.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
N_TEXTS, N_LAYERS = 20, 16
SIZES = {"512": (45, 512), "14b": (150, 5120)}
"""Sentences of a text, and dimensions."""


def _path_of(checkout: Path) -> str:
    """The checkout's packages before all that are found already."""
    return os.pathsep.join([str(checkout.resolve()), os.environ.get("PYTHONPATH", "")])


def items_of(size: str) -> list[Any]:
    """Texts as `extract` gives them, with random rows of the size in place of their own."""
    import torch

    from benchmarks.extraction.shapes import SHAPES, build
    from benchmarks.extraction.texts import make_texts
    from taprobe_core.activations import ExtractOptions, extract

    shape = dataclasses.replace(SHAPES["tiny"], n_layers=N_LAYERS, n_texts=N_TEXTS)
    model = build(shape, torch.device("cpu"), 0).model
    tasks = [text.task(range(N_LAYERS)) for text in make_texts(shape, 0)]
    rows = torch.randn(SIZES[size])
    found = []
    for item in extract([model], tasks, ExtractOptions(storage="float16")):
        shards = {
            layer: dataclasses.replace(shard, tensors={"mean": (rows + layer).half()})
            for layer, shard in item.shards.items()
        }
        found.append(item._replace(shards=shards))
    return found


def run_once(size: str, folder: Path) -> dict[str, float]:
    """Commit all texts by the version that is imported, and measure it."""
    import torch

    from benchmarks.extraction import ours
    from benchmarks.extraction.texts import Text
    from benchmarks.extraction.timing import Job

    torch.set_num_threads(1)
    items = items_of(size)
    extracted = [items[:1], items]
    ours.extract = lambda *_, **__: iter(extracted.pop(0))  # type: ignore[assignment]
    run = ours.Ours([torch.nn.Linear(1, 1)]).run
    texts = [Text(0, (0, 1), ((0, 1),))]
    job = Job("", (0,), is_pooled=True)
    run(texts, job, folder / "warm")
    wall, cpu = time.perf_counter(), time.process_time()
    run(texts, job, folder / "timed")
    seconds = {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}
    stored = [path for path in (folder / "timed").rglob("*") if path.is_file()]
    n_bytes = sum(path.stat().st_size for path in stored)
    return {
        **seconds,
        "artifacts": sum(path.name == "manifest.json" for path in stored),
        "bytes": n_bytes,
        "floor": floor_of(n_bytes, folder / "plain"),
    }


def floor_of(n_bytes: int, path: Path) -> float:
    """CPU seconds of writing and hashing so many bytes, once each."""
    block = os.urandom(1 << 20)
    digest, cpu = hashlib.sha256(), time.process_time()
    with path.open("wb", buffering=0) as file:
        for _ in range(n_bytes >> 20):
            file.write(block)
            digest.update(block)
    return time.process_time() - cpu


def measured(checkout: Path, size: str) -> dict[str, float]:
    """Run a checkout's version in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(  # noqa: S603
            [sys.executable, str(HERE), "--child", folder, "--sizes", size],
            env={**os.environ, "PYTHONPATH": _path_of(checkout), "OMP_NUM_THREADS": "1"},
            cwd=checkout,
            check=True,
            capture_output=True,
            text=True,
        )
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--before", type=Path, help="another checkout, to be run in turn")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--sizes", default=",".join(SIZES))
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(run_once(options.sizes, options.child)))
        return
    checkouts = {"now": HERE.parents[1]}
    if options.before:
        checkouts["before"] = options.before.resolve()
    for size in options.sizes.split(","):
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in checkouts}
        for _ in range(options.repetitions):
            for name, checkout in checkouts.items():
                runs[name].append(measured(checkout, size))
        print(f"{N_TEXTS} texts x {N_LAYERS} layers of {SIZES[size]}, float16")
        medians = {
            name: {key: statistics.median(run[key] for run in found) for key in found[0]}
            for name, found in runs.items()
        }
        for name, found in medians.items():
            print(
                f"  {name:8}{found['cpu']:7.2f} CPU s {found['wall']:7.2f} s   "
                f"{found['artifacts']:.0f} artifacts, {found['bytes'] / 1e6:,.0f} MB; "
                f"one write and one hash of them {found['floor']:.2f} CPU s"
            )
        if "before" in medians:
            ratios = [medians["before"][key] / medians["now"][key] for key in ("cpu", "wall")]
            print(f"  x before {ratios[0]:.1f} CPU, {ratios[1]:.1f} wall")


if __name__ == "__main__":
    main()
