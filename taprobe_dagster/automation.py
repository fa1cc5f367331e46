"""What starts by itself, once somebody has switched it on: everything here is off by default.

- `reevaluate` (schedule, 03:00 UTC): evaluation of every cell of the site × setting grid whose
  fits have changed; `republish` (03:30 UTC): then leaderboard and report.
- `launch_wanted_cells` (sensor): cells that are missing or stale at the present fingerprints, one
  op a tick, in data-path order, so that a downstream run never starts before its inputs exist.

Concept: https://docs.dagster.io/guides/automate
"""

from collections.abc import Iterator, Mapping

import dagster as dg
from dagster._core.definitions.unresolved_asset_job_definition import UnresolvedAssetJobDefinition

from taprobe_core.pipeline import Gate, cells_of, failed_checks, key_of, missing_cells
from taprobe_core.study import Study
from taprobe_dagster.assets import OPS, ops_of
from taprobe_dagster.launch import Launch, launches_of
from taprobe_dagster.resources import Workbench

Jobs = Mapping[str, UnresolvedAssetJobDefinition]

SCHEDULES = {
    "reevaluate": ("evaluate_probes", "0 3 * * *"),
    "republish": ("publish_study", "30 3 * * *"),
}
"""Schedule -> the op it runs, and when."""


def op_jobs(study: Study) -> Jobs:
    """One job per op of a study; its assets share a grid, as a job's assets must."""
    return {
        op: dg.define_asset_job(
            f"{op}_job",
            dg.AssetSelection.assets(*stages),
            description=f"Materialize {', '.join(stages)}.",
        )
        for op, stages in ops_of(study).items()
    }


def _request(launch: Launch, run_key: str) -> dg.RunRequest:
    return dg.RunRequest(
        run_key=run_key,
        job_name=f"{launch.op}_job",
        asset_selection=[dg.AssetKey(stage) for stage in launch.stages],
        tags=launch.tags,
    )


def schedules(jobs: Jobs) -> list[dg.ScheduleDefinition]:
    """The nightly schedules; they compute what has changed and skip what has not."""
    return [_schedule(name, op, cron, jobs) for name, (op, cron) in SCHEDULES.items()]


def _schedule(name: str, op: str, cron: str, jobs: Jobs) -> dg.ScheduleDefinition:
    @dg.schedule(
        name=name,
        job=jobs[op],
        cron_schedule=cron,
        execution_timezone="UTC",
        default_status=dg.DefaultScheduleStatus.STOPPED,
        description=f"Every cell of {', '.join(OPS[op])} that has changed.",
    )
    def nightly(
        context: dg.ScheduleEvaluationContext, workbench: dg.ResourceParam[Workbench]
    ) -> Iterator[dg.RunRequest | dg.SkipReason]:
        yield from _next_requests(context.instance, workbench, (op,))

    return nightly


def wanted_cells_sensor(jobs: Jobs) -> dg.SensorDefinition:
    """The sensor that keeps the study complete."""

    @dg.sensor(
        name="launch_wanted_cells",
        jobs=list(jobs.values()),
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
            yield from _next_requests(context.instance, workbench, tuple(ops_of(workbench.study)))

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
    stages = ops_of(plan.study)
    for op in ops:
        launches = list(launches_of(instance, plan, op, stages[op]))
        for launch in launches:
            cell = key_of(plan, launch.stages[-1], launch.last)
            yield _request(launch, f"{op}:{launch.first}:{launch.last}:{cell.fingerprint}")
        if launches:
            return
    wanted = {
        stage: list(missing_cells(plan, stage, cells_of(plan.study, stage)))
        for op in ops
        for stage in stages[op]
    }
    if failed := failed_checks(Gate(plan, looks=False), wanted):
        n = sum(map(len, wanted.values()))
        told = "; ".join(f"{each.check} on {each.where}" for each in failed)
        yield dg.SkipReason(f"{n} cells wait until failed checks are mended or waived: {told}")
    else:
        yield dg.SkipReason("every cell is present at its present fingerprint")
