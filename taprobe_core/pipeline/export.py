"""A study's results as one folder of Parquet, partitioned as Hive does, for any other tool.

`FOLDER/<table>/model=M/setting=S/layer=L/seed=N/part-0.parquet`, as far as the table differs by
these, and a README.md of every column, its type, range and unit, made from the contracts. What does
not belong here: states and weights, which stay in the store, and how results are made.

Invariants: what is exported is what the store holds, hash-checked as it is read; the folder appears
whole or not at all; a cell that is not there, or that cannot be read, is named and costs itself.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import polars as pl

from taprobe_core.errors import ArtifactError, ConfigError, TaprobeError, attempted
from taprobe_core.keys import parse_site, parse_trial
from taprobe_core.pipeline.data_folder import checked_folder
from taprobe_core.pipeline.grid import Cell
from taprobe_core.pipeline.plan import Plan
from taprobe_core.pipeline.stages.probe_fits import read_scores
from taprobe_core.store import write_table

HEAD = "# Export of study "
"""First words of an export's README: what marks a folder that may be overwritten."""


class ExportedTable(NamedTuple):
    """One sub-folder: a stage's table, its contract, and what its folders are partitioned by."""

    name: str
    stage: str
    contract: str
    by: tuple[str, ...]
    about: str


_TRIAL = ("model", "setting", "layer", "seed")
EXPORTED = (
    ExportedTable(
        "predictions", "probe_fits", "SCORES", _TRIAL, "One row per sentence, fold and recipe."
    ),
    ExportedTable("labels", "labels", "LABELS", _TRIAL[:2], "One row per labelled sentence."),
    ExportedTable(
        "problem_metrics",
        "evaluation",
        "PROBLEM_METRICS",
        _TRIAL,
        "One row per recipe, protocol, split, fold and problem: the unit of every summary.",
    ),
    ExportedTable(
        "metrics",
        "evaluation",
        "METRICS",
        _TRIAL[:3],
        "One row per recipe, protocol and split: means over problems, all seeds together.",
    ),
    ExportedTable(
        "deltas",
        "evaluation",
        "DELTAS",
        _TRIAL[:3],
        "One row per recipe, baseline and protocol on test: paired differences over problems.",
    ),
    ExportedTable(
        "plans",
        "deferral_plans",
        "PLANS",
        _TRIAL,
        "One row per recipe, protocol and objective: thresholds, and what they cost on test.",
    ),
    ExportedTable(
        "decisions",
        "deferral_plans",
        "DECISIONS",
        _TRIAL,
        "One row per test sentence and plan: accepted as no anchor, as an anchor, or deferred.",
    ),
)

UNITS = {
    r"model|setting|recipe|baseline|target|residualize|protocol|split|objective|decision": "name",
    r"primary_metric|metric|function_tag|label_status|guarantee|interval_note": "name or text",
    r"layer|fold|problem_id|sentence_idx": "number, from 0 but for problem ids",
    r"seed": "seed of the fit",
    r"n_.*": "count",
    r"is_.*|meets_.*": "true or false",
    r"score|t_negative|t_positive": "probability of an anchor; of other targets the target's unit",
    r"target_value": "unit of the recipe's target",
    r"(importance|true_importance).*": "difference of success rates",
    r"val_deferral_rate|deferral_rate|.*_error|.*_recall|.*_precision": "share of sentences",
    r"objective_value": "share of sentences",
    r"p_.*": "probability (p-value)",
    r"delta.*|t_low|t_high": "difference of the metric named in `metric`",
    r".*(primary|pr_auc|spearman|pearson|recall_at_).*": "metric, 1 is best",
}
"""Pattern of a column's name -> its unit; the first that fits the whole name."""


@dataclass(frozen=True)
class Export:
    """What became of an export.

    Attributes:
        folder: where it stands.
        rows: table -> rows written.
        missing: table and cell -> why it is not in it.
    """

    folder: Path
    rows: Mapping[str, int]
    missing: Mapping[str, str]


def export_study(plan: Plan, folder: Path | str, *, overwrite: bool = False) -> Export:
    """Write predictions, labels, metrics and plans of every finished cell into a new folder.

    Args:
        plan: the study and its store.
        folder: to be made; its parent must exist.
        overwrite: replace an earlier export of this name.

    Raises:
        ConfigError: the folder exists, or no cell of the study is finished.
        ArtifactError: the folder cannot be written.
    """
    target = checked_folder(folder, "the folder to export to")
    _check_target(target, overwrite)
    try:
        partial_folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        try:
            made = partial_folder / "made"
            made.mkdir()
            rows, missing, columns = _write_tables(plan, made)
            if not rows:
                raise ConfigError(
                    "nothing to export: no cell is finished",
                    f"study {plan.study.name}, {plan.data_root}",
                    "run the study first, or set TAPROBE_DATA to the folder of its results",
                )
            text = readme(plan.study.name, rows, columns, missing)
            (made / "README.md").write_text(text, encoding="utf-8")
            if target.exists():
                target.rename(partial_folder / "earlier")
            made.rename(target)
        finally:
            shutil.rmtree(partial_folder, ignore_errors=True)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise ArtifactError(
            f"the export cannot be written ({error})",
            str(target),
            "make its parent folder, free space, or name another folder",
        ) from None
    return Export(target, rows, missing)


def _check_target(target: Path, overwrite: bool) -> None:
    if not target.exists() and not target.is_symlink():
        return
    if not overwrite:
        raise ConfigError(
            "the folder exists", str(target), "name a new one, or pass --overwrite to replace it"
        )
    readme_file = target / "README.md"
    is_export = readme_file.is_file() and readme_file.read_text("utf-8").startswith(HEAD)
    if target.is_symlink() or not target.is_dir() or not (is_export or not any(target.iterdir())):
        raise ConfigError(
            "what stands there is no earlier export, and is not overwritten",
            str(target),
            "name another folder, or remove this one yourself",
        )


def _write_tables(
    plan: Plan, folder: Path
) -> tuple[dict[str, int], dict[str, str], dict[str, pl.Schema]]:
    """Write every table; return rows, what is missing and the columns written, by table."""
    rows: dict[str, int] = {}
    missing: dict[str, str] = {}
    columns: dict[str, pl.Schema] = {}
    for table in EXPORTED:
        parts = _parts(plan, table, missing)
        if table.stage == "evaluation":
            # Their columns follow from the recipes; every file has those of all.
            parts = _alike(list(parts))
        for where, frame in parts:
            place = folder / table.name
            for name, value in where.items():
                place /= f"{name}={value}"
            place.mkdir(parents=True, exist_ok=True)
            write_table(place / "part-0.parquet", frame)
            rows[table.name] = rows.get(table.name, 0) + frame.height
            columns[table.name] = frame.schema
    return rows, missing, columns


_Part = tuple[dict[str, str | int], pl.DataFrame]


def _parts(plan: Plan, table: ExportedTable, missing: dict[str, str]) -> Iterator[_Part]:
    """Yield partition keys and rows of every finished cell of a table; note the others."""
    for cell in plan.stages.cells(plan.study, table.stage):
        found = attempted(partial(_read, plan, table, cell), f"{table.stage} {'/'.join(cell)}")
        if isinstance(found, TaprobeError):
            missing[f"{table.name} {'/'.join(cell)}"] = found.what
            continue
        where, frame = _place(plan, table.stage, cell), _plain(found)
        if "seed" not in frame.columns:
            yield where, frame
            continue
        for (seed,), part in frame.group_by("seed", maintain_order=True):
            yield {**where, "seed": int(str(seed))}, part.drop("seed")


def _read(plan: Plan, table: ExportedTable, cell: Cell) -> pl.DataFrame:
    if table.stage == "probe_fits":
        plan.open(table.stage, cell)
        return read_scores(plan, parse_site(cell[0]), parse_trial(cell[1]))
    return plan.read(table.stage, cell, table.name)


def _place(plan: Plan, stage: str, cell: Cell) -> dict[str, str | int]:
    own = dict(zip(plan.stages[stage].grid, cell, strict=True))
    site = parse_site(own["site"]) if "site" in own else None
    trial = parse_trial(own["trial"]) if "trial" in own else None
    return {
        "model": site.model if site else own["model"],
        "setting": trial.setting if trial else own["setting"],
        **({"layer": site.layer} if site else {}),
        **({"seed": trial.seed} if trial else {}),
    }


def _plain(frame: pl.DataFrame) -> pl.DataFrame:
    """Names as text: what other readers make of an enumeration differs."""
    return frame.with_columns(pl.col(pl.Enum).cast(pl.String))


def _alike(parts: list[_Part]) -> Iterator[_Part]:
    if not parts:
        return
    every = pl.concat([frame.clear() for _, frame in parts], how="diagonal_relaxed").schema
    for where, frame in parts:
        lacking = [pl.lit(None, dtype).alias(n) for n, dtype in every.items() if n not in frame]
        yield where, frame.with_columns(lacking).select(every.names())


def unit_of(name: str) -> str:
    """Return the unit of a column by its name."""
    return next((unit for pattern, unit in UNITS.items() if re.fullmatch(pattern, name)), "")


def readme(
    study: str,
    rows: Mapping[str, int],
    columns: Mapping[str, pl.Schema],
    missing: Mapping[str, str],
) -> str:
    """Return the README of an export, in Markdown.

    Args:
        study: its name.
        rows: table -> rows.
        columns: table -> columns of its files.
        missing: table and cell -> why it is left out.
    """
    lines = [
        f"{HEAD}{study}",
        "",
        "One folder per table, Parquet files partitioned as Hive does: model, setting, layer and "
        "seed are in the folders' names. `layer` counts from 0. Null is a value that is not "
        "defined.",
        "",
        "```python",
        "import pyarrow.dataset as ds",
        'frame = ds.dataset("predictions", partitioning="hive").to_table().to_pandas()',
        "```",
        "",
        "DuckDB: `SELECT * FROM read_parquet('predictions/**/*.parquet', "
        "hive_partitioning = true)`.",
    ]
    for table in EXPORTED:
        if table.name in rows:
            lines += ["", f"## {table.name}", "", f"{table.about} {rows[table.name]} rows.", ""]
            lines += ["| column | type | null | values | unit |", "|---|---|---|---|---|"]
            lines += _rows_of(table, columns[table.name])
    if missing:
        lines += ["", "## Missing", "", "Cells that were not finished, or could not be read:", ""]
        lines += [f"- {cell}: {why}" for cell, why in missing.items()]
    return "\n".join(lines) + "\n"


def _rows_of(table: ExportedTable, schema: pl.Schema) -> Iterator[str]:
    from taprobe_core import tables
    from taprobe_core.tables.contract import FINITE

    contract = getattr(tables, table.contract)
    for name in table.by:
        kind = "String" if name in ("model", "setting") else "Int64"
        yield f"| {name} | {kind} (folder) | no | | {unit_of(name)} |"
    for name, dtype in schema.items():
        asked = next(
            each
            for key, each in contract.columns.items()
            if key == name or (each.is_pattern and re.match(key, name))
        )
        values = list(getattr(asked.dtype, "categories", []))
        values += [rule.name for rule in asked.rules if rule is not FINITE]
        null = "yes" if asked.nullable else "no"
        yield f"| {name} | {dtype} | {null} | {', '.join(values)} | {unit_of(name)} |"
