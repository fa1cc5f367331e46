"""One model, its texts, and the three comparisons of all variants on them."""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.extraction.agreement import Agreement, compare, reference
from benchmarks.extraction.checks import Check
from benchmarks.extraction.ours import NAME, Ours
from benchmarks.extraction.peers import Peers
from benchmarks.extraction.reading import Readers
from benchmarks.extraction.shapes import Shape, build
from benchmarks.extraction.tables import Work, comparison
from benchmarks.extraction.texts import Text, make_texts
from benchmarks.extraction.timing import (
    Job,
    Variant,
    as_json,
    clean,
    fault_text,
    measure,
    synchronize,
    timed,
)
from taprobe_core.activations.cost import pass_flop
from taprobe_core.activations.gemm_rate import BlockShape, sustained_gemm_rate

TITLES = {
    "states": "One layer (the middle one), token states obtained",
    "one": "One layer (the middle one), pooled rows on disk",
    "all": "All layers, pooled rows on disk",
}
RATIOS = {"x bare": "bare forward, base model", "x HF": "HF output_hidden_states", "x ours": NAME}


class Bench:
    """A model, its texts and the sustained GEMM rate of its device.

    Args:
        shape: of the model.
        device: where it runs.
        folder: where rows are written; must not exist.
        options: the command line's.
    """

    def __init__(
        self, shape: Shape, device: torch.device, folder: Path, options: argparse.Namespace
    ) -> None:
        self.shape, self.device, self.folder = shape, device, folder
        self.texts = make_texts(shape, options.seed)
        self.causal, seconds = timed(device, lambda: build(shape, device, options.seed))
        self.ours = Ours([self.causal.model])
        self._readers = Readers(self.causal)
        self._peers: Peers | None = Peers(self.causal, options.peers)
        self._build_s = seconds.wall
        self._repetitions: int = options.repetitions
        self._wanted: re.Pattern[str] = options.variants
        self._check_texts = self.texts[: options.check_texts]

    def gemm_rate(self) -> float:
        """Measure the sustained FLOP/s of matrix products; on a shared CPU, of a CPU second."""
        synchronize(self.device)
        on_cpu = self.device.type == "cpu"
        return sustained_gemm_rate(
            self.device,
            self.shape.torch_dtype,
            BlockShape.of(self.causal.config),
            seconds=2.0,
            clock=time.process_time if on_cpu else time.perf_counter,
        )

    def drop_peers(self) -> None:
        """Forget the peers and their copies of the weights."""
        self._peers = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def job(self, name: str) -> Job:
        """Return a comparison's job."""
        layers = tuple(range(self.shape.n_layers)) if name == "all" else (self.shape.middle,)
        return Job(TITLES[name], layers, is_pooled=name != "states")

    def compare(self, name: str) -> Check:
        """Run every variant of a job: once for agreement and warm-up, then timed."""
        job = self.job(name)
        variants, agreements = self._checked(self._variants(job), job)
        is_cpu = self.device.type == "cpu"
        units: Sequence[Sequence[Text]] = [[t] for t in self.texts] if is_cpu else [self.texts]
        rates = [self.gemm_rate()]
        timings = measure(variants, units, job, self.folder, self.device, self._repetitions)
        rates.append(self.gemm_rate())
        clock = "cpu" if is_cpu else "wall"
        lengths = [len(text) for text in self.texts]
        flop = pass_flop(BlockShape.of(self.causal.config), lengths, max(job.layers) + 1)
        work = Work(clock, sum(lengths), flop, sum(rates) / 2)
        figures = {
            "work": work._asdict(),
            "gemm_rates": rates,
            "timings": [as_json(timing) for timing in timings],
            "agreement": {
                key: None if each is None else each._asdict() for key, each in agreements.items()
            },
        }
        title = (
            f"{job.title}: {len(lengths)} texts, {sum(lengths):,} tokens, {flop / 1e12:,.4g} TFLOP "
            f"of blocks\nGEMM {rates[0] / 1e12:.4g} TFLOP/s before, {rates[1] / 1e12:.4g} after; "
            f"rates and ratios in {clock} seconds; x = speed over that row's, median [range] "
            f"paired on {'each text' if is_cpu else 'all texts'}"
        )
        return Check(title, comparison(timings, agreements, work, RATIOS), figures)

    def _variants(self, job: Job) -> list[Variant]:
        assert self._peers is not None
        found = [*self._readers.variants(job), *self._peers.variants(job), *self.ours.variants(job)]
        return [variant for variant in found if self._wanted.search(variant.name)]

    def _checked(
        self, variants: Sequence[Variant], job: Job
    ) -> tuple[list[Variant], dict[str, Agreement | None]]:
        """Run the check texts through every variant, which warms each of them up.

        Returns:
            The variants, those that failed now with a note instead of a run; and how near each is.
        """
        job = job._replace(is_checked=True)
        with clean(self.folder) as place:
            expected = reference(self.causal, self._check_texts, job, place)
        kept: list[Variant] = []
        found: dict[str, Agreement | None] = {}
        for variant in variants:
            kept.append(variant)
            if variant.run is None:
                continue
            # The library norms the last of its hidden states; the others are block outputs.
            last = self.shape.n_layers - 1 if variant.name.startswith("HF") else None
            try:
                with clean(self.folder) as place:
                    rows = variant.run(self._check_texts, job, place)
            except Exception as error:  # noqa: BLE001  the others are still worth their time
                kept[-1] = replace(variant, run=None, note=fault_text(error))
            else:
                found[variant.name] = compare(rows, expected, last)
        return kept, found

    def head(self) -> str:
        """Say what is measured."""
        lengths = [len(text) for text in self.texts]
        n_sentences = sum(len(text.spans) for text in self.texts)
        return (
            f"model     {self.shape.render()}, made in {self._build_s:.1f} s\n"
            f"texts     {len(lengths)} of {min(lengths)}-{max(lengths)} tokens, {sum(lengths):,} "
            f"tokens, {n_sentences:,} sentences"
        )
