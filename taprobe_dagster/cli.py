"""The `taprobe` command with Dagster: `demo`, `run`, `ui`, beside the verbs of the core.

As there, a verb imports what it needs when it is called: help must answer at once.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated

import typer

from taprobe_core.cli import app, guarded
from taprobe_core.cli.app import (
    StudyArgument,
    err,
    out,
    print_leaderboard,
    print_skipped,
    show_progress,
    stage_names,
)
from taprobe_core.errors import ConfigError, TaprobeError, is_of_machine

if TYPE_CHECKING:
    from taprobe_core.pipeline import CellFilter, Plan

ListOption = list[str] | None


@app.command()
def run(
    study: StudyArgument = None,
    select: Annotated[
        ListOption,
        typer.Option(
            help="Only this stage, as `taprobe check` names them. Repeatable.",
            autocompletion=stage_names,
        ),
    ] = None,
    site: Annotated[
        ListOption, typer.Option(help="Only this site (model@Lnn). Repeatable.")
    ] = None,
    trial: Annotated[
        ListOption, typer.Option(help="Only this trial (setting@snn). Repeatable.")
    ] = None,
) -> None:
    """Materialize what a study lacks, through Dagster; what is there already is not redone."""
    from taprobe_core.pipeline import (
        STAGES,
        CellFilter,
        check_stage,
        dimension_keys,
        open_plan,
        stages_of,
    )

    plan = open_plan(study)
    stages = frozenset(check_stage(plan.study, stage) for stage in select) if select else None
    chosen = CellFilter(
        _known(site, dimension_keys(plan.study, "site"), "site"),
        _known(trial, dimension_keys(plan.study, "trial"), "trial"),
    )
    is_part = chosen != CellFilter()
    if is_part and stages is None:
        # Heads are ranked over all layers of a model, and one leaderboard and one report stand for
        # the whole study, so a part does not make them.
        stages = frozenset(stages_of(plan.study)) - STAGES.of_the_whole()
    _materialize(plan, chosen, stages)
    print_skipped(plan)
    if stages is None or "leaderboard" in stages:
        print_leaderboard(plan)
    if stages is None or "study_report" in stages:
        report = plan.open("study_report")
        out.print(f"report: {report.path / 'report.html'}")


@app.command()
def demo() -> None:
    """Run the embedded demo from rollouts to deferral plans, and print where the report is."""
    os.environ.pop("TAPROBE_STUDY", None)
    run()


@app.command()
def ui(
    study: StudyArgument = None,
    port: Annotated[
        int, typer.Option(min=1, max=65535, help="Port on the loopback address.")
    ] = 3000,
    read_only: Annotated[
        bool, typer.Option("--read-only", help="Show everything, let nothing be changed.")
    ] = False,
    token: Annotated[
        str | None,
        typer.Option(
            envvar="TAPROBE_UI_TOKEN",
            show_envvar=True,
            help="What opens the UI; default: a new one each start. Other users of the machine "
            "read it on a command line, not in the variable.",
        ),
    ] = None,
) -> None:
    """Open Dagster's UI on this study: web server and daemon, on the loopback address only."""
    if find_spec("dagster_webserver") is None:
        raise ConfigError(
            "the UI is not installed", "this environment", "pip install 'taprobe[ui]'"
        )
    from taprobe_core.pipeline import open_plan
    from taprobe_dagster.access import checked_token, new_token
    from taprobe_dagster.serve import serve

    token = new_token() if token is None else checked_token(token)
    if study is not None:
        os.environ["TAPROBE_STUDY"] = str(study.absolute())
    open_plan(study)
    serve(port, token, is_read_only=read_only)


def _known(chosen: ListOption, known: tuple[str, ...], noun: str) -> frozenset[str] | None:
    if not chosen:
        return None
    unknown = sorted(set(chosen) - set(known))
    if unknown:
        raise ConfigError(
            f"no {noun} {', '.join(unknown)}", "the study", f"use one of {', '.join(known)}"
        )
    return frozenset(chosen)


def _materialize(plan: Plan, chosen: CellFilter, stages: frozenset[str] | None) -> None:
    from dagster._core.utils import make_new_run_id

    from taprobe_core.pipeline import (
        Gate,
        all_stops,
        cells_of,
        is_made,
        refusal,
        split_stopped,
    )
    from taprobe_dagster.assets import ops_of
    from taprobe_dagster.definitions import build_defs
    from taprobe_dagster.events import refresh_checks
    from taprobe_dagster.home import open_instance
    from taprobe_dagster.launch import (
        execute,
        launches_of,
        n_computed_in,
        stages_in,
        who_holds_pool,
    )
    from taprobe_dagster.recovery import watched
    from taprobe_dagster.resources import Workbench

    show_progress()
    logging.getLogger("dagster").setLevel(logging.CRITICAL)
    # An interrupt while the event log closes a connection is raised again, and logged besides.
    logging.getLogger("sqlalchemy.pool").setLevel(logging.CRITICAL)
    start = time.monotonic()
    n_computed, n_runs = 0, 0
    errors: list[TaprobeError] = []
    selected = {op: stages_in(plan.study, op, stages) for op in ops_of(plan.study)}
    with open_instance() as instance, watched(instance, err.print):
        defs = build_defs(plan.study, {"workbench": Workbench(plan.study, plan.data_root)})
        for op, of_op in selected.items():
            for launch in launches_of(instance, plan, op, of_op, chosen):
                first, last = "|".join(launch.first), "|".join(launch.last)
                err.print(f"[bold]{op}[/] {first} … {last}" if first else f"[bold]{op}[/]")
                if holders := who_holds_pool(instance, launch):
                    err.print(f"waiting for run {', '.join(holders)}, which extracts already")
                run_id = make_new_run_id()
                # What fails stops what comes after it and nothing else: it is told at the end.
                try:
                    execute(defs, instance, launch, run_id)
                except TaprobeError as error:
                    if is_of_machine(error):
                        raise
                    errors.append(error)
                n_computed += n_computed_in(instance, run_id)
                n_runs += 1
        refresh_checks(instance, plan)
    cells = {
        stage: cells_of(plan.study, stage, chosen) for of_op in selected.values() for stage in of_op
    }
    gate = Gate(plan)
    stopped = {stage: split_stopped(gate, stage, of)[1] for stage, of in cells.items()}
    stops = all_stops(gate, cells)
    n_cells, n_stopped = sum(map(len, cells.values())), sum(map(len, stopped.values()))
    n_failed = sum(
        cell not in stopped[stage] and not is_made(plan, stage, cell)
        for stage, of in cells.items()
        for cell in of
        if stops or errors
    )
    n_reused = n_cells - n_computed - n_stopped - n_failed
    failed = f", {n_failed} failed" if n_failed else ""
    err.print(
        f"{n_cells} artifacts: {n_computed} computed, {n_reused} reused{failed}; "
        f"{n_runs} Dagster run(s), {time.monotonic() - start:.0f} s"
    )
    if stops:
        so = f"{n_stopped} of {n_cells} artifacts are stopped" if n_stopped else ""
        raise refusal(plan.study, stops, so)
    if errors:
        raise errors[0]


def main() -> None:
    """Entry point of the `taprobe` command."""
    sys.exit(guarded(app))
