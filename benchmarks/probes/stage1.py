"""A slice of the published stage 1 through the pipeline's functions, and what the whole takes.

    python -m benchmarks.probes.stage1 --device cuda [--precision tf32] [--seeds 20] [--kinds ...]
    python -m benchmarks.probes.stage1 --rows 220 --features 32 --problems 6 --seeds 2  # a trial

Stage 1 of `studies/sweep.yaml` has 768 configurations, of which each fits its recipes on 20 folds
at 20 seeds: 307,200 trainings of a configuration. The slice is all 48 configurations of one setting
and one layer: every target, percentile, pooling and residualisation, with and without the last
sentence, every kind of probe. What it needs is laid out by the sweep's own code and fitted by
`fit_batches`; tables of metrics and files are not made. Data are synthetic in the published size:
2,932 sentences of 5,120 values, some 70,000 tokens, `ill` features, labels with 30 % zeros of which
three tenths of the variance are signal: published labels are that reliable (.16 to .45).

All 16 pairs of setting and layer cost the same but for chance (equal rows, widths and recipes), so
the whole is 16 times the slice; baselines without activations are counted at every layer, though
the store keeps one. Where the forced-answer settings repeat the plain ones, as they do wherever
they were compared, their fits are taken over (`pipeline.fit`) and the whole is 8 times the slice.
Seconds are wall seconds, the device synchronised.

`--seconds` bounds what a kind may take: its seeds run in blocks, of which the first always runs and
no other is begun that would end too late. What it took is scaled by the seeds it lacks, which
overstates what is done once; a deterministic kind always runs whole. The share of such a slice
counts the seeds that all kinds ran, and a slice of some kinds has none.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray

from benchmarks.probes.configuration import texts_of
from benchmarks.probes.features import make_probe_data
from taprobe_core.pipeline.fit_rows import View, kept_rows, take_rows
from taprobe_core.pipeline.stages.sweep import wanted_fits
from taprobe_core.probes import Design, Fit, fit_batches
from taprobe_core.probes.features import ProbeData, TokenSets
from taprobe_core.splits import make_folds
from taprobe_core.study import Precision, Study, load_study
from taprobe_core.sweep.space import SweepSpace, recipes_of, uses_of
from taprobe_core.tables import LABELS, schema_of

Floats = NDArray[np.float64]

RELIABILITY = 0.3
SEEDS_AT_ONCE = 5
"""Where seconds are bounded: enough models for a full batch."""


class Size(NamedTuple):
    """Of the data: problems, sentences, width of the activations."""

    n_problems: int
    n_rows: int
    n_features: int


def make_data(size: Size) -> ProbeData:
    """Draw features, token sets, texts and labels of one setting at one layer."""
    made = make_probe_data("ill", size.n_rows, size.n_features, size.n_problems)
    rng = np.random.default_rng(2)
    _, first, count = np.unique(made.problem, return_index=True, return_counts=True)
    index = np.arange(size.n_rows) - first[made.problem]
    n_sentences = count[made.problem]
    # 5th, 50th and 95th percentile of published traces: 6, 19 and 56 tokens
    n_tokens = np.exp(rng.normal(np.log(19), 0.66, size.n_rows)).round().astype(np.int64)
    n_tokens = np.clip(n_tokens, 2, 200)
    relative = index / np.maximum(n_sentences - 1, 1)
    before = np.cumsum(n_tokens) - n_tokens
    before -= before[first][made.problem]
    return ProbeData(
        labels=labels_of(made.problem, index, n_sentences, made.importance),
        texts=texts_of(size.n_rows, rng),
        position=np.column_stack([index, n_sentences, relative, n_tokens]).astype(np.float32),
        causal_position=np.column_stack([index, before, n_tokens]).astype(np.float32),
        activations={"mean": made.features.astype(np.float16).astype(np.float32)},
        tokens=token_sets(made.features, n_tokens, rng),
    )


def token_sets(
    means: NDArray[np.float32], n_tokens: NDArray[np.int64], rng: np.random.Generator
) -> TokenSets:
    """Draw states around the sentences' means, as the store keeps them: float16."""
    spread = np.float32(means.std(axis=0).mean())
    values = np.empty((int(n_tokens.sum()), means.shape[1]), np.float16)
    offsets = np.concatenate([[0], np.cumsum(n_tokens)]).astype(np.int64)
    for row, mean in enumerate(means):
        noise = rng.standard_normal((n_tokens[row], means.shape[1]), dtype=np.float32)
        values[offsets[row] : offsets[row + 1]] = mean + spread * noise
    return TokenSets(values, offsets)


def labels_of(
    problem: NDArray[np.int64], index: NDArray[np.int64], count: NDArray[np.int64], signal: Floats
) -> pl.DataFrame:
    """Make labels of heavy tails, 30 % of them zero, as noisy as the published ones are."""
    noise = np.random.default_rng(3).standard_normal(len(signal)) * signal.std()
    signal = np.sqrt(RELIABILITY) * signal + np.sqrt(1 - RELIABILITY) * noise
    heavy = np.sign(signal) * np.maximum(np.abs(signal) - np.quantile(np.abs(signal), 0.3), 0) ** 2
    importance = np.clip(heavy / np.abs(heavy).max(), -1, 1)
    columns = {
        "problem_id": problem,
        "sentence_idx": index,
        "n_sentences": count,
        "function_tag": ["unknown"] * len(problem),
        "importance_signed": importance,
        "importance_abs": np.abs(importance),
        "is_anchor": np.zeros(len(problem), bool),
        "label_status": ["measured"] * len(problem),
    }
    schema = schema_of(LABELS)
    frame = pl.DataFrame(
        {name: columns.get(name, [None] * len(problem)) for name in schema.names()}
    )
    return frame.cast(dict(schema.items()))  # type: ignore[arg-type]


class Kind(NamedTuple):
    """Fits of one kind of probe in one view of the rows."""

    name: str
    view: View
    fits: list[Fit]


def lay_out(study: Study, n_seeds: int) -> tuple[list[Kind], int]:
    """Return what the slice fits, by kind and view, and its number of configurations."""
    assert study.sweep is not None
    space = SweepSpace(study.sweep, study)
    site, setting = study.sites[0], study.settings[0]
    place = (site.model, site.layer, setting)
    slice_ = [each for each in space.stage1() if (each.model, each.layer, each.setting) == place]
    kinds: dict[tuple[str, View], list[Fit]] = defaultdict(list)
    for swept in recipes_of(space, slice_).values():
        for wanted in wanted_fits(study, swept):
            if wanted.seed in study.seeds[:n_seeds]:
                fit = Fit(wanted.recipe, wanted.seed)
                kinds[swept.template.name, wanted.view].append(fit)
    return [Kind(*key, fits) for key, fits in kinds.items()], len(slice_)


def main() -> None:
    """Run the slice and print what it took, and what the whole would take."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=("float32", "tf32"), default="float32")
    for name, value in {"problems": 20, "rows": 2932, "features": 5120, "seeds": 20}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--seconds", type=float, help="of a kind; default: all seeds run")
    parser.add_argument("--kinds", help="names, with commas; default: all")
    parser.add_argument("--json", type=Path, help="write the figures there")
    options = parser.parse_args()
    study = load_study("studies/sweep.yaml")
    kinds, n_configurations = lay_out(study, options.seeds)
    if options.kinds:
        asked = options.kinds.split(",")
        unknown = sorted(set(asked) - {kind.name for kind in kinds})
        if unknown:
            parser.error(f"no kinds {unknown}; there are {sorted({each.name for each in kinds})}")
        kinds = [kind for kind in kinds if kind.name in asked]
    start = time.perf_counter()
    data = make_data(Size(options.problems, options.rows, options.features))
    assert data.tokens is not None
    name = torch.cuda.get_device_name() if options.device == "cuda" else options.device
    print(
        f"{name}, torch {torch.__version__}, {options.precision}: {len(data.texts):,} sentences x "
        f"{options.features:,}, {len(data.tokens.values):,} tokens, drawn in "
        f"{time.perf_counter() - start:.0f} s\n"
        f"{n_configurations} configurations x {options.problems} folds x {options.seeds} seeds",
        flush=True,
    )
    designs = {
        view: design_of(study, take_rows(data, kept_rows(data, view)))
        for view in {kind.view for kind in kinds}
    }
    n_fits: dict[str, int] = defaultdict(int)
    for kind in kinds:
        n_fits[kind.name] += len(kind.fits)
    ran = []
    for kind in kinds:
        own = None
        if options.seconds is not None:
            own = options.seconds * len(kind.fits) / n_fits[kind.name]
        done = run(designs[kind.view], kind, options.device, options.precision, own)
        ran.append(done)
        print(
            f"{kind.name:28} {'last dropped' if kind.view.drop_last_sentence else 'all rows':13}"
            f"{done.n_models:7,} models {done.n_seeds:3d} of {done.n_asked} seeds "
            f"{done.seconds:8.1f} s {1e3 * done.seconds / done.n_models:9.2f} ms a model, "
            f"{done.n_iter / done.n_models:6.1f} epochs or steps",
            flush=True,
        )
    figures = summary(study, ran, options, n_configurations)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def design_of(study: Study, data: ProbeData) -> Design:
    """Lay out the folds of the study on synthetic problems."""
    folds = make_folds(data.problems, study.splits, present=data.problems)
    return Design(data, tuple(folds), study.splits, study.labels)


class Ran(NamedTuple):
    """What one kind took in one view: seeds run and asked for, models, their epochs or steps."""

    name: str
    seconds: float
    n_seeds: int
    n_asked: int
    n_models: int
    n_iter: int


def run(
    design: Design, kind: Kind, device: str, precision: Precision, seconds: float | None
) -> Ran:
    """Fit one kind, as many seeds as its seconds allow (None: all)."""
    seeds = sorted({fit.seed for fit in kind.fits})
    step = len(seeds) if seconds is None else SEEDS_AT_ONCE
    n_models = n_iter = n_seeds = 0
    start = time.perf_counter()
    for first in range(0, len(seeds), step):
        begin = time.perf_counter()
        block = seeds[first : first + step]
        fits = [fit for fit in kind.fits if fit.seed in block]
        for _, found in fit_batches(design, fits, device, keep_probes=False, precision=precision):
            assert found.scores.height
            n_models += len(found.n_iter)
            n_iter += int(found.n_iter.sum())
        if device == "cuda":
            torch.cuda.synchronize()
        n_seeds += len(block)
        now = time.perf_counter()
        if seconds is not None and 2 * now - begin - start > seconds:
            break
    return Ran(kind.name, time.perf_counter() - start, n_seeds, len(seeds), n_models, n_iter)


def summary(
    study: Study, ran: list[Ran], options: argparse.Namespace, n_configurations: int
) -> dict[str, object]:
    """Print the slice's share, its seconds, and those of the whole stage."""
    assert study.sweep is not None
    space = SweepSpace(study.sweep, study)
    every = space.stage1()
    n_loop = sum(len(uses_of(space, each)) for each in every)
    n_loop *= options.problems * len(study.seeds)
    n_places = len({(each.model, each.layer, each.setting) for each in every})
    stochastic = {recipe.name for recipe in study.probes.recipes if recipe.is_stochastic}
    by_name: dict[str, list[Ran]] = defaultdict(list)
    for each in ran:
        by_name[each.name].append(each)
    # Deterministic kinds are solved once whatever the seeds, so only the others are scaled.
    whole = {
        name: n_places
        * sum(
            each.seconds * (len(study.seeds) / each.n_seeds if name in stochastic else 1)
            for each in parts
        )
        for name, parts in by_name.items()
    }
    n_seeds = min((each.n_seeds for each in ran if each.name in stochastic), default=0)
    trained = None if options.kinds else n_configurations * options.problems * n_seeds
    all_trained = len(every) * options.problems * len(study.seeds)
    of_all = f"only {options.kinds}, no share of the configurations"
    if trained is not None:
        share = f"{trained / all_trained:.1%}"
        of_all = f"{trained:,} of {all_trained:,} configuration-fold-seeds ({share})"
    hours, n_models = sum(whole.values()) / 3600, sum(each.n_models for each in ran)
    print(
        f"\nslice: {of_all}, {n_models:,} models, {sum(each.seconds for each in ran):.0f} s, "
        f"{n_models / sum(each.seconds for each in ran):.1f} models a second\n"
        f"a loop over configurations would fit {n_loop:,} models in all\n"
        f"all of stage 1 at this rate, {n_places} pairs of setting and layer: "
        f"{hours:.2f} h; {hours / 2:.2f} h where forced answers repeat the plain ones"
    )
    for name, took in sorted(whole.items(), key=lambda each: -each[1]):
        parts = by_name[name]
        mean = sum(each.n_iter for each in parts) / sum(each.n_models for each in parts)
        print(f"  {name:28} {took / 3600:7.3f} h {took / 3600 / hours:6.1%}, {mean:.1f} a model")
    peak = torch.cuda.max_memory_allocated() / 2**30 if options.device == "cuda" else None
    if peak is not None:
        print(f"peak device memory {peak:.1f} GiB")
    return {
        "ran": [each._asdict() for each in ran],
        "whole_hours": {name: took / 3600 for name, took in whole.items()},
        "trained": trained,
        "share": None if trained is None else trained / all_trained,
        "peak_gib": peak,
    }


if __name__ == "__main__":
    main()
