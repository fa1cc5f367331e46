"""The part of a study that says how recipes are compared.

The statistics themselves belong in `taprobe_core.evaluation.evaluate` and the modules it reads.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from taprobe_core.study.controls import Selectivity
from taprobe_core.study.parts import Count, Seed, StudyPart, distinct

Interval = Literal["bca", "percentile"]
Correction = Literal["holm", "benjamini_hochberg", "none"]

ANY_ACTIVATION_PROBE = "any_activation_probe"
"""Stands for every recipe that reads activations and predicts what the first baseline does:
validation chooses recipe and layer together."""


class Evaluation(StudyPart):
    """How recipes are compared.

    Intervals resample problems `n_bootstrap` times (0: none); `bca` corrects them for bias and
    skewness. `n_null` relabellings of each kind show what a recipe reaches by chance (0: none).
    `planned` names the recipes whose comparisons with the baselines were fixed beforehand; their
    tests are corrected together by `correction`, all others by Benjamini-Hochberg.
    `best_of_k` seeds are chosen on validation; `calibration_bins` hold equally many scores.
    `selectivity` says which recipes are fitted to a control task too.
    """

    baselines: Annotated[tuple[str, ...], AfterValidator(distinct)] = (
        "position_baseline",
        "text_only_baseline",
    )
    recall_at: Annotated[tuple[Count, ...], AfterValidator(distinct)] = (5, 10)
    n_bootstrap: Annotated[int, Field(ge=0, le=1_000_000)] = 10_000
    bootstrap_seed: Seed = 0
    interval: Interval = "bca"
    n_null: Annotated[int, Field(ge=0, le=100_000)] = 1000
    null_seed: Seed = 0
    planned: Annotated[tuple[str, ...], AfterValidator(distinct)] = (ANY_ACTIVATION_PROBE,)
    correction: Correction = "holm"
    best_of_k: Count = 3
    calibration_bins: Count = 10
    selectivity: Selectivity = Selectivity()
