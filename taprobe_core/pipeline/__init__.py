"""The stages bound to a study and a store: plan keys, run cells, check and describe artifacts.

`stages` is the page to read first.
"""

from taprobe_core.pipeline.cells import (
    cells_of,
    check_stage,
    has_key,
    is_complete,
    is_made,
    key_of,
    missing_cells,
    parents_of,
    stages_of,
)
from taprobe_core.pipeline.data_folder import data_root, open_plan
from taprobe_core.pipeline.export import Export, export_study
from taprobe_core.pipeline.failures import Failure, failure_at, kept_failures
from taprobe_core.pipeline.grid import Cell, CellFilter, dimension_keys
from taprobe_core.pipeline.inputs import read_activations, read_attention, read_probe_data
from taprobe_core.pipeline.plan import Plan
from taprobe_core.pipeline.run import (
    Gate,
    all_stops,
    describe,
    refusal,
    run_stage,
    split_stopped,
    stage_verdicts,
)
from taprobe_core.pipeline.stage import Check, Description, Found, Outcome, Part, Stage
from taprobe_core.pipeline.stages import STAGES
from taprobe_core.pipeline.stages.evaluation import read_evaluation
from taprobe_core.pipeline.stages.probe_fits import read_scores
from taprobe_core.pipeline.verdicts import Verdict, verdicts_of

__all__ = [
    "STAGES",
    "Cell",
    "CellFilter",
    "Check",
    "Description",
    "Export",
    "Failure",
    "Found",
    "Gate",
    "Outcome",
    "Part",
    "Plan",
    "Stage",
    "Verdict",
    "all_stops",
    "cells_of",
    "check_stage",
    "data_root",
    "describe",
    "dimension_keys",
    "export_study",
    "failure_at",
    "has_key",
    "is_complete",
    "is_made",
    "kept_failures",
    "key_of",
    "missing_cells",
    "open_plan",
    "parents_of",
    "read_activations",
    "read_attention",
    "read_evaluation",
    "read_probe_data",
    "read_scores",
    "refusal",
    "run_stage",
    "split_stopped",
    "stage_verdicts",
    "stages_of",
    "verdicts_of",
]
