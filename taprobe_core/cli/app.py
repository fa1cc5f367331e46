"""The typer application, its verbs over the store, and what every verb shares.

What does not belong here: any computation. A verb reads its arguments, calls the library, prints.
Verbs import what they need when they are called: help, `--version` and shell completion load this
module alone, and must answer at once.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.logging import RichHandler
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from taprobe_core.cli.console import err as err
from taprobe_core.cli.console import out as out
from taprobe_core.cli.console import print_defect
from taprobe_core.errors import ConfigError, FailedCheckError, TaprobeError, visible

if TYPE_CHECKING:
    import polars as pl

    from taprobe_core.pipeline import Cell, Plan
    from taprobe_core.store import ArtifactKey

EXIT_FIXABLE = 2
EXIT_UNSOUND = 3
EXIT_INTERRUPTED = 130

app = typer.Typer(
    name="taprobe",
    help="Predict which sentences of a reasoning trace matter, from a model's activations.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    epilog="Exit codes: 0 done, 1 defect, 2 fixable by you, 3 unsound artifact or failed check, "
    "130 interrupted.",
)
_SKIPS_IN_CHECK, _SKIPS_IN_RUN = 50, 10
_PUBLISHED = "the published dataset's median"

StudyArgument = Annotated[
    Path | None,
    typer.Argument(help="Study file; default: $TAPROBE_STUDY, else the embedded demo."),
]
StudyOption = Annotated[
    Path | None,
    typer.Option("--study", help="Study file; default: $TAPROBE_STUDY, else the embedded demo."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for a script.")]


def stage_names(incomplete: str) -> list[str]:
    """Complete the name of a stage: the one completion that loads more than the command line."""
    from taprobe_core.pipeline import STAGES

    return [stage for stage in STAGES if stage.startswith(incomplete)]


def _print_version(is_asked: bool) -> None:
    if is_asked:
        out.print(f"taprobe {version('taprobe')}")
        raise typer.Exit


@app.callback()
def main(
    _version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Take the options that stand before any verb."""


def guarded(command: Callable[[], Any]) -> int:
    """Run a command and return its exit code; a user's error is printed without a traceback.

    Args:
        command: the typer application, in its standalone mode: it prints wrong arguments itself
            and ends by SystemExit, with 130 where it was interrupted.
    """
    sys.excepthook = print_defect
    try:
        _check_arguments(sys.argv[1:])
        command()
    except TaprobeError as error:
        err.print(f"[bold red]error:[/] {escape(str(error))}")
        return EXIT_UNSOUND if isinstance(error, FailedCheckError) else EXIT_FIXABLE
    except SystemExit as stop:
        code = int(stop.code or 0)
        if code == EXIT_INTERRUPTED:
            err.print("interrupted; everything finished is kept, run the same command to go on")
        return code
    return 0


def _check_arguments(arguments: Sequence[str]) -> None:
    # Before anything reads them: the parser of arguments repeats them as they are.
    for argument in arguments:
        if visible(argument) != argument:
            raise ConfigError(
                f"control characters, or no UTF-8, in {argument}",
                "the command's arguments",
                "write it without; rename a file of this name",
            )


def show_progress() -> None:
    """Show the library's progress on stderr, one line an event."""
    handler = RichHandler(
        console=err, show_path=False, show_level=False, markup=False, log_time_format="%H:%M:%S"
    )
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("taprobe_core")
    logger.handlers = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False


def print_frame(frame: pl.DataFrame, title: str, as_json: bool = False) -> None:
    """Print a table for a reader, or as JSON rows for a script."""
    if as_json:
        out.print_json(json.dumps(frame.to_dicts(), default=str))
        return
    table = Table(title=Text(title, style="bold"), title_justify="left", box=box.SIMPLE_HEAD)
    for name, dtype in frame.schema.items():
        is_number = dtype.is_numeric()
        table.add_column(
            name,
            justify="right" if is_number else "left",
            overflow="fold",
            no_wrap=not is_number,
        )
    for row in frame.iter_rows():
        table.add_row(*(_cell(value) for value in row))
    out.print(table)


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3f}"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return escape(str(value))


@app.command()
def check(
    study: StudyArgument = None,
    measure: Annotated[
        bool, typer.Option(help="Measure this machine's speed, for the expected time.")
    ] = True,
    accept: Annotated[
        bool, typer.Option(help="Accept changed datasets, checkpoints and tokenizers.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Validate a study and print what a run would do: cells, models, work, time, sizes."""
    import polars as pl

    from taprobe_core.cli.check import render_check, render_skips
    from taprobe_core.pipeline import open_plan
    from taprobe_core.pipeline.failures import kept_failures
    from taprobe_core.pipeline.forecast import (
        Assumptions,
        forecast,
        measure_speed,
        model_shapes,
        plan_summary,
    )
    from taprobe_core.pipeline.skips import foreseen_skips

    plan = open_plan(study)
    faults = _ask_for_inputs(plan, accept)
    summary, shapes, assumptions = plan_summary(plan), model_shapes(plan), Assumptions()
    blocks = {model: shape.block for model, shape in shapes.items() if shape.block}
    speed = measure_speed(plan, blocks, is_measured=measure)
    rows = forecast(plan, assumptions, shapes, speed)
    skipped, unknown = foreseen_skips(plan)
    failures = kept_failures(plan)
    code = EXIT_FIXABLE if faults or failures else 0
    if as_json:
        found = {
            **summary,
            "speed": asdict(speed),
            "forecast": rows.to_dicts(),
            "skipped": skipped.to_dicts(),
            "faults": [
                {"what": each.what, "where": each.where, "fix": each.fix} for each in faults
            ],
            "failures": [each.document for each in failures],
        }
        out.print_json(json.dumps(found, default=str))
        raise typer.Exit(code)
    verdict = f"cannot run yet, {len(faults)} input(s) as said below" if faults else "is valid"
    if failures:
        verdict += f", {len(failures)} cell(s) failed when they were last tried"
    out.print(f"study [bold]{escape(plan.study.name)}[/] {verdict}; data folder {plan.data_root}")
    stages = pl.DataFrame(summary["stages"], schema_overrides={"n_present": pl.Int64})
    models = summary["models"]
    print_frame(stages.drop("note"), "cells (present = at today's fingerprint)")
    for part in render_check(models, rows, speed, assumptions):
        out.print(part)
    for line in render_skips(
        skipped, _SKIPS_IN_CHECK, is_fatal=plan.study.rollouts.on_bad_problem == "fail"
    ):
        out.print(line)
    notes = [*stages["note"], *(model["note"] for model in models), speed.note, *unknown]
    for note in dict.fromkeys(note for note in notes if note):
        out.print(f"note: {escape(note)}")
    for fault in faults:
        err.print(f"[bold red]error:[/] {escape(str(fault))}")
    for failure in failures:
        err.print(f"[bold red]failed:[/] {escape(f'{failure.where}: {failure.details}')}")
        err.print(f"Fix: {escape(failure.fix)}; `taprobe run` then tries it again")
    raise typer.Exit(code)


def _ask_for_inputs(plan: Plan, accept: bool) -> list[TaprobeError]:
    """Return what is wrong with a study's inputs; say which of their changes are now accepted."""
    from taprobe_core.cli.check import acceptance_line
    from taprobe_core.pipeline.input_faults import input_faults

    show_progress()  # of hashing, which takes its time with large weights
    plan.pins.is_accepting = accept
    faults = input_faults(plan)
    for source, change in plan.pins.accepted:
        err.print(acceptance_line(source, change))
    return faults


@app.command()
def storage(
    study: StudyArgument = None,
    sentences_per_problem: Annotated[
        int | None,
        typer.Option(
            min=1, help="Assumed where rollouts are not read yet.", show_default=_PUBLISHED
        ),
    ] = None,
    tokens_per_sentence: Annotated[
        int | None,
        typer.Option(min=1, help="Assumed where spans are not made yet.", show_default=_PUBLISHED),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Forecast the disk use of activations and attention, and of all tokens if they were kept."""
    from taprobe_core.cli.check import render_storage
    from taprobe_core.pipeline import open_plan
    from taprobe_core.pipeline.forecast import Assumptions, forecast

    plan = open_plan(study)
    assumptions = Assumptions(
        sentences_per_problem or Assumptions.sentences_per_problem,
        tokens_per_sentence or Assumptions.tokens_per_sentence,
    )
    rows = forecast(plan, assumptions)
    if as_json:
        print_frame(rows, "", as_json)
        return
    for part in render_storage(rows, plan.study.activations, plan.study.attention, assumptions):
        out.print(part)


@app.command()
def verify(
    study: StudyArgument = None,
    discard: Annotated[
        bool, typer.Option(help="Remove unsound artifacts, so that a run makes them again.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Hash every artifact against its manifest, every input against its pin; name each fault."""
    from taprobe_core.cli.check import verify_document, verify_lines

    plan = _on_disk(study)
    store = plan.store
    verdicts = list(store.verify())
    inputs = list(plan.pins.verify())
    if as_json:
        out.print_json(json.dumps(verify_document(verdicts, inputs)))
    else:
        for line in verify_lines(verdicts, inputs):
            out.print(line)
    if discard:
        # What only lacks an input is sound in itself; a run makes the input again.
        for verdict in verdicts:
            if verdict.is_discardable:
                store.discard(verdict.key)
    if not all(verdict.is_sound for verdict in verdicts) or any(each.faults for each in inputs):
        raise typer.Exit(EXIT_UNSOUND)


def _on_disk(study: Path | None) -> Plan:
    """Open a plan on a data folder that has to be there; show progress on it."""
    from taprobe_core.pipeline import open_plan

    plan = open_plan(study)
    root = plan.data_root
    if not root.is_dir():
        raise ConfigError(
            "a file in place of the data folder" if root.exists() else "no such data folder",
            str(root),
            "set TAPROBE_DATA to the folder that a run wrote, or run a study first",
        )
    show_progress()
    return plan


@app.command()
def lineage(
    stage: Annotated[
        str,
        typer.Argument(help="A stage, as `taprobe check` names them.", autocompletion=stage_names),
    ],
    cell: Annotated[list[str] | None, typer.Argument(help="Partition keys of the cell.")] = None,
    study: StudyOption = None,
) -> None:
    """Show what an artifact was made from, up to dataset revision and checkpoint."""
    from taprobe_core.pipeline import key_of, open_plan

    plan = open_plan(study)
    key = key_of(plan, stage, checked_cell(plan, stage, cell or []))
    for line in plan.store.lineage(key).render():
        out.print(escape(line))


@app.command()
def du(study: StudyArgument = None, as_json: JsonOption = False) -> None:
    """Show what the store holds and how large it is, by stage."""
    print_frame(_on_disk(study).store.usage(), "disk use by stage", as_json)


@app.command()
def prune(
    study: StudyArgument = None,
    keep: Annotated[int, typer.Option(min=1, help="Versions to keep of every cell.")] = 3,
    dry_run: Annotated[bool, typer.Option(help="Only say what would go.")] = False,
) -> None:
    """Remove old versions; what a kept artifact was made from stays."""
    from taprobe_core.pipeline.verdicts import checks_store

    plan = _on_disk(study)
    removed = plan.store.prune(keep=keep, dry_run=dry_run)
    # What checks found is small and found again where it is asked for, so it is not listed.
    checks_store(plan).prune(keep=keep, dry_run=dry_run)
    for key in removed:
        out.print(_name(key))
    out.print(f"{len(removed)} artifacts {'would be ' if dry_run else ''}removed")


@app.command()
def report(study: StudyArgument = None) -> None:
    """Build the study's report if it is not there, and print its path."""
    from taprobe_core.pipeline import open_plan, run_stage

    ((_, outcome),) = run_stage(open_plan(study), "study_report", [()])
    out.print(str(outcome.artifact.path / "report.html"))


@app.command()
def export(
    study: StudyArgument = None,
    to: Annotated[Path, typer.Option(help="Folder to make.")] = Path("export"),
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier export of this name.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Write predictions, labels, metrics and plans as Parquet files that any tool reads."""
    from taprobe_core.pipeline import export_study

    made = export_study(_on_disk(study), to, overwrite=overwrite)
    if as_json:
        out.print_json(json.dumps(asdict(made), default=str))
    else:
        counts = ", ".join(f"{name} {n}" for name, n in made.rows.items())
        out.print(f"{made.folder}: rows of {counts}")
        for cell, why in made.missing.items():
            err.print(f"[bold red]missing:[/] {escape(f'{cell}: {why}')}")
    if made.missing:
        if not as_json:
            err.print("Fix: run the study, then export again with --overwrite")
        raise typer.Exit(EXIT_FIXABLE)


def checked_cell(plan: Plan, stage: str, keys: Sequence[str]) -> Cell:
    """Return the cell of these partition keys."""
    from taprobe_core.pipeline import STAGES, check_stage, dimension_keys

    wanted = STAGES[check_stage(plan.study, stage)].grid
    if len(keys) != len(wanted):
        raise ConfigError(
            f"{len(keys)} keys of a cell of {stage}",
            "the command",
            f"give {len(wanted)}: {', '.join(wanted) or 'this stage has one artifact per study'}",
        )
    for dimension, key in zip(wanted, keys, strict=True):
        known = dimension_keys(plan.study, dimension)
        if key not in known:
            where = f"study {plan.study.name}"
            raise ConfigError(f"no {dimension} {key!r}", where, f"use one of {', '.join(known)}")
    return tuple(keys)


def _name(key: ArtifactKey) -> str:
    return "/".join((key.stage, *key.partition, key.fingerprint))


def print_skipped(plan: Plan) -> None:
    """Print the problems that the study's artifacts leave out, as far as they are there."""
    from taprobe_core.cli.check import render_skips
    from taprobe_core.pipeline.skips import stored_skips

    for line in render_skips(stored_skips(plan), _SKIPS_IN_RUN):
        err.print(line)


def print_leaderboard(plan: Plan) -> None:
    """Print the best rows of the study's leaderboard."""
    from taprobe_core.report.leaderboard import render_text

    frame = plan.read("leaderboard", (), "leaderboard")
    for table in render_text(frame):
        out.print(table)
