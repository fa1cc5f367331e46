"""What starts by itself, once somebody has switched it on: both are off by default.

- `reevaluate` (schedule): every night, evaluation, leaderboard and report of every cell whose fits
  are complete. It covers the whole evaluation grid, one run a rectangle.
- `launch_wanted_cells` (sensor): cells that are missing or stale at the present fingerprints, one
  op a tick, in data-path order, so that a downstream run never starts before its inputs exist.

Concept: https://docs.dagster.io/guides/automate
"""

from collections.abc import Iterator

import dagster as dg

from taprobe_core.pipeline import key_of
from taprobe_dagster.assets import OPS
from taprobe_dagster.launch import Launch, launches_of
from taprobe_dagster.resources import Workbench

REEVALUATED = ("evaluate_probes", "publish_study")


def _request(launch: Launch, run_key: str | None = None) -> dg.RunRequest:
    return dg.RunRequest(
        run_key=run_key,
        asset_selection=[dg.AssetKey(stage) for stage in launch.stages],
        tags=launch.tags,
    )


def reevaluation_schedule() -> dg.ScheduleDefinition:
    """The nightly re-evaluation; evaluates what changed and skips what did not."""

    @dg.schedule(
        name="reevaluate",
        target=dg.AssetSelection.assets(*(stage for op in REEVALUATED for stage in OPS[op])),
        cron_schedule="0 3 * * *",
        execution_timezone="UTC",
        default_status=dg.DefaultScheduleStatus.STOPPED,
        description="Evaluation of every site and setting, then leaderboard and report.",
    )
    def reevaluate(
        context: dg.ScheduleEvaluationContext, workbench: dg.ResourceParam[Workbench]
    ) -> Iterator[dg.RunRequest | dg.SkipReason]:
        yield from _next_requests(context.instance, workbench, REEVALUATED)

    return reevaluate


def wanted_cells_sensor() -> dg.SensorDefinition:
    """The sensor that keeps the study complete."""

    @dg.sensor(
        name="launch_wanted_cells",
        target=dg.AssetSelection.assets(*(stage for stages in OPS.values() for stage in stages)),
        minimum_interval_seconds=60,
        default_status=dg.DefaultSensorStatus.STOPPED,
        description="Launch cells that are missing or stale, one op a tick, in data-path order.",
    )
    def launch_wanted_cells(
        context: dg.SensorEvaluationContext, workbench: dg.ResourceParam[Workbench]
    ) -> Iterator[dg.RunRequest | dg.SkipReason]:
        if _is_busy(context.instance):
            yield dg.SkipReason("runs of this study are queued or under way")
        else:
            yield from _next_requests(context.instance, workbench, tuple(OPS))

    return launch_wanted_cells


def _is_busy(instance: dg.DagsterInstance) -> bool:
    return (
        instance.get_runs_count(
            dg.RunsFilter(
                statuses=[
                    dg.DagsterRunStatus.QUEUED,
                    dg.DagsterRunStatus.STARTING,
                    dg.DagsterRunStatus.STARTED,
                ]
            )
        )
        > 0
    )


def _next_requests(
    instance: dg.DagsterInstance, workbench: Workbench, ops: tuple[str, ...]
) -> Iterator[dg.RunRequest | dg.SkipReason]:
    """Requests of the first op that lacks anything, else the reason why there is none."""
    plan = workbench.plan()
    for op in ops:
        launches = list(launches_of(instance, plan, op, OPS[op]))
        for launch in launches:
            cell = key_of(plan, launch.stages[-1], launch.last)
            yield _request(launch, f"{op}:{launch.first}:{launch.last}:{cell.fingerprint}")
        if launches:
            return
    yield dg.SkipReason("every cell is present at its present fingerprint")
