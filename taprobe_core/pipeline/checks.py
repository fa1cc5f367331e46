"""Every check of every stage: what it reads, what decides it, whether it stops what comes after.

The checks themselves are in `stage_checks` (does an artifact hold what it should?) and
`tripwire_checks` (is the pipeline of probes sound?).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from taprobe_core.keys import parse_site, parse_trial
from taprobe_core.pipeline.cells import Cell
from taprobe_core.pipeline.looking import Check
from taprobe_core.pipeline.plan import Plan
from taprobe_core.pipeline.stage_checks import (
    activations_finite,
    labels_schema,
    receiver_heads_from_training,
    rollouts_schema,
    spans_cover,
    split_coverage,
    vertical_attention_sound,
)
from taprobe_core.pipeline.tripwire_checks import (
    is_looked_at,
    no_trace_on_two_sides,
    one_problem_is_memorised,
    passages_differ_across_problems,
    pooling_read,
    shuffled_labels_at_chance,
)
from taprobe_core.store import ArtifactKey


def _nothing(plan: Plan, cell: Cell) -> list[ArtifactKey]:
    return []


def _rollouts(plan: Plan, cell: Cell) -> list[ArtifactKey]:
    return [plan.rollouts(*cell)]


def _spans(plan: Plan, cell: Cell) -> list[ArtifactKey]:
    return [plan.spans(parse_site(cell[0]).model, cell[1])]


def _attention(plan: Plan, cell: Cell) -> list[ArtifactKey]:
    model, setting = cell
    return [plan.vertical_attention(site, setting) for site in plan.sites(model)]


def _problems_of_trial(plan: Plan, cell: Cell) -> list[ArtifactKey]:
    of_trial = parse_site(cell[0]).model, parse_trial(cell[1]).setting
    return [plan.spans(*of_trial), plan.labels(*of_trial)]


def _rows(plan: Plan, cell: Cell) -> list[ArtifactKey]:
    site, setting = parse_site(cell[0]), cell[1]
    model = site.model
    return [
        plan.rollouts(model, setting),
        plan.labels(model, setting),
        plan.spans(model, setting),
        plan.activations(site, setting),
    ]


def _folds(plan: Plan) -> dict[str, Any]:
    return {"folds": plan.folds_config()}


def _seeded_folds(plan: Plan) -> dict[str, Any]:
    return {**_folds(plan), "seed": plan.study.seeds[0], "pooling": pooling_read(plan)}


_CHANGED = (
    "the stage refuses to store this, so something else changed the store: remove the folder and "
    "run again; if it comes back, the stage is defective"
)
_TRIPPED = "docs/tripwires.md says where to look, under 'When one trips'"

CHECKS: Mapping[str, Mapping[str, Check]] = {
    "rollouts": {
        "rollouts_schema": Check(rollouts_schema, _nothing, _CHANGED),
        "no_trace_on_two_sides": Check(
            no_trace_on_two_sides,
            _nothing,
            "keep one of the problems with rollouts.problem_ids",
            settings=_folds,
        ),
        "passages_differ_across_problems": Check(
            passages_differ_across_problems,
            _nothing,
            "look whether one of the two problems is a copy of the other in part",
            is_blocking=False,
            settings=_folds,
        ),
    },
    "labels": {"labels_schema": Check(labels_schema, _nothing, _CHANGED)},
    "spans": {"spans_cover": Check(spans_cover, _rollouts, _CHANGED)},
    "activations": {"activations_finite": Check(activations_finite, _spans, _CHANGED)},
    "vertical_attention": {
        "vertical_attention_sound": Check(vertical_attention_sound, _spans, _CHANGED)
    },
    "receiver_heads": {
        "receiver_heads_from_training": Check(
            receiver_heads_from_training, _attention, _CHANGED, settings=_folds
        )
    },
    "probe_fits": {
        "split_coverage": Check(split_coverage, _problems_of_trial, _CHANGED, settings=_folds)
    },
    "evaluation": {
        "shuffled_labels_at_chance": Check(
            shuffled_labels_at_chance,
            _rows,
            _TRIPPED,
            settings=_seeded_folds,
            looks_at=is_looked_at,
        ),
        "one_problem_is_memorised": Check(
            one_problem_is_memorised,
            _rows,
            _TRIPPED,
            settings=_seeded_folds,
            looks_at=is_looked_at,
        ),
    },
}
"""Stage -> check name -> check."""

WARNINGS = frozenset(
    name for checks in CHECKS.values() for name, check in checks.items() if not check.is_blocking
)
"""Checks whose faults may be how the data is: they warn, and stop nothing."""
