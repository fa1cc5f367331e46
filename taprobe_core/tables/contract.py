"""What contracts are written with, and the check of a table against one.

The contracts themselves stand in the sibling modules.
"""

from __future__ import annotations

from typing import Any

import pandera.polars as pa
import polars as pl
from pandera.errors import SchemaErrors

from taprobe_core.errors import SchemaError


def column(dtype: Any, *checks: pa.Check, nullable: bool = False) -> pa.Column:
    """A column of a contract."""
    return pa.Column(dtype, checks=list(checks), nullable=nullable)


def at_least(bound: float) -> pa.Check:
    """Values from `bound` up."""
    return pa.Check.ge(bound)


def within(low: float, high: float) -> pa.Check:
    """Values from `low` to `high`, both included."""
    return pa.Check.in_range(low, high)


FINITE = pa.Check(
    lambda data: data.lazyframe.select(pl.col(data.key).is_finite()), name="finite", error="finite"
)

SENTENCE_KEY = {
    "problem_id": column(pl.Int64, at_least(0)),
    "sentence_idx": column(pl.Int64, at_least(0)),
}


_REPAIR = "repair the source record, or leave the problem out with rollouts.exclude_ids"


def check_table(
    frame: pl.DataFrame, schema: pa.DataFrameSchema, where: str, fix: str = _REPAIR
) -> pl.DataFrame:
    """Return `frame` if it keeps `schema`.

    Args:
        frame: candidate table.
        schema: one of this package's contracts.
        where: what the table was made from, for the message.
        fix: what to do about a fault.

    Raises:
        SchemaError: lists every fault, each with up to five offending values.
    """
    try:
        checked: pl.DataFrame = schema.validate(frame, lazy=True)
    except SchemaErrors as error:
        raise SchemaError(
            f"table {schema.name!r} breaks its contract",
            where,
            fix,
            _faults(error.failure_cases),
        ) from None
    return checked


def _faults(cases: pl.DataFrame) -> list[str]:
    grouped = cases.group_by("column", "check", maintain_order=True).agg(
        pl.col("failure_case").cast(pl.String).head(5).alias("found"),
        pl.col("index").head(5).alias("rows"),
        pl.len().alias("n"),
    )
    return [_fault(row) for row in grouped.iter_rows(named=True)]


def _fault(row: dict[str, Any]) -> str:
    found = ", ".join(str(value) for value in row["found"])
    rows = [index for index in row["rows"] if index is not None]
    at = f" at row {', '.join(map(str, rows))}" if rows else ""
    column = f"column {row['column']!r}: " if row["column"] else ""
    return f"{column}{row['check']}, {row['n']} fault(s), found {found}{at}"
