"""What a run of a study would do: which cells are there, and which models are on this machine.

No weights are fetched or loaded; to tell what is present, a hub revision is resolved and a
tokenizer fetched. What it costs belongs in `forecast`.
"""

from __future__ import annotations

from typing import Any

from taprobe_core.errors import TaprobeError
from taprobe_core.pipeline.plan import Plan
from taprobe_core.pipeline.sources import NO_BOS


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
