"""The assets: one definition per grid, all made by one factory, all thin.

What belongs here: how a stage becomes an asset of an op. What a stage is, from its dependencies to
its description, is said by `taprobe_core.pipeline.stages`; how its cells are named is in
`partitions`; what its events say is in `events`. Stages that share a grid share an op, so a run
that covers them loads the study once.

Concept: https://docs.dagster.io/guides/build/assets
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial

import dagster as dg
from dagster_shared.record import copy

from taprobe_core.errors import TaprobeError, attempted, is_of_machine
from taprobe_core.pipeline import (
    STAGES,
    Cell,
    Description,
    Failure,
    Gate,
    Plan,
    all_stops,
    describe,
    parents_of,
    refusal,
    run_stage,
    stage_verdicts,
    stages_of,
)
from taprobe_core.study import Study
from taprobe_dagster.events import check_result, failure_event, input_tags, materialization
from taprobe_dagster.partitions import cell_of, grid_of, mapping_between
from taprobe_dagster.resources import GPU_POOL, Workbench

STOPPED = "nothing is computed from it"
"""What a failed cell, or a failed blocking check of it, means for what comes after."""

GPU_TAGS = {
    "dagster-k8s/config": {
        "container_config": {"resources": {"limits": {"nvidia.com/gpu": "1"}}},
    }
}
"""Extraction asks a cluster for one accelerator; a single machine ignores the tag."""


def ops_of(study: Study) -> dict[str, tuple[str, ...]]:
    """The ops of a study and the stages that each makes of it, in data-path order."""
    found: dict[str, tuple[str, ...]] = {}
    for stage in stages_of(study):
        op = STAGES[stage].op
        found[op] = (*found.get(op, ()), stage)
    return found


def pool_of(stages: Iterable[str]) -> str | None:
    """The pool of which an op of these stages takes a slot while it works; None without one."""
    return GPU_POOL if any(STAGES[stage].is_on_accelerator for stage in stages) else None


def stage_assets(study: Study, op: str) -> dg.AssetsDefinition:
    """The assets of one op.

    Each cell is reported by its own event as soon as it is committed, so the op's outputs are
    optional (`skippable`) and never emitted; see `events` for why.
    """
    stages = ops_of(study)[op]
    pool = pool_of(stages)
    grid = grid_of(study, stages[0])

    @dg.multi_asset(
        name=op,
        specs=[_spec(study, stage) for stage in stages],
        check_specs=[
            dg.AssetCheckSpec(
                name, asset=stage, blocking=check.is_blocking, description=check.description
            )
            for stage in stages
            for name, check in STAGES[stage].checks.items()
        ],
        partitions_def=grid,
        backfill_policy=dg.BackfillPolicy.single_run(),
        can_subset=True,
        pool=pool,
        op_tags=GPU_TAGS if pool else None,
    )
    def run(
        context: dg.AssetExecutionContext, workbench: dg.ResourceParam[Workbench]
    ) -> Iterator[object]:
        plan, on = workbench.plan(), context.selected_asset_keys
        selected = [stage for stage in stages if dg.AssetKey(stage) in on]
        # Without assets this is "Execute" on a check: of no partition, it looks at every one.
        keys = context.partition_keys if grid and selected else []
        of = {stage: [cell_of(stage, key) for key in keys] if grid else [()] for stage in selected}
        yield from _as_failures(_run(context, plan, of))

    return run


def _spec(study: Study, stage: str) -> dg.AssetSpec:
    about = STAGES[stage]
    parents = parents_of(study, stage) or ("dataset",)
    return dg.AssetSpec(
        stage,
        deps=[
            dg.AssetDep(
                parent,
                partition_mapping=(
                    mapping_between(study, parent, stage) if parent != "dataset" else None
                ),
            )
            for parent in parents
        ],
        description=about.title,
        group_name=about.group or stage,
        code_version=about.code_version,
        kinds=set(about.kinds),
        owners=["team:taprobe"],
        skippable=True,
    )


def _run(
    context: dg.AssetExecutionContext, plan: Plan, cells: Mapping[str, Sequence[Cell]]
) -> Iterator[object]:
    """Make cells of an op's stages, then say what all checks find; an error comes last of all."""
    error: TaprobeError | None = None
    for stage in cells:
        failures: list[Failure] = []
        try:
            yield from _make(context, plan, stage, cells[stage], failures.append)
        except TaprobeError as failure:
            error = failure
        yield from map(failure_event, failures)
        if error is not None and is_of_machine(error):
            break
    step = context.get_step_execution_context()
    for key in sorted(context.selected_asset_check_keys):
        (stage,) = key.asset_key.path
        verdicts = stage_verdicts(plan, stage, key.name)
        # A fault of another run's cell shows here too, but it is no failure of this run.
        is_own = any(each.stops and each.cell in cells.get(stage, ()) for each in verdicts)
        found = check_result(stage, key.name, verdicts).to_asset_check_evaluation(step)
        yield copy(found, blocking=found.blocking and is_own)
    if error is None or not is_of_machine(error):
        stops = all_stops(Gate(plan), cells)
        error = refusal(plan.study, stops, STOPPED) if stops else error
    if error is not None:
        raise error


def _make(
    context: dg.AssetExecutionContext,
    plan: Plan,
    stage: str,
    cells: Sequence[Cell],
    tell: Callable[[Failure], object],
) -> Iterator[object]:
    inputs = input_tags(context.instance, parents_of(plan.study, stage))
    n_reused = 0
    for cell, outcome in run_stage(plan, stage, cells, tell):
        n_reused += outcome.is_reused
        shown = attempted(partial(describe, plan, stage, cell), f"{stage} {'/'.join(cell)}")
        if isinstance(shown, TaprobeError):
            # The cell is there all the same, and so are those after it.
            context.log.warning(f"{stage} {'/'.join(cell)} cannot be described: {shown}")
            shown = Description()
        yield materialization(stage, cell, outcome, shown, inputs)
    context.log.info(f"{stage}: {len(cells)} cells, {n_reused} reused from the store")


def _as_failures(events: Iterator[object]) -> Iterator[object]:
    """Show a user's error whole and do not retry it; retry once what a machine may recover from."""
    try:
        yield from events
    except TaprobeError as error:
        raise dg.Failure(
            description=error.what,
            metadata={"where": error.where or "", "fix": error.fix or ""},
            allow_retries=False,
        ) from error
    except OSError as error:
        raise dg.RetryRequested(max_retries=1, seconds_to_wait=5) from error
