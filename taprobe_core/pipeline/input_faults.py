"""What of a study's inputs cannot be used here: missing, out of reach, or changed.

Asks what a run would ask, before any work. What the inputs are belongs in `sources`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from taprobe_core.checkpoints import check_present
from taprobe_core.errors import TaprobeError
from taprobe_core.pipeline.cells import cells_of, missing_cells, stages_of
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
    if not faults and not _is_complete(plan):
        for model, spec in study.models.items():
            ask(check_present, plan.model(model))
            if study.rollouts.source.kind == "hub" and _is_offline():
                for setting in study.settings:
                    ask(source_files, plan.source, spec, study.rollouts, setting)
    return list(faults.values())


def _is_complete(plan: Plan) -> bool:
    """Whether every cell is there, so that a run would ask for no file of a hub."""
    return not any(
        next(iter(missing_cells(plan, stage, cells_of(plan.study, stage))), None)
        for stage in stages_of(plan.study)
    )


def _is_offline() -> bool:
    from huggingface_hub import constants  # the demo and mirrors should not pay for its import

    return constants.is_offline_mode()
