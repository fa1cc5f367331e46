"""The study: the one configuration that names everything a result depends on.

    source ─► document ─► config          YAML text ─► values with lines ─► frozen models
                             └─ wording   what pydantic found ─► faults in plain words

`targets` and `estimators` are the registries that all later stages read. `schema` (the JSON schema
for editors) stands beside them and is imported by its own name.
"""

from taprobe_core.study.config import (
    DEFAULT_RECIPES,
    Checkpoint,
    Deferral,
    DemoCheckpoint,
    DemoSource,
    Evaluation,
    HubSource,
    Labels,
    Layers,
    MirrorSource,
    Model,
    PolicySource,
    PretrainedCheckpoint,
    ProbeRecipe,
    Probes,
    Rollouts,
    Source,
    Spans,
    Splits,
    StandInCheckpoint,
    Study,
    Sweep,
    TokenProbe,
    resolve_folder,
)
from taprobe_core.study.controls import (
    ANY_ANCHOR_PROBE,
    ANY_LINEAR_PROBE,
    ControlRecipe,
    Selectivity,
)
from taprobe_core.study.estimators import ESTIMATORS, Estimator, EstimatorEntry
from taprobe_core.study.parts import SPEED_ONLY, Activations, Attention, Pooling, Storage
from taprobe_core.study.probes import Precision
from taprobe_core.study.source import load_study, parse_study, shipped_studies
from taprobe_core.study.targets import TARGETS, Target, TargetEntry
from taprobe_core.study.waivers import CheckName, Waiver, checked_dimensions

__all__ = [
    "ANY_ANCHOR_PROBE",
    "ANY_LINEAR_PROBE",
    "DEFAULT_RECIPES",
    "ESTIMATORS",
    "SPEED_ONLY",
    "TARGETS",
    "Activations",
    "Attention",
    "CheckName",
    "Checkpoint",
    "ControlRecipe",
    "Deferral",
    "DemoCheckpoint",
    "DemoSource",
    "Estimator",
    "EstimatorEntry",
    "Evaluation",
    "HubSource",
    "Labels",
    "Layers",
    "MirrorSource",
    "Model",
    "PolicySource",
    "Pooling",
    "Precision",
    "PretrainedCheckpoint",
    "ProbeRecipe",
    "Probes",
    "Rollouts",
    "Selectivity",
    "Source",
    "Spans",
    "Splits",
    "StandInCheckpoint",
    "Storage",
    "Study",
    "Sweep",
    "Target",
    "TargetEntry",
    "TokenProbe",
    "Waiver",
    "checked_dimensions",
    "load_study",
    "parse_study",
    "resolve_folder",
    "shipped_studies",
]
