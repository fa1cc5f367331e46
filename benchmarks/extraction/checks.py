"""What a speed table does not show: packs, a finer reference, poolings, attention, several devices.

Each check returns a title, a table and what it measured. All of them go through the engine's public
entry and the same functions on every device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from benchmarks.extraction.agreement import relative
from benchmarks.extraction.ours import Ours
from benchmarks.extraction.reading import ids_of
from benchmarks.extraction.shapes import Shape, copy_base
from benchmarks.extraction.tables import render
from benchmarks.extraction.texts import Text, make_text
from benchmarks.extraction.timing import Job, Seconds, clean, timed
from taprobe_core.activations.extraction import extract
from taprobe_core.activations.packing import plan_packs
from taprobe_core.activations.tasks import ExtractOptions
from taprobe_core.attention.mode import AttentionMode
from taprobe_core.study.parts import Pooling

POOLINGS: tuple[Pooling, ...] = ("mean", "last", "max", "boundary")
N_FINE = 4


class Check(NamedTuple):
    """A table under a title, and its figures."""

    title: str
    table: str
    figures: Any


def first_pass(ours: Ours, text: Text, job: Job, folder: Path) -> Check:
    """Time a text's first pass in the process, which compiles kernels, and a second."""
    figures = []
    for _ in range(2):
        with clean(folder) as place:
            _, seconds = timed(ours.device, partial(ours.run, [text], job, place))
        figures.append(seconds.wall)
    rows = [["first", f"{figures[0]:.2f}"], ["second", f"{figures[1]:.2f}"]]
    title = f"First pass of the process, {len(text)} tokens (compiles; in no other table)"
    return Check(title, render(["pass", "wall s"], rows), figures)


def packs(ours: Ours, texts: Sequence[Text], job: Job, folder: Path) -> Check:
    """Compare one text's rows alone, again, in two packs at two places, and in the usual packs.

    Packs hold the longest text first, so a text is first beside shorter ones and last beside longer
    ones.
    """
    ordered = sorted(texts, key=len)
    text = ordered[len(ordered) // 2]
    at = ordered.index(text)
    settings: list[tuple[str, list[Text], int | None]] = [
        ("alone, again", [text], 1),
        ("first of a pack, beside shorter texts", ordered[max(0, at - 2) : at + 1], -1),
        ("last of another pack, beside longer texts", ordered[at : at + 3], -1),
        ("in the packs of the whole job", list(texts), None),
    ]
    job = job._replace(is_checked=True)

    def rows_of(group: list[Text], budget: int | None) -> dict[int, torch.Tensor]:
        budget = sum(map(len, group)) if budget == -1 else budget
        rows = ours.run(group, job, folder, is_written=False, token_budget=budget)
        return rows[text.problem_id]

    alone = rows_of([text], 1)
    figures, lines = [], []
    for name, group, budget in settings:
        found = rows_of(group, budget)
        is_equal = all(torch.equal(found[layer], alone[layer]) for layer in alone)
        worst = max(relative(found[layer], alone[layer]) for layer in alone)
        figures.append({"setting": name, "bit_equal": is_equal, "worst": worst})
        lines.append([name, "yes" if is_equal else "no", f"{worst:.1e}", ""])
    head = ["setting", "bit-equal", "max|d|/rms", ""]
    title = (
        f"One text ({len(text)} tokens, {len(alone)} layers, float32 means) against itself alone"
    )
    return Check(title, render(head, lines), figures)


def finer(causal: Any, ours: Ours, shape: Shape, texts: Sequence[Text], folder: Path) -> Check:
    """Compare the first layers with the same weights in a finer type, by pooling.

    float32 for half-precision weights, float64 for float32 ones (where the library keeps its norms
    and rotary angles in float32). The library's own states, in the model's type, stand beside ours.
    """
    n_layers = min(N_FINE, shape.n_layers - 1)
    dtype = "float64" if shape.dtype == "float32" else "float32"
    fine = copy_base(causal, replace(shape, n_layers=n_layers + 1, dtype=dtype), ours.device)
    job = Job("", tuple(range(n_layers)), is_pooled=True, is_checked=True)
    worst: dict[tuple[str, str], float] = {}
    with torch.inference_mode():
        for text in texts:
            expected = _pooled(fine, text, job.layers)
            library = _pooled(causal.model, text, job.layers)
            for pooling in POOLINGS:
                run = ours.run([text], job, folder, is_written=False, poolings=(pooling,))
                for name, found in (("ours", run[text.problem_id]), ("HF", library[pooling])):
                    key = name, pooling
                    for layer in job.layers:
                        each = relative(found[layer], expected[pooling][layer])
                        worst[key] = max(worst.get(key, 0.0), each)
    rows = [
        [name, *(f"{worst[name, pooling]:.1e}" for pooling in POOLINGS), ""]
        for name in ("ours", "HF")
    ]
    title = (
        f"Largest difference over rms from {dtype} weights, layers 0-{n_layers - 1}, "
        f"{len(texts)} texts, model in {shape.dtype}"
    )
    figures = {f"{name} {pooling}": value for (name, pooling), value in worst.items()}
    return Check(title, render(["states", *POOLINGS, ""], rows), figures)


def _pooled(base: Any, text: Text, layers: Sequence[int]) -> dict[str, dict[int, torch.Tensor]]:
    """Poolings of a base model's hidden states, a sentence at a time, in the finest type."""
    output = base(input_ids=ids_of(text, base.device), use_cache=False, output_hidden_states=True)
    found: dict[str, dict[int, torch.Tensor]] = {pooling: {} for pooling in POOLINGS}
    for layer in layers:
        states = output.hidden_states[layer + 1][0].double()
        found["mean"][layer] = torch.stack([states[a:b].mean(0) for a, b in text.spans])
        found["last"][layer] = torch.stack([states[b - 1] for _, b in text.spans])
        found["max"][layer] = torch.stack([states[a:b].amax(0) for a, b in text.spans])
        found["boundary"][layer] = torch.stack([states[a - 1] for a, _ in text.spans])
    return found


def poolings(ours: Ours, texts: Sequence[Text], job: Job, middle: int, folder: Path) -> Check:
    """Time the job with one pooling, with all row poolings, and with the tokens of one layer."""
    one = job._replace(layers=(middle,))
    settings: list[tuple[str, Job, tuple[Pooling, ...]]] = [
        ("mean, all layers", job, ("mean",)),
        ("mean, last, max, boundary, all layers", job, POOLINGS),
        ("mean, middle layer", one, ("mean",)),
        ("all five with tokens, middle layer", one, (*POOLINGS, "tokens")),
    ]
    lines, figures = [], []
    for name, each, kinds in settings:
        with clean(folder) as place:
            _, seconds = timed(ours.device, partial(ours.run, texts, each, place, poolings=kinds))
            n_bytes = sum(path.stat().st_size for path in place.rglob("*.safetensors"))
        figures.append({"setting": name, "seconds": seconds._asdict(), "n_bytes": n_bytes})
        lines.append(
            [name, f"{seconds.wall:.2f}", f"{seconds.cpu:.2f}", f"{n_bytes / 1e6:,.0f}", ""]
        )
    head = ["poolings, rows on disk", "wall s", "cpu s", "MB", ""]
    return Check(f"Poolings, {len(texts)} texts, one run each", render(head, lines), figures)


def attention(models: Sequence[nn.Module], shape: Shape, seed: int, n_tokens: int) -> Check:
    """Time and memory of full vertical attention at every layer, beside the same pass without."""
    device = next(models[0].parameters()).device
    text = make_text(shape, seed, n_tokens)
    layers = tuple(range(shape.n_layers))
    settings = [
        ("off", (), AttentionMode("off")),
        ("light, last 4 tokens", layers, AttentionMode("light")),
        ("full", layers, AttentionMode("full")),
    ]
    lines, figures = [], []
    for name, watched, mode in settings:
        options = ExtractOptions(attention=mode)
        task = text.task(layers, watched)

        def work(task: Any = task, options: Any = options) -> int:
            found = list(extract(models, [task], options))
            return sum(each.n_bytes for item in found for each in item.attention.values())

        timed(device, work)
        before = _start_memory(device)
        n_bytes, seconds = timed(device, work)
        peak = _peak_memory(device, before)
        figures.append(
            {"mode": name, "seconds": seconds._asdict(), "peak_bytes": peak, "n_bytes": n_bytes}
        )
        extra = None if peak is None else peak - figures[0]["peak_bytes"]
        lines.append([
            name, f"{seconds.wall:.2f}", f"{seconds.cpu:.2f}", _gib(peak), _gib(extra),
            f"{n_bytes / 1e6:,.0f}", "",
        ])  # fmt: skip
    head = ["vertical attention", "wall s", "cpu s", "peak GiB", "extra GiB", "kept MB", ""]
    title = f"Vertical attention, one text of {n_tokens} tokens, {len(layers)} layers, second run"
    return Check(title, render(head, lines), figures)


def _start_memory(device: torch.device) -> int:
    """Forget the peak; return what is allocated now, weights among it."""
    if device.type != "cuda":
        return 0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _peak_memory(device: torch.device, before: int) -> int | None:
    """Most bytes allocated since, beyond those; None where the allocator does not count."""
    return torch.cuda.max_memory_allocated(device) - before if device.type == "cuda" else None


def _gib(n_bytes: int | None) -> str:
    return "-" if n_bytes is None else f"{n_bytes / 2**30:.2f}"


def scaling(
    ours: Ours,
    models: Sequence[nn.Module],
    counts: Sequence[int],
    texts: Sequence[Text],
    job: Job,
    folder: Path,
) -> Check:
    """Time the job on more and more devices, with and without writing.

    A pack is never split, so the last ones leave devices idle: the bound is what the packs allow.
    """
    n_tokens = sum(map(len, texts))
    lines, figures = [], []
    first: dict[bool, float] = {}
    for count in counts:
        for is_written in (True, False):
            seconds = _timed_on(ours.on(models[:count]), texts, job, folder, count, is_written)
            gain = first.setdefault(is_written, seconds.wall) / seconds.wall
            most = bound(texts, models[0], count) / bound(texts, models[0], counts[0])
            name = f"{count} device(s), {'rows on disk' if is_written else 'nothing written'}"
            rates = f"{n_tokens / seconds.wall:,.0f}", f"{gain:.2f}", f"{most:.2f}"
            lines.append([name, f"{seconds.wall:.2f}", f"{seconds.cpu:.2f}", *rates, ""])
            figures.append(
                {"devices": count, "written": is_written, "bound": most, **seconds._asdict()}
            )
    head = ["data parallel", "wall s", "cpu s", "tokens/s", f"x {counts[0]} device(s)", "bound", ""]
    title = f"Several devices, {len(texts)} texts, {n_tokens:,} tokens, {len(job.layers)} layers"
    return Check(title, render(head, lines), figures)


def _timed_on(
    ours: Ours, texts: Sequence[Text], job: Job, folder: Path, n_devices: int, is_written: bool
) -> Seconds:
    warm = texts[: 2 * n_devices]  # one text a pass, so that every device gets some
    ours.run(warm, job, folder, is_written=False, token_budget=1)
    with clean(folder) as place:
        work = partial(ours.run, texts, job, place, is_written=is_written)
        return timed(ours.device, work)[1]


def bound(texts: Sequence[Text], model: nn.Module, n_devices: int) -> float:
    """Return the speed-up that whole packs allow, each given to the device with fewest tokens."""
    lengths = [len(text) for text in texts]
    budget = ExtractOptions().budget_on(next(model.parameters()).device)
    loads = [0] * n_devices
    for pack in plan_packs(lengths, budget):
        lane = loads.index(min(loads))
        loads[lane] += sum(lengths[at] for at in pack)
    return sum(loads) / max(loads)
