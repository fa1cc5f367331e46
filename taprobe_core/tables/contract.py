"""What contracts are written with, and the check of a table against one.

The contracts themselves stand in the sibling modules. They are plain values: pandera, which takes
pandas with it, is loaded where a table is checked, not where a contract is read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import inf
from typing import TYPE_CHECKING, Any, NamedTuple

import polars as pl

from taprobe_core.errors import SchemaError

if TYPE_CHECKING:
    import pandera.polars as pa


class Range(NamedTuple):
    """Values from `low` to `high`, both included; without bounds any finite number."""

    low: float = -inf
    high: float = inf


FINITE = Range()


@dataclass(frozen=True)
class Column:
    """A column of a contract; with `is_pattern` every column whose name is the key, any number."""

    dtype: Any
    ranges: tuple[Range, ...] = ()
    nullable: bool = False
    is_pattern: bool = False


@dataclass(frozen=True, eq=False)
class Contract:
    """A table: its columns and no others, in this order unless some are patterns; its key."""

    columns: Mapping[str, Column]
    name: str
    unique: Sequence[str] = ()


def column(dtype: Any, *ranges: Range, nullable: bool = False) -> Column:
    """A column of a contract."""
    return Column(dtype, ranges, nullable)


def at_least(bound: float) -> Range:
    """Values from `bound` up."""
    return Range(bound)


def within(low: float, high: float) -> Range:
    """Values from `low` to `high`, both included."""
    return Range(low, high)


SENTENCE_KEY = {
    "problem_id": column(pl.Int64, at_least(0)),
    "sentence_idx": column(pl.Int64, at_least(0)),
}


_REPAIR = "repair the source record, or leave the problem out with rollouts.exclude_ids"


def check_table(
    frame: pl.DataFrame, contract: Contract, where: str, fix: str = _REPAIR
) -> pl.DataFrame:
    """Return `frame` if it keeps `contract`.

    Args:
        frame: candidate table.
        contract: one of this package's.
        where: what the table was made from, for the message.
        fix: what to do about a fault.

    Raises:
        SchemaError: lists every fault, each with up to five offending values.
    """
    from pandera.errors import SchemaErrors

    try:
        checked: pl.DataFrame = _schema(contract).validate(frame, lazy=True)
    except SchemaErrors as error:
        raise SchemaError(
            f"table {contract.name!r} breaks its contract",
            where,
            fix,
            _faults(error.failure_cases),
        ) from None
    return checked


@cache
def _schema(contract: Contract) -> pa.DataFrameSchema:
    import pandera.polars as pa

    def check(bounds: Range) -> pa.Check:
        if bounds == FINITE:
            return pa.Check(
                lambda data: data.lazyframe.select(pl.col(data.key).is_finite()),
                name="finite",
                error="finite",
            )
        return pa.Check.ge(bounds.low) if bounds.high == inf else pa.Check.in_range(*bounds)

    columns = {
        name: pa.Column(
            each.dtype,
            checks=[check(bounds) for bounds in each.ranges],
            nullable=each.nullable,
            regex=each.is_pattern,
            required=not each.is_pattern,
            name=name,
        )
        for name, each in contract.columns.items()
    }
    is_ordered = not any(each.is_pattern for each in contract.columns.values())
    return pa.DataFrameSchema(
        columns,
        strict=True,
        ordered=is_ordered,
        unique=list(contract.unique) or None,
        name=contract.name,
    )


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
