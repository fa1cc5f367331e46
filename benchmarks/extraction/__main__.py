"""Command line: build a model, run every variant and check, print tables.

    python -m benchmarks.extraction                          CPU: small Qwen2; CUDA: 14B shape
    python -m benchmarks.extraction --shape 8b --gpus 1,2    with scaling over two GPUs
    python -m benchmarks.extraction --shape tiny --device cpu --gpus 1,2 --quick

The yardstick is one forward pass of the base model, without head and without reading anything.
FLOP are those of the blocks that the job needs, so needless work shows as a lower rate.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

from benchmarks.extraction import checks
from benchmarks.extraction.bench import Bench
from benchmarks.extraction.peers import ROWS
from benchmarks.extraction.shapes import SHAPES, copy_base, quick
from benchmarks.extraction.tables import environment
from benchmarks.extraction.texts import make_texts
from benchmarks.extraction.timing import timed

SECTIONS = ("first", "states", "one", "all", "packs", "finer", "poolings", "attention", "scaling")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the options; see `--help`."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.extraction",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    has_cuda = torch.cuda.is_available()
    add = parser.add_argument
    add("--device", default="cuda" if has_cuda else "cpu", choices=("cpu", "cuda"))
    add("--shape", choices=tuple(SHAPES), help="default: 14b on CUDA, small elsewhere")
    add("--sections", help=f"of {','.join(SECTIONS)}; default: all, on CUDA without states")
    add("--repetitions", type=int, help="of every variant; default 3 on a CPU, 2 on CUDA")
    add("--check-texts", type=int, help="texts compared with the reference; default 6 or 3")
    add("--peers", default=",".join(ROWS), help=f"of {','.join(ROWS)}; empty for none")
    add("--variants", type=re.compile, default=re.compile(""), help="only rows of the speed tables "
        "whose name has this (a regular expression)")  # fmt: skip
    add("--gpus", help="device counts of the scaling section, as in 1,2,4; default on CUDA: powers "
        "of two up to all, on a CPU: 1, which leaves the section out")  # fmt: skip
    add("--scale-texts", type=int, default=8, help="times as many texts for the scaling section, "
        "so that the last packs do not decide")  # fmt: skip
    add("--attention-tokens", type=int, help="default: 8192 on CUDA, the longest text elsewhere")
    add("--threads", type=int, default=1, help="of torch, on a CPU")
    add("--seed", type=int, default=16)
    add("--folder", type=Path, help="where rows are written; default: a temporary folder")
    add("--json", type=Path, help="write every figure there")
    add("--quick", action="store_true", help="few layers and texts, one repetition")
    options = parser.parse_args(arguments)
    is_cuda = options.device == "cuda"
    options.shape = options.shape or ("14b" if is_cuda else "small")
    usual = [each for each in SECTIONS if not (is_cuda and each == "states")]
    options.sections = _chosen(parser, options.sections or ",".join(usual), SECTIONS)
    options.peers = _chosen(parser, options.peers, tuple(ROWS))
    n_devices = torch.cuda.device_count() if is_cuda else 1
    usual_counts = [2**power for power in range(n_devices.bit_length())]
    options.gpus = [int(each) for each in options.gpus.split(",")] if options.gpus else usual_counts
    if is_cuda and max(options.gpus) > n_devices:
        parser.error(f"--gpus {max(options.gpus)}: {n_devices} visible")
    options.repetitions = options.repetitions or (1 if options.quick else 2 if is_cuda else 3)
    options.check_texts = options.check_texts or (3 if is_cuda else 6)
    return options


def _chosen(parser: argparse.ArgumentParser, given: str, known: tuple[str, ...]) -> tuple[str, ...]:
    chosen = tuple(each for each in given.split(",") if each)
    if unknown := set(chosen) - set(known):
        parser.error(f"{sorted(unknown)}: choose of {', '.join(known)}")
    return chosen


def sections(bench: Bench, options: argparse.Namespace) -> Iterator[Callable[[], checks.Check]]:
    """Yield what was asked for, one section after another, to be run by the caller."""
    wanted, shape, folder = options.sections, bench.shape, bench.folder
    texts, job, ours = bench.texts, bench.job("all"), bench.ours
    if "first" in wanted:
        yield lambda: checks.first_pass(ours, min(texts, key=len), job, folder)
    for name in ("states", "one", "all"):
        if name in wanted:
            yield partial(bench.compare, name)
    bench.drop_peers()
    if "packs" in wanted:
        yield lambda: checks.packs(ours, texts, job, folder)
    if "finer" in wanted:
        yield lambda: checks.finer(bench.causal, ours, shape, texts[:2], folder)
    if "poolings" in wanted:
        yield lambda: checks.poolings(ours, texts, job, shape.middle, folder)
    if "attention" in wanted:
        longest = 8192 if bench.device.type == "cuda" else max(map(len, texts))
        n_tokens = options.attention_tokens or longest
        yield lambda: checks.attention([bench.causal.model], shape, options.seed, n_tokens)
    if "scaling" in wanted and max(options.gpus) > 1:
        yield lambda: _scaling(bench, options)


def _scaling(bench: Bench, options: argparse.Namespace) -> checks.Check:
    """Copy the weights to each further device; on a CPU every device is the same one."""
    kind = bench.device.type
    models = [bench.causal.model]
    for index in range(1, max(options.gpus)):
        device = torch.device(kind, index) if kind == "cuda" else bench.device
        models.append(copy_base(bench.causal, bench.shape, device))
    texts = make_texts(bench.shape, options.seed, options.scale_texts * len(bench.texts))
    job = bench.job("all")
    return checks.scaling(bench.ours, models, options.gpus, texts, job, bench.folder)


def main() -> None:
    """Run and print."""
    options = parse()
    device = torch.device(options.device, 0) if options.device == "cuda" else torch.device("cpu")
    if device.type == "cpu":
        torch.set_num_threads(options.threads)
    shape = quick(SHAPES[options.shape]) if options.quick else SHAPES[options.shape]
    about = environment(device)
    for name, value in about.items():
        print(f"{name:9} {value}")
    found, faults = [], []
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        bench = Bench(shape, device, Path(temporary) / "rows", options)
        print(bench.head(), flush=True)
        for run in sections(bench, options):
            try:
                section, seconds = timed(device, run)
            except Exception as error:  # noqa: BLE001  raised at the end, behind what can be had
                traceback.print_exc()
                faults.append(error)
                continue
            print(f"\n{section.title}\n{section.table}\n({seconds.wall:.0f} s)", flush=True)
            found.append({"title": section.title, "figures": section.figures})
            if options.json:  # after each section, for a run that is cut short
                text = json.dumps({**about, "sections": found}, indent=1)
                options.json.write_text(text + "\n", encoding="utf-8")
    if faults:
        raise ExceptionGroup("sections that failed", faults)


if __name__ == "__main__":
    main()
