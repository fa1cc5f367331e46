"""What starts by itself, once somebody has switched it on: everything here is off by default.

- `reevaluate` (schedule, 03:00 UTC): evaluation of every cell of the site × setting grid whose
  fits have changed; `republish` (03:30 UTC): then leaderboard and report.
- `launch_wanted_cells` (sensor): cells that are missing or stale at the present fingerprints, one
  op a tick, in data-path order, so that a downstream run never starts before its inputs exist.

Dagster launches a run key once, so a key here names the attempt and the state of every cell of the
run. How often a state has been tried is read from the tags of its runs and kept nowhere else.

Concept: https://docs.dagster.io/guides/automate
"""

from collections.abc import Iterator, Mapping

import dagster as dg
from dagster._core.definitions.unresolved_asset_job_definition import UnresolvedAssetJobDefinition
from dagster._time import get_current_timestamp

from taprobe_core.pipeline import STAGES, Gate, cells_of, failed_checks, missing_cells
from taprobe_core.study import Study
from taprobe_dagster.assets import ops_of
from taprobe_dagster.launch import Launch, launches_of
from taprobe_dagster.resources import Workbench

STATE_TAG = "taprobe/state"
"""What the cells of an automatic run were like when it was asked for: `Launch.state`."""

MAX_ATTEMPTS = 5
"""Runs at one state, after which somebody has to look."""

FIRST_WAIT_S = 60
"""Time between the first and the second attempt; it doubles with each that follows."""

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


def _request(launch: Launch, n_before: int) -> dg.RunRequest:
    return dg.RunRequest(
        run_key=f"{launch.op}:{launch.first}:{launch.last}:{launch.state}:{n_before + 1}",
        job_name=f"{launch.op}_job",
        asset_selection=[dg.AssetKey(stage) for stage in launch.stages],
        tags={**launch.tags, STATE_TAG: launch.state},
    )


def schedules(jobs: Jobs) -> list[dg.ScheduleDefinition]:
    """The nightly schedules; they compute what has changed and skip what has not."""
    return [_schedule(name, op, cron, jobs) for name, (op, cron) in SCHEDULES.items()]


def _schedule(name: str, op: str, cron: str, jobs: Jobs) -> dg.ScheduleDefinition:
    made = ", ".join(stage for stage in STAGES if STAGES[stage].op == op)

    @dg.schedule(
        name=name,
        job=jobs[op],
        cron_schedule=cron,
        execution_timezone="UTC",
        default_status=dg.DefaultScheduleStatus.STOPPED,
        description=f"Every cell of {made} that has changed.",
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
        answers = [_attempt(instance, launch) for launch in launches]
        requests = [each for each in answers if isinstance(each, dg.RunRequest)]
        if requests:
            yield from requests
            return
        if answers:
            yield dg.SkipReason("; ".join(each for each in answers if isinstance(each, str)))
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


def _attempt(instance: dg.DagsterInstance, launch: Launch) -> dg.RunRequest | str:
    """The next attempt at a launch, or what it waits for."""
    what = f"{launch.op} {'|'.join(launch.first)} … {'|'.join(launch.last)}".strip(" …")
    runs = instance.get_run_records(dg.RunsFilter(tags={STATE_TAG: launch.state}))
    if not runs:
        return _request(launch, 0)
    if any(not run.dagster_run.is_finished for run in runs):
        return f"{what}: a run is queued or under way"
    last = max(runs, key=lambda run: run.storage_id)
    tried = f"{what}: tried {len(runs)} times, last by run {last.dagster_run.run_id[:8]}"
    if len(runs) >= MAX_ATTEMPTS:
        return (
            f"{tried}; given up until a cell or its inputs change: see that run's log, mend the "
            "cause, then materialize the cells by hand or by `taprobe run`"
        )
    ended = last.end_time or last.update_timestamp.timestamp()
    wait_s = ended + FIRST_WAIT_S * 2 ** (len(runs) - 1) - get_current_timestamp()
    if wait_s > 0:
        return f"{tried}; tried again in {wait_s:.0f} s"
    return _request(launch, len(runs))
