"""What of a study's inputs cannot be used here: missing, out of reach, or changed.

Asks what a run would ask, before any work. What the inputs are belongs in `sources`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from taprobe_core.checkpoints import check_present
from taprobe_core.errors import TaprobeError
from taprobe_core.pipeline.plan import Plan
from taprobe_core.rollouts import source_files


def input_faults(plan: Plan) -> list[TaprobeError]:
    """Return why inputs of a study cannot be used, each reason once.

    While the plan's pins accept changes (`Pins.is_accepting`), this accepts all of the study's.

    Args:
        plan: the plan.
    """
    study = plan.study
    faults: dict[str, TaprobeError] = {}

    def ask(question: Callable[..., Any], *arguments: Any) -> None:
        try:
            question(*arguments)
        except TaprobeError as error:
            faults.setdefault(str(error), error)

    for model in study.models:
        ask(plan.checkpoint, model)
        ask(plan.special_tokens, model)
        for setting in study.settings:
            ask(plan.dataset_version, model, setting)
    if not faults and _needs_cache(plan):
        for model, spec in study.models.items():
            ask(check_present, plan.model(model))
            for setting in study.settings if study.rollouts.source.kind == "hub" else ():
                ask(source_files, plan.source, spec, study.rollouts, setting)
    return list(faults.values())


def _needs_cache(plan: Plan) -> bool:
    """Whether a run would read files of a hub that only its cache can give."""
    study = plan.study
    kinds = {study.rollouts.source.kind, *(m.checkpoint.kind for m in study.models.values())}
    # The demo and mirrors do not pay for the import of the hub's client.
    return bool(kinds & {"hub", "pretrained"}) and _is_offline() and not _is_complete(plan)


def _is_complete(plan: Plan) -> bool:
    """Whether every cell is there, so that a run would read nothing; no where it cannot be told."""
    try:
        return all(
            plan.is_complete(stage, cell)
            for stage in plan.stages.of(plan.study)
            for cell in plan.stages.cells(plan.study, stage)
        )
    except TaprobeError:
        return False


def _is_offline() -> bool:
    from huggingface_hub import constants

    return constants.is_offline_mode()
