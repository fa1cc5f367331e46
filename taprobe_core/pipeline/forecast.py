"""What a study will cost, before it costs anything: cells, tokens, bytes, floating-point work.

Counts come from the store where a stage has run, else from stated assumptions; every row says
which. No weights are fetched or loaded here; to tell what is present already, a hub revision is
resolved and a tokenizer fetched, and without a network the assumptions stand in.

Source: a forward pass takes about 2 · (weights of the blocks) operations a token, and attention
over T tokens 2 · T · d_model a token and layer (Kaplan et al. 2020, section 2.1, causal).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import polars as pl

from taprobe_core.errors import TaprobeError
from taprobe_core.pipeline.cells import STAGES, cells_of, missing_cells
from taprobe_core.pipeline.plan import Plan
from taprobe_core.study import Model

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


def forecast(plan: Plan, assumptions: Assumptions) -> pl.DataFrame:
    """Forecast extraction and storage for each model and setting.

    Returns:
        One row per model and setting: n_problems, n_sentences, n_tokens (what the model reads),
        n_layers (requested), d_model (null when unknown without the checkpoint), basis
        (`measured` or `assumed`), pooled_mib and ragged_mib (one value per token and layer
        instead of per sentence), tera_flop (one pass through the deepest requested layer).
    """
    rows = [
        _row(plan, model, setting, assumptions)
        for model in plan.study.models
        for setting in plan.study.settings
    ]
    return pl.DataFrame(rows, infer_schema_length=None)


def _row(plan: Plan, model: str, setting: str, assumptions: Assumptions) -> dict[str, Any]:
    spec = plan.model(model)
    counts = _measured(plan, model, setting) or _assumed(plan, assumptions)
    n_layers, d_model = len(spec.layer_indices), width(spec)
    n_bytes = 2 if plan.study.activations.storage == "float16" else 4
    per_row = n_layers * (d_model or 0) * n_bytes / 2**20
    return {
        "model": model,
        "setting": setting,
        **counts,
        "n_layers": n_layers,
        "d_model": d_model,
        "pooled_mib": counts["n_sentences"] * per_row if d_model else None,
        "ragged_mib": counts["n_tokens"] * per_row if d_model else None,
        "tera_flop": _tera_flop(spec, d_model, counts) if d_model else None,
    }


def width(model: Model) -> int | None:
    """Width of the residual stream, as the study states it; null when it does not."""
    return getattr(model.checkpoint, "d_model", None) or model.d_model


def _tera_flop(model: Model, d_model: int, counts: dict[str, Any]) -> float:
    """Operations of one pass: blocks of about 12 · d_model² weights, plus attention."""
    depth = max(model.layer_indices) + 1
    per_text = counts["n_tokens"] / max(counts["n_problems"], 1)
    per_token = depth * (24 * d_model**2 + 2 * per_text * d_model)
    return float(counts["n_tokens"] * per_token / 1e12)


def _measured(plan: Plan, model: str, setting: str) -> dict[str, Any] | None:
    try:
        artifact = plan.store.find(plan.spans(model, setting))
    except TaprobeError:
        return None  # no source or no tokenizer here: the assumptions say so in their row
    if artifact is None:
        return None
    texts, spans = artifact.read_table("texts.parquet"), artifact.read_table("spans.parquet")
    return {
        "n_problems": texts.height,
        "n_sentences": spans.height,
        "n_tokens": int(texts["n_tokens"].sum()),
        "basis": "measured",
    }


def _assumed(plan: Plan, assumptions: Assumptions) -> dict[str, Any]:
    rollouts = plan.study.rollouts
    known = getattr(rollouts.source, "n_problems", PUBLISHED_PROBLEMS)  # the demo states it
    n_problems = len(rollouts.problem_ids or ()) or known
    n_problems = min(n_problems, rollouts.max_problems or n_problems)
    n_sentences = n_problems * assumptions.sentences_per_problem
    return {
        "n_problems": n_problems,
        "n_sentences": n_sentences,
        "n_tokens": n_sentences * assumptions.tokens_per_sentence,
        "basis": "assumed",
    }


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
        "stages": [_stage_summary(plan, stage) for stage in STAGES],
        "models": [_model_summary(plan, model) for model in plan.study.models],
    }


def _stage_summary(plan: Plan, stage: str) -> dict[str, Any]:
    cells = cells_of(plan.study, stage)
    try:
        n_present = len(cells) - sum(1 for _ in missing_cells(plan, stage, cells))
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
        "dtype": spec.dtype,
    }
    try:
        summary["tokenizer"] = plan.checkpoint(model)["tokenizer_sha256"][:12]
        summary["is_present"] = True
        summary["note"] = None
    except TaprobeError as error:
        summary["tokenizer"] = None
        summary["is_present"] = False
        summary["note"] = error.what
    return summary
