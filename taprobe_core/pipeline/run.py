"""Run any stage over any of its cells: the one entry that Dagster and the notebook share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

from taprobe_core.errors import TaprobeError, attempted
from taprobe_core.keys import parse_site, parse_trial
from taprobe_core.pipeline.attention import ensure_receiver_heads, ensure_vertical_attention
from taprobe_core.pipeline.cells import DIMENSIONS, Cell, check_stage, key_of
from taprobe_core.pipeline.extract import ensure_activations
from taprobe_core.pipeline.failures import (
    Failure,
    failure_of,
    forget_failure,
    keep_failure,
)
from taprobe_core.pipeline.fit import ensure_probe_fits
from taprobe_core.pipeline.gate import Gate, distinct_stops, refusal, split_stopped
from taprobe_core.pipeline.judge import (
    ensure_deferral_plans,
    ensure_evaluation,
    ensure_leaderboard,
)
from taprobe_core.pipeline.outcome import Outcome
from taprobe_core.pipeline.plan import Plan
from taprobe_core.pipeline.publish import ensure_study_report
from taprobe_core.pipeline.sweep import (
    ensure_sweep_fits,
    ensure_sweep_shortlist,
    ensure_sweep_table,
)
from taprobe_core.pipeline.text import ensure_labels, ensure_rollouts, ensure_spans

_PER_CELL: Mapping[str, Callable[[Plan, Cell], Outcome]] = {
    "rollouts": lambda plan, cell: ensure_rollouts(plan, *cell),
    "labels": lambda plan, cell: ensure_labels(plan, *cell),
    "spans": lambda plan, cell: ensure_spans(plan, *cell),
    "receiver_heads": lambda plan, cell: ensure_receiver_heads(plan, *cell),
    "deferral_plans": lambda plan, cell: ensure_deferral_plans(
        plan, parse_site(cell[0]), parse_trial(cell[1])
    ),
    "evaluation": lambda plan, cell: ensure_evaluation(plan, parse_site(cell[0]), cell[1]),
    "leaderboard": lambda plan, _: ensure_leaderboard(plan),
    "study_report": lambda plan, _: ensure_study_report(plan),
    "sweep_shortlist_stage2": lambda plan, _: ensure_sweep_shortlist(plan, "stage2"),
    "sweep_shortlist_stage3": lambda plan, _: ensure_sweep_shortlist(plan, "stage3"),
    "sweep_leaderboard": lambda plan, _: ensure_sweep_table(plan, "sweep_leaderboard"),
    "sweep_paired_deltas": lambda plan, _: ensure_sweep_table(plan, "sweep_paired_deltas"),
    "sweep_stability": lambda plan, _: ensure_sweep_table(plan, "sweep_stability"),
}


def run_stage(
    plan: Plan,
    stage: str,
    cells: Sequence[Cell],
    tell: Callable[[Failure], object] = lambda _: None,
) -> Iterator[tuple[Cell, Outcome]]:
    """Compute what the cells of a stage lack; yield each cell with its outcome, when complete.

    A cell that fails is kept (`failures`) and costs itself: the others are made, and the error
    comes last of all.

    Args:
        plan: the plan.
        stage: a stage that the study has (`cells.stages_of`).
        cells: cells of that stage, in any order.
        tell: gets each failure as it happens.

    Yields:
        (cell, outcome). Activations, attention and fits come grouped by what they share, so the
        order may differ from that of `cells`.

    Raises:
        ConfigError: the study has no such stage.
        FailedCheckError: a blocking check of what a cell is made from failed, in this run or an
            earlier one; raised after all cells that this does not concern.
        TaprobeError: cells failed, or what they are made from had failed before; raised after all
            others. Of the class of what they failed by, see `gate.refusal`.
        ArtifactError: the store cannot be written; nothing is tried after that.
    """
    check_stage(plan.study, stage)
    free, stopped = split_stopped(Gate(plan), stage, cells)
    failed: list[Failure] = []
    for made in _safely(plan, stage, free):
        if isinstance(made, Failure):
            keep_failure(plan, made)
            tell(made)
            failed.append(made)
        else:
            forget_failure(plan, made.key)
            yield _cell_of(stage, made), made
    if failed or stopped:
        above = [each for reasons in stopped.values() for each in reasons]
        said = ", ".join("/".join(cell) for cell in stopped if cell)
        of_cells = f" of {said}" if said else ""
        so = f"{stage}{of_cells} cannot be made" if stopped else ""
        raise refusal(plan.study, distinct_stops([*failed, *above]), so)


def _cell_of(stage: str, outcome: Outcome) -> Cell:
    # The partition of an artifact of the whole study is the study's name.
    return outcome.key.partition if DIMENSIONS[stage] else ()


def _safely(plan: Plan, stage: str, cells: Sequence[Cell]) -> Iterator[Outcome | Failure]:
    """Make cells; an error that is no single cell's is that of all that were still to come."""
    left: dict[Cell, None] = {}
    for cell in cells:
        key = attempted(partial(key_of, plan, stage, cell), f"{stage} {'/'.join(cell)}")
        if isinstance(key, TaprobeError):
            yield failure_of(stage, cell, key)
        else:
            left[cell] = None
    made = _run(plan, stage, list(left))
    while left:
        found = attempted(lambda: next(made, None), stage)
        if found is None:
            return
        if isinstance(found, TaprobeError):
            yield from (failure_of(stage, cell, found) for cell in left)
            return
        left.pop(found.cell if isinstance(found, Failure) else _cell_of(stage, found))
        yield found


def _run(plan: Plan, stage: str, cells: Sequence[Cell]) -> Iterator[Outcome | Failure]:
    if stage in ("activations", "vertical_attention"):
        # Cells that share passes through the model go in together.
        sites = [(parse_site(site), setting) for site, setting in cells]
        ensure = ensure_activations if stage == "activations" else ensure_vertical_attention
        yield from ensure(plan, sites)
    elif stage == "probe_fits":
        trials = [(parse_site(site), parse_trial(trial)) for site, trial in cells]
        yield from ensure_probe_fits(plan, trials)
    elif stage in ("sweep_stage1", "sweep_stage2", "sweep_stage3"):
        places = [(parse_site(site), setting) for site, setting in cells]
        yield from ensure_sweep_fits(plan, stage.removeprefix("sweep_"), places)
    else:
        for cell in cells:
            made = attempted(partial(_PER_CELL[stage], plan, cell), f"{stage} {'/'.join(cell)}")
            yield failure_of(stage, cell, made) if isinstance(made, TaprobeError) else made
