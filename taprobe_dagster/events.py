"""From an outcome of the core to a Dagster event, one per cell.

A backfill of many cells is one run, so events are emitted cell by cell as work completes, each with
its own data version: the store's fingerprint. Dagster's own output events would give all cells of
a run one version; and a crash would lose those of the cells that were done. What the events say
beside the fingerprint (inputs' versions and positions) is what Dagster's staleness reads.

Concept: https://docs.dagster.io/guides/build/assets/asset-versioning-and-caching
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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

from taprobe_core.pipeline import CODE_VERSIONS, Cell, Description, Outcome
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
            CODE_VERSION_TAG: CODE_VERSIONS[stage],
            DATA_VERSION_IS_USER_PROVIDED_TAG: "true",
            **inputs,
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
