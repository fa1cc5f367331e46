"""`taprobe check`: what a study costs, what it leaves out, what checks and verdicts say.

In: rows of a forecast, of `pipeline.skips`, of verdicts. Out: things to print, escaped. A table
fits into 80 columns; what is left out of it is in the JSON. What does not belong here: any
computation beyond adding up rows, and the commands (`app`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import polars as pl
from rich import box
from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table

from taprobe_core.activations.cost import EFFICIENCY, bytes_text, duration_text, flop_text
from taprobe_core.pipeline.forecast import Assumptions, Speed
from taprobe_core.pipeline.sources import NO_BOS
from taprobe_core.store import Acceptance, PinnedSource, PinVerdict, Verdict
from taprobe_core.study import Activations, Attention


def render_skips(skipped: pl.DataFrame, shown: int, *, is_fatal: bool = False) -> Iterator[str]:
    """Yield a heading and a line per problem; nothing where none is left out."""
    if skipped.is_empty():
        return
    what = (
        "stop the run (set rollouts.on_bad_problem: skip to leave them out)"
        if is_fatal
        else "left out"
    )
    yield f"[bold yellow]{len(skipped)} problem(s) {what}[/]"
    for row in skipped.head(shown).iter_rows(named=True):
        place = f"{row['model']}, {row['setting']}, problem {row['problem_id']}"
        yield f"  {escape(place)} ({row['stage']}): {escape(row['what'])}"
    if len(skipped) > shown:
        yield f"  ... and {len(skipped) - shown} more: `taprobe check --json` lists them"


def acceptance_line(source: PinnedSource, change: Acceptance) -> str:
    """Say that a change of an input is accepted from now on."""
    old, new = change.old[:12], change.new[:12]
    return escape(f"accepted: {source.noun} {source.root}, {change.name}: {old} is now {new}")


def verify_lines(verdicts: Sequence[Verdict], inputs: Sequence[PinVerdict]) -> Iterator[str]:
    """Yield a line or more for everything that is not sound, then how many there are."""
    changed = [each for each in inputs if each.faults]
    for source in changed:
        yield f"[red]changed[/] {source.noun} {escape(source.where)}"
        yield from (f"  {escape(fault)}" for fault in source.faults)
    unsound = [each for each in verdicts if not each.is_sound]
    for verdict in unsound:
        yield f"[red]unsound[/] {verdict.key}\n  {escape(str(verdict.error))}"
    if changed:
        yield f"{len(inputs)} inputs, {len(inputs) - len(changed)} as they were pinned"
    yield f"{len(verdicts)} artifacts, {len(verdicts) - len(unsound)} sound"


def verify_document(verdicts: Sequence[Verdict], inputs: Sequence[PinVerdict]) -> dict[str, Any]:
    """Return the same as JSON values, for a script; `changed` is there where an input changed."""
    changed = [asdict(each) for each in inputs if each.faults]
    unsound = [each for each in verdicts if not each.is_sound]
    return {
        "n_artifacts": len(verdicts),
        "unsound": [{"artifact": str(each.key), "error": str(each.error)} for each in unsound],
        **({"n_inputs": len(inputs), "changed": changed} if changed else {}),
    }


Row = Mapping[str, Any]
Cell = Callable[[Row], str]

_UNKNOWN = "not known without the checkpoints"


def render_check(
    models: Sequence[Row], rows: pl.DataFrame, speed: Speed, assumptions: Assumptions
) -> Iterator[RenderableType]:
    """Yield what `check` says of the models: each with its cost by setting, then all together."""
    columns: dict[str, Cell] = {
        "texts": lambda row: f"{row['n_problems']:,}",
        "tokens": lambda row: f"{_mark(row)}{row['n_tokens']:,}",
        "operations": _flop,
    }
    if speed.gemm_rates:
        columns["expected"] = lambda row: _seconds(row["expected_compute_s"])
    columns["on disk"] = lambda row: _mib(row["kept_mib"])
    for model in models:
        own = rows.filter(model=model["model"]).to_dicts()
        absent = "" if model["is_present"] else ", not here"
        yield f"[bold]{escape(model['model'])}[/]: {escape(model['checkpoint'])}{absent}"
        bos = ", no BOS" if model["bos"] == NO_BOS else ""
        yield f"{_layers(model, own[0])}, {model['dtype']} on {_device(speed, model['model'])}{bos}"
        yield _table(own, columns)
        yield ""
    yield f"in all: {_total(rows)}"
    if speed.gemm_rates:
        share = round(100 * EFFICIENCY[speed.device])
        yield f"expected: of the passes alone, at {share} % of the measured GEMM rate"
    yield from _legend(
        rows, assumptions, "operations: of unknown blocks, 12 · width² weights and heads of 128"
    )


def render_storage(
    rows: pl.DataFrame, activations: Activations, attention: Attention, assumptions: Assumptions
) -> Iterator[RenderableType]:
    """Yield what `storage` says: for each model the disk use by setting and by what is kept."""
    kept = ", ".join(activations.poolings)
    attended = "" if attention.mode == "off" else f"; attention, {attention.mode}"
    yield f"storage forecast: {kept}{attended}\n"
    pooled = [pooling for pooling in activations.poolings if pooling != "tokens"]
    keeps_tokens = "tokens" in activations.poolings
    columns: dict[str, Cell] = {
        "sentences": lambda row: f"{_mark(row)}{row['n_sentences']:,}",
    }
    if pooled:
        head = pooled[0] if len(pooled) == 1 else f"{len(pooled)} poolings"
        columns[head] = lambda row: _mib(_sum(row[f"{pooling}_mib"] for pooling in pooled))
    columns["tokens" if keeps_tokens else "(tokens)"] = lambda row: (
        _mib(row["tokens_mib"]) if keeps_tokens else f"({_mib(row['tokens_mib'])})"
    )
    if attention.mode != "off":
        columns["attention"] = lambda row: _mib(row["attention_mib"])
    columns["in all"] = lambda row: _mib(row["kept_mib"])
    for model in rows["model"].unique(maintain_order=True):
        own = rows.filter(model=model).to_dicts()
        width = f", {own[0]['d_model']:,} wide" if own[0]["d_model"] else ""
        layers = f"{own[0]['n_layers']} layer{'s' * (own[0]['n_layers'] != 1)}"
        yield f"[bold]{escape(model)}[/]: {layers}{width}, {activations.storage}"
        yield _table(own, columns)
        yield ""
    size = _sum(rows["kept_mib"])
    yield f"in all: {_UNKNOWN if size is None else _mib(size)}"
    if not keeps_tokens:
        yield "(tokens): the states of all tokens, not kept by this study"
    of_blocks = None if attention.mode == "off" else "attention: of unknown blocks, heads of 128"
    yield from _legend(rows, assumptions, of_blocks)


def _layers(model: Row, row: Row) -> str:
    width = f", {row['d_model']:,} wide" if row["d_model"] else ""
    depth, n_read, deepest = model["n_layers"], model["layers_read"], model["deepest_layer"]
    if n_read == depth:
        return f"all {depth} layers{width}"
    which = f"layer {deepest} of {depth}" if n_read == 1 else f"{n_read} of {depth} layers"
    return which + ("" if n_read == 1 else f" (to {deepest})") + width


def _device(speed: Speed, model: str) -> str:
    if speed.device == "auto":
        return "the first device of cuda, mps, cpu"
    name = f"{speed.n_devices} × {speed.device}" if speed.n_devices > 1 else speed.device
    rate = speed.gemm_rates.get(model)
    if rate is None:
        return name
    return f"{name}: {flop_text(rate)}/s measured{' on one' if speed.n_devices > 1 else ''}"


def _table(rows: Sequence[Row], columns: Mapping[str, Cell]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    table.add_column("setting", overflow="fold")
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(row["setting"], *(cell(row) for cell in columns.values()))
    return table


def _mark(row: Row) -> str:
    return "~" if row["basis"] == "assumed" else ""


def _flop(row: Row) -> str:
    if row["tera_flop"] is None or row["attention_tera_flop"] is None:
        return "-"
    mark = "~" if row["basis"] == "assumed" or row["flop_basis"] != "exact" else ""
    return mark + flop_text(1e12 * (row["tera_flop"] + row["attention_tera_flop"]))


def _seconds(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return duration_text(seconds) if seconds >= 1 else "under 1 s"


def _mib(mib: float | None) -> str:
    return "-" if mib is None else bytes_text(mib * 2**20)


def _sum(values: Any) -> float | None:
    """Add up; what is not known makes the sum unknown."""
    each = list(values)
    return None if None in each else sum(each)


def _total(rows: pl.DataFrame) -> str:
    flop = _sum(rows["tera_flop"] + rows["attention_tera_flop"])
    seconds, size = _sum(rows["expected_compute_s"]), _sum(rows["kept_mib"])
    parts = [
        _UNKNOWN if flop is None else flop_text(1e12 * flop),
        None if seconds is None else f"{_seconds(seconds)} expected",
        None if size is None else f"{_mib(size)} on disk",
    ]
    return ", ".join(part for part in parts if part)


def _legend(rows: pl.DataFrame, assumptions: Assumptions, of_blocks: str | None) -> Iterator[str]:
    if "assumed" in rows["basis"]:
        yield (
            f"~: assumed, {assumptions.sentences_per_problem} sentences a text and "
            f"{assumptions.tokens_per_sentence} tokens a sentence"
        )
    if of_blocks and "12 d_model^2" in rows["flop_basis"]:
        yield of_blocks
