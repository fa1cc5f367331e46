"""From an outcome of the core to a Dagster event, one per cell.

A backfill of many cells is one run, so events are emitted cell by cell as work completes, each with
its own data version: the store's fingerprint. Dagster's own output events would give all cells of
a run one version; and a crash would lose those of the cells that were done. What the events say
beside the fingerprint (inputs' versions and positions) is what Dagster's staleness reads.

Concept: https://docs.dagster.io/guides/build/assets/asset-versioning-and-caching
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import dagster as dg
import polars as pl
import polars.selectors as cs
from dagster._core.definitions.data_version import (
    CODE_VERSION_TAG,
    DATA_VERSION_IS_USER_PROVIDED_TAG,
    DATA_VERSION_TAG,
    INPUT_DATA_VERSION_TAG_PREFIX,
    INPUT_EVENT_POINTER_TAG_PREFIX,
)
from dagster._core.events import DagsterEventType
from dagster._core.storage.asset_check_execution_record import AssetCheckExecutionRecord

from taprobe_core.pipeline import (
    STAGES,
    Cell,
    Description,
    Failure,
    Outcome,
    Plan,
    Verdict,
    stage_verdicts,
    stages_of,
)
from taprobe_dagster.partitions import partition_key

_SHOWN_INPUTS = 20


def materialization(
    stage: str,
    cell: Cell,
    outcome: Outcome,
    description: Description,
    inputs: Mapping[str, str],
) -> dg.AssetMaterialization:
    """The event of one committed cell.

    Args:
        stage: asset name.
        cell: its partition keys.
        outcome: what the core left behind.
        description: metrics and picture of the artifact.
        inputs: provenance tags of the inputs, from `input_tags`.
    """
    return dg.AssetMaterialization(
        asset_key=stage,
        partition=partition_key(stage, cell),
        metadata=cell_metadata(outcome, description),
        tags={
            DATA_VERSION_TAG: outcome.key.fingerprint,
            CODE_VERSION_TAG: STAGES[stage].code_version,
            DATA_VERSION_IS_USER_PROVIDED_TAG: "true",
            **inputs,
        },
    )


def failure_event(failure: Failure) -> dg.AssetObservation:
    """The event of one cell that failed: what, where, how to mend it.

    Dagster's own failed-to-materialize event is refused by every storage but that of its hosted
    product. The run ends as failed, which marks the partition; this event tells why.

    Args:
        failure: of the core.
    """
    traces = [each.trace for each in failure.faults if each.trace]
    return dg.AssetObservation(
        asset_key=failure.stage,
        partition=partition_key(failure.stage, failure.cell),
        description=f"{failure.headline}: {failure.details}",
        metadata={
            "failed": True,
            "error": _lines(dict.fromkeys(type(each.error).__name__ for each in failure.faults)),
            "what": _lines(failure.lines),
            "where": _lines(dict.fromkeys(each.error.where or "" for each in failure.faults)),
            "fix": failure.fix,
            "n_faults": len(failure.faults),
            **({"traceback": dg.MetadataValue.md(f"```\n{traces[0]}\n```")} if traces else {}),
        },
    )


def input_tags(instance: dg.DagsterInstance, parents: Sequence[str]) -> dict[str, str]:
    """Provenance tags that say up to which event each input of a stage has been read.

    Called when a stage starts: its inputs are committed by then, so an input event after this
    point with another data version makes the cell stale, and no other does.
    """
    tags: dict[str, str] = {}
    for parent in parents or ("dataset",):
        record = instance.get_latest_data_version_record(dg.AssetKey(parent), parent == "dataset")
        version = _data_version(record)
        tags[f"{INPUT_DATA_VERSION_TAG_PREFIX}/{parent}"] = version
        tags[f"{INPUT_EVENT_POINTER_TAG_PREFIX}/{parent}"] = str(record.storage_id if record else 0)
    return tags


def _data_version(record: dg.EventLogRecord | None) -> str:
    if record is None:
        return "INITIAL"
    event = record.asset_materialization or record.event_log_entry.asset_observation
    return (event.tags or {}).get(DATA_VERSION_TAG, "INITIAL") if event else "INITIAL"


def cell_metadata(outcome: Outcome, description: Description) -> dict[str, dg.MetadataValue]:
    """What the UI shows for one cell: identity first, then metrics, tables, picture, provenance."""
    artifact = outcome.artifact
    metadata: dict[str, dg.MetadataValue] = {
        "fingerprint": dg.MetadataValue.text(outcome.key.fingerprint),
        "path": dg.MetadataValue.path(str(artifact.path)),
        "is_reused": dg.MetadataValue.bool(outcome.is_reused),
        "duration_s": dg.MetadataValue.float(outcome.duration_s),
    }
    if description.n_rows is not None:
        metadata["dagster/row_count"] = dg.MetadataValue.int(description.n_rows)
    metadata |= {
        name: dg.MetadataValue.float(float(value)) for name, value in description.metrics.items()
    }
    metadata |= {name: _table(frame) for name, frame in description.tables.items()}
    if description.picture is not None:
        metadata["picture"] = dg.MetadataValue.md(f"![{outcome.key.stage}]({description.picture})")
    metadata |= {
        name: dg.MetadataValue.text(str(value))
        for name, value in artifact.manifest.provenance.items()
        if value is not None
    }
    upstream = list(artifact.manifest.upstream)
    metadata["upstream"] = dg.MetadataValue.json(upstream[:_SHOWN_INPUTS])
    return metadata


def check_result(stage: str, check: str, verdicts: Sequence[Verdict]) -> dg.AssetCheckResult:
    """What one check says of an asset: of all its stored cells, whichever run made them.

    To Dagster a check has one state for all partitions, so a cell that fails keeps it red, however
    many others pass, until it is mended or waived.

    Args:
        stage: asset name.
        check: name of the check.
        verdicts: what it says of each stored cell.
    """
    red = [each for each in verdicts if each.is_red]
    waived = [each for each in verdicts if each.status == "failed" and each.waiver]
    n_passed = sum(each.status == "passed" for each in verdicts)
    metadata: dict[str, Any] = {
        "n_cells": len(verdicts),
        "n_passed": n_passed,
        "n_failed": len(red),
        "n_waived": len(waived),
        "n_not_run": len(verdicts) - n_passed - len(red) - len(waived),
        "n_faults": sum(len(each.faults) for each in red),
        "faults": _lines(f"{each.place}: {fault}" for each in red for fault in each.faults),
    }
    if red:
        metadata["failing_cells"] = dg.MetadataValue.json([each.place for each in red])
        metadata["fix"] = _lines(dict.fromkeys(each.fix for each in red))
        metadata["artifacts"] = _lines(each.path for each in red)
    if waived:
        metadata["waivers"] = _lines(
            f"{each.place}: {each.waiver.reason} (found: {'; '.join(each.faults)})"
            for each in waived
            if each.waiver
        )
    if notes := dict.fromkeys(each.note for each in verdicts if each.note):
        metadata["not_run"] = _lines(filter(None, notes))
    # The figures of the cell to look at: of the first that fails, else of the first.
    for name, value in next((each.numbers for each in [*red, *verdicts]), {}).items():
        metadata[name] = float(value)
    warns = not STAGES[stage].checks[check].is_blocking
    return dg.AssetCheckResult(
        asset_key=stage,
        check_name=check,
        passed=not red,
        severity=dg.AssetCheckSeverity.WARN if warns else dg.AssetCheckSeverity.ERROR,
        description=None if verdicts else "no stored cell that this check looks at",
        metadata=metadata,
    )


def _lines(texts: Iterable[str]) -> str:
    return "\n".join(list(texts)[:_SHOWN_INPUTS]) or "none"


def refresh_checks(instance: dg.DagsterInstance, plan: Plan) -> None:
    """Tell the event log what the checks say now, where it says otherwise.

    A waiver changes what a check says without a run of its asset, and so does a store that somebody
    mended.
    """
    keys = {
        dg.AssetCheckKey(dg.AssetKey(stage), name): stage
        for stage in stages_of(plan.study)
        for name in STAGES[stage].checks
    }
    logged = instance.event_log_storage.get_latest_asset_check_execution_by_key(list(keys))
    for key, stage in keys.items():
        verdicts = stage_verdicts(plan, stage, key.name, looks=False)
        now = check_result(stage, key.name, verdicts)
        if verdicts and _said(logged.get(key)) != (now.passed, _counts(now.metadata)):
            instance.report_runless_asset_event(
                dg.AssetCheckEvaluation(
                    asset_key=key.asset_key,
                    check_name=key.name,
                    passed=now.passed,
                    metadata=now.metadata,
                    severity=now.severity,
                    description=now.description,
                    blocking=STAGES[stage].checks[key.name].is_blocking,
                )
            )


def _said(record: AssetCheckExecutionRecord | None) -> tuple[bool, list[object]] | None:
    event = record.event.dagster_event if record and record.event else None
    if event is None or event.event_type != DagsterEventType.ASSET_CHECK_EVALUATION:
        return None
    evaluation = event.asset_check_evaluation_data
    return evaluation.passed, _counts(evaluation.metadata)


def _counts(metadata: Mapping[str, Any]) -> list[object]:
    named = ("n_cells", "n_passed", "n_failed", "n_waived", "n_not_run", "faults", "waivers")
    return [getattr(metadata.get(name), "value", metadata.get(name)) for name in named]


def _table(frame: pl.DataFrame) -> dg.TableMetadataValue:
    """A short table, with the types of its columns."""
    columns = [
        dg.TableColumn(
            name,
            "int" if dtype.is_integer() else "float" if dtype.is_float() else "string",
        )
        for name, dtype in frame.schema.items()
    ]
    rounded = frame.with_columns(cs.float().round_sig_figs(4), cs.enum().cast(pl.String))
    records = [dg.TableRecord(row) for row in rounded.to_dicts()]
    return dg.MetadataValue.table(records, dg.TableSchema(columns))
