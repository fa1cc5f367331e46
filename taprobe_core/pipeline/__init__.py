"""The stages bound to a study and a store: plan keys, run cells, check and describe artifacts."""

from taprobe_core.pipeline.attention import read_attention
from taprobe_core.pipeline.cells import (
    DIMENSIONS,
    PARENTS,
    STAGES,
    Cell,
    CellFilter,
    cells_of,
    check_stage,
    dimension_keys,
    has_key,
    is_complete,
    is_made,
    key_of,
    missing_cells,
    parents_of,
    stages_of,
)
from taprobe_core.pipeline.checks import CHECKS, WARNINGS
from taprobe_core.pipeline.describe import describe
from taprobe_core.pipeline.description import Description
from taprobe_core.pipeline.failures import Failure, failure_at, kept_failures
from taprobe_core.pipeline.fit import read_scores
from taprobe_core.pipeline.gate import (
    Gate,
    all_stops,
    failed_cells,
    failed_checks,
    refusal,
    split_stopped,
    stage_verdicts,
)
from taprobe_core.pipeline.inputs import read_activations, read_probe_data
from taprobe_core.pipeline.opening import data_root, open_plan
from taprobe_core.pipeline.outcome import Outcome
from taprobe_core.pipeline.plan import CODE_VERSIONS, Plan
from taprobe_core.pipeline.run import run_stage
from taprobe_core.pipeline.verdicts import Verdict, verdicts_of

__all__ = [
    "CHECKS",
    "CODE_VERSIONS",
    "DIMENSIONS",
    "PARENTS",
    "STAGES",
    "WARNINGS",
    "Cell",
    "CellFilter",
    "Description",
    "Failure",
    "Gate",
    "Outcome",
    "Plan",
    "Verdict",
    "all_stops",
    "cells_of",
    "check_stage",
    "data_root",
    "describe",
    "dimension_keys",
    "failed_cells",
    "failed_checks",
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
    "read_probe_data",
    "read_scores",
    "refusal",
    "run_stage",
    "split_stopped",
    "stage_verdicts",
    "stages_of",
    "verdicts_of",
]
