"""What a study is and will cost before anything runs: cells, passes, bytes and seconds.

Counts come from the store where a stage has run, else from stated assumptions; operations from the
dimensions in the checkpoint's configuration, else from the width of the model alone; every row says
which. The device's rate is measured with random values of the models' shapes.

Invariant: no weights are fetched or loaded here. To tell what is present already, a hub revision is
resolved, a tokenizer and a `config.json` are fetched; without a network the assumptions stand in.
The whole study is forecast, whether or not part of it is there already.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import polars as pl

from taprobe_core.activations.cost import (
    attention_bytes,
    attention_scores_flop,
    bytes_of,
    expected_seconds,
    pass_flop,
)
from taprobe_core.activations.gemm_rate import BlockShape, is_known
from taprobe_core.checkpoints import pick_devices
from taprobe_core.checkpoints.resolve import checkpoint_config
from taprobe_core.errors import ConfigError, ModelError, ModelMissingError, TaprobeError
from taprobe_core.pipeline.plan import Plan
from taprobe_core.pipeline.sources import NO_BOS
from taprobe_core.study import PretrainedCheckpoint, resolve_folder


def plan_summary(plan: Plan) -> dict[str, Any]:
    """What a run would do.

    Returns:
        `stages`: per stage the number of cells and how many are present at today's fingerprint
        (null when it cannot be told here, for example offline; `note` says why). `models`: per
        model its checkpoint, layers and whether its files are on this machine.
    """
    return {
        "study": plan.study.name,
        "data_root": str(plan.data_root),
        "stages": [_stage_summary(plan, stage) for stage in plan.stages.of(plan.study)],
        "models": [_model_summary(plan, model) for model in plan.study.models],
    }


def _stage_summary(plan: Plan, stage: str) -> dict[str, Any]:
    cells = plan.stages.cells(plan.study, stage)
    try:
        n_present = sum(plan.is_complete(stage, cell) for cell in cells)
        note = None
    except TaprobeError as error:
        n_present, note = None, error.what
    return {"stage": stage, "n_cells": len(cells), "n_present": n_present, "note": note}


def _model_summary(plan: Plan, model: str) -> dict[str, Any]:
    spec = plan.model(model)
    summary: dict[str, Any] = {
        "model": model,
        "checkpoint": spec.checkpoint.description,
        "n_layers": spec.n_layers,
        "layers_read": len(spec.layer_indices),
        "deepest_layer": max(spec.layer_indices),
        "dtype": spec.dtype,
    }
    try:
        summary["tokenizer"] = plan.checkpoint(model)["tokenizer_sha256"][:12]
        summary["bos"] = plan.bos_token(model) or NO_BOS
        summary["is_present"] = True
        summary["note"] = None
    except TaprobeError as error:
        summary["tokenizer"] = summary["bos"] = None
        summary["is_present"] = False
        summary["note"] = error.what
    return summary


@dataclass(frozen=True)
class Speed:
    """What the study's devices do.

    Attributes:
        device: their kind; what the study says, when this machine lacks it or nobody asked.
        n_devices: how many share the work.
        gemm_rates: by model, measured FLOP/s of one device; models that were not measured are not
            in it.
        note: why nothing can be measured here; None when it can.
    """

    device: str
    n_devices: int = 1
    gemm_rates: Mapping[str, float] = field(default_factory=dict)
    note: str | None = None


def measure_speed(
    plan: Plan, shapes: Mapping[str, BlockShape], *, is_measured: bool = True
) -> Speed:
    """Find the study's devices and measure one of them, once for each shape and number type.

    Args:
        plan: the plan.
        shapes: by model; models without one are left out.
        is_measured: False only looks whether the devices are there that the study names.
    """
    named = plan.study.activations.device
    if not is_measured and named in {"auto", "cpu"}:
        return Speed(named)  # every machine has one: torch, which takes seconds, need not be asked
    try:
        devices = pick_devices(named)
    except ConfigError as error:
        return Speed(named, note=error.what)
    if not is_measured:
        return Speed(devices[0].type, len(devices))
    import torch

    from taprobe_core.activations.gemm_rate import sustained_gemm_rate

    rates: dict[tuple[BlockShape, str], float] = {}
    by_model: dict[str, float] = {}
    for model, shape in shapes.items():
        dtype = plan.model(model).dtype
        if (shape, dtype) not in rates:
            rates[shape, dtype] = sustained_gemm_rate(devices[0], getattr(torch, dtype), shape)
        by_model[model] = rates[shape, dtype]
    return Speed(devices[0].type, len(devices), by_model)


PUBLISHED_PROBLEMS = 20
"""Problems per model and setting in the published dataset."""


@dataclass(frozen=True)
class Assumptions:
    """What to assume of rollouts that have not been read.

    The defaults are medians of the published dataset: 150 sentences a problem, 22 tokens a
    sentence.
    """

    sentences_per_problem: int = 150
    tokens_per_sentence: int = 22


class TextSize(NamedTuple):
    """Lengths of one text.

    Attributes:
        n_tokens: what the model reads.
        n_sentences: sentences.
        n_in_sentences: tokens of its sentences; a token of two sentences counts twice.
    """

    n_tokens: int
    n_sentences: int
    n_in_sentences: int


class ModelShape(NamedTuple):
    """Dimensions of a model's blocks.

    Attributes:
        block: None when not even the width is known.
        is_exact: whether the checkpoint's configuration says them; otherwise they are taken from
            the width, by `BlockShape.assumed`.
    """

    block: BlockShape | None
    is_exact: bool


def forecast(
    plan: Plan,
    assumptions: Assumptions,
    shapes: Mapping[str, ModelShape] | None = None,
    speed: Speed | None = None,
) -> pl.DataFrame:
    """Forecast extraction and storage for each model and setting.

    Args:
        plan: the plan.
        assumptions: of rollouts that have not been read.
        shapes: from `model_shapes`; None finds them.
        speed: from `measure_speed`; None leaves the seconds out.

    Returns:
        One row per model and setting, null where it cannot be told: n_problems, n_sentences,
        n_tokens (what the model reads), basis (`measured` or `assumed`, of the counts), n_layers
        (requested), d_model, flop_basis (`exact`, or `12 d_model^2`), tera_flop (one pass of each
        text through the deepest requested layer), attention_tera_flop (vertical attention comes on
        top), expected_compute_s (of both, at the speed of this device; loading and writing come on
        top), `<pooling>_mib` for each pooling of the study, tokens_mib (all tokens of the
        sentences, kept or not), attention_mib, kept_mib (what the study keeps in all).
    """
    shapes = shapes or model_shapes(plan)
    rows = [
        _row(plan, model, setting, assumptions, shapes[model], speed)
        for model in plan.study.models
        for setting in plan.study.settings
    ]
    return pl.DataFrame(rows, infer_schema_length=None)


def _row(
    plan: Plan,
    model: str,
    setting: str,
    assumptions: Assumptions,
    shape: ModelShape,
    speed: Speed | None,
) -> dict[str, Any]:
    layers = plan.model(model).layer_indices
    measured = _measured(plan, model, setting)
    texts = _assumed(plan, assumptions) if measured is None else measured
    flop, attention_flop = _flop(plan, layers, texts, shape.block)
    return {
        "model": model,
        "setting": setting,
        "n_problems": len(texts),
        "n_sentences": sum(text.n_sentences for text in texts),
        "n_tokens": sum(text.n_tokens for text in texts),
        "basis": "assumed" if measured is None else "measured",
        "n_layers": len(layers),
        "d_model": shape.block.d_model if shape.block else None,
        "flop_basis": ("exact" if shape.is_exact else "12 d_model^2") if shape.block else None,
        "tera_flop": None if flop is None else flop / 1e12,
        "attention_tera_flop": None if attention_flop is None else attention_flop / 1e12,
        "expected_compute_s": _seconds(model, flop, attention_flop, speed),
        **_sizes(plan, len(layers), texts, shape.block),
    }


def _flop(
    plan: Plan, layers: Sequence[int], texts: Sequence[TextSize], block: BlockShape | None
) -> tuple[int, int] | tuple[None, None]:
    """Operations of the passes, and of vertical attention beside them."""
    attention = plan.study.attention
    if block is None:
        return None, None
    lengths = [text.n_tokens for text in texts]
    flop = pass_flop(block, lengths, max(layers) + 1)
    if attention.mode == "off":
        return flop, 0
    n_queries = attention.last_n if attention.mode == "light" else None
    n_sentences = [text.n_sentences for text in texts]
    return flop, attention_scores_flop(
        block, lengths, n_sentences, len(layers), n_queries=n_queries
    )


def _seconds(
    model: str, flop: int | None, attention_flop: int | None, speed: Speed | None
) -> float | None:
    rate = speed.gemm_rates.get(model) if speed else None
    if flop is None or attention_flop is None or speed is None or rate is None:
        return None
    return expected_seconds(flop + attention_flop, rate, speed.device, speed.n_devices)


def _sizes(
    plan: Plan, n_layers: int, texts: Sequence[TextSize], block: BlockShape | None
) -> dict[str, float | None]:
    study, attention = plan.study.activations, plan.study.attention
    names = [*study.poolings, *({"tokens"} - {*study.poolings})]
    if block is None:
        return dict.fromkeys([*(f"{name}_mib" for name in names), "attention_mib", "kept_mib"])
    per_layer = n_layers / 2**20
    mib = {
        name: per_layer
        * sum(
            bytes_of(name, text.n_sentences, text.n_in_sentences, block.d_model, study.storage)
            for text in texts
        )
        for name in names
    }
    mib["attention"] = per_layer * sum(
        attention_bytes(attention.mode, block.n_heads, text.n_sentences, attention.last_n)
        for text in texts
    )
    kept = sum(mib[name] for name in (*study.poolings, "attention"))
    return {**{f"{name}_mib": size for name, size in mib.items()}, "kept_mib": kept}


def model_shapes(plan: Plan) -> dict[str, ModelShape]:
    """Return the dimensions of each model's blocks, as far as they can be told without weights."""
    return {model: _shape(plan, model) for model in plan.study.models}


def _shape(plan: Plan, model: str) -> ModelShape:
    spec = plan.model(model)
    checkpoint = spec.checkpoint
    try:
        if isinstance(checkpoint, PretrainedCheckpoint) and not _is_folder(checkpoint.path):
            _wait_once(plan, model)
        config = checkpoint_config(spec)
    except TaprobeError:
        block = BlockShape.assumed(spec.d_model) if spec.d_model else None
        return ModelShape(block, is_exact=False)
    return ModelShape(BlockShape.of(config), is_known(config))


def _wait_once(plan: Plan, model: str) -> None:
    """Raise if a hub was found unreachable: a plan asks once, and one wait is enough."""
    try:
        plan.checkpoint(model)
    except ModelMissingError:
        raise
    except ModelError:
        return  # of its tokenizer, which the blocks do not depend on


def _is_folder(path: str) -> bool:
    return resolve_folder(path).is_dir()


def _measured(plan: Plan, model: str, setting: str) -> list[TextSize] | None:
    try:
        artifact = plan.store.find(plan.key("spans", (model, setting)))
    except TaprobeError:
        return None  # no source or no tokenizer here: the assumptions say so in their row
    if artifact is None:
        return None
    texts, spans = artifact.read_table("texts.parquet"), artifact.read_table("spans.parquet")
    by_problem = spans.group_by("problem_id").agg(pl.len(), n_in_sentences=pl.sum("n_tokens"))
    joined = texts.join(by_problem, on="problem_id", how="left", validate="1:1")
    rows = joined.select("n_tokens", "len", "n_in_sentences").fill_null(0).iter_rows()
    return [TextSize(*map(int, row)) for row in rows]


def _assumed(plan: Plan, assumptions: Assumptions) -> list[TextSize]:
    rollouts = plan.study.rollouts
    known = getattr(rollouts.source, "n_problems", PUBLISHED_PROBLEMS)  # the demo states it
    n_problems = len({*(rollouts.problem_ids or ())} - {*rollouts.exclude_ids}) or known
    n_problems = min(n_problems, rollouts.max_problems or n_problems)
    n_sentences = assumptions.sentences_per_problem
    n_tokens = n_sentences * assumptions.tokens_per_sentence
    return [TextSize(n_tokens, n_sentences, n_tokens)] * n_problems
