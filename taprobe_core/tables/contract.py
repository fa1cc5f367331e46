"""What contracts are written with, and the check of a table against one.

The contracts themselves stand in the sibling modules. All rules of a table are asked in one query:
tables are many and small, so that a query a column is what a check costs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import polars as pl

from taprobe_core.errors import SchemaError


class Rule(NamedTuple):
    """What every value of a column keeps; null keeps every rule."""

    name: str
    holds: Callable[[pl.Expr], pl.Expr]


class Column(NamedTuple):
    """One column of a contract, or all columns whose whole name is a pattern, if there are any."""

    dtype: Any
    rules: tuple[Rule, ...] = ()
    nullable: bool = False
    is_pattern: bool = False


@dataclass(frozen=True, slots=True)
class Contract:
    """The columns of a table, and what is unique.

    Attributes:
        columns: by name, or by the pattern of their names. A table has no others.
        name: of the table.
        unique: columns whose values together name one row.
        ordered: the columns stand in this order.
    """

    columns: Mapping[str, Column]
    name: str
    unique: Sequence[str] = ()
    ordered: bool = False


def column(dtype: Any, *rules: Rule, nullable: bool = False) -> Column:
    """A column of a contract."""
    return Column(dtype, rules, nullable)


def at_least(bound: float) -> Rule:
    """Values from `bound` up."""
    return Rule(f"at least {bound}", lambda value: value >= bound)


def within(low: float, high: float) -> Rule:
    """Values from `low` to `high`, both included."""
    return Rule(f"from {low} to {high}", lambda value: value.is_between(low, high))


FINITE = Rule("finite", lambda value: value.is_finite())
_PRESENT = Rule("not null", lambda value: value.is_not_null())
_NUMBER = Rule("not NaN", lambda value: value.is_not_nan())

SENTENCE_KEY = {
    "problem_id": column(pl.Int64, at_least(0)),
    "sentence_idx": column(pl.Int64, at_least(0)),
}

_N_SHOWN = 5
_REPAIR = "repair the source record, or leave the problem out with rollouts.exclude_ids"


def schema_of(contract: Contract) -> pl.Schema:
    """Return the columns and types that a contract asks for, to build a table with."""
    return pl.Schema({name: column.dtype for name, column in contract.columns.items()})


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
    faults = [*_shape_faults(frame, contract)] or [*_value_faults(frame, contract)]
    if faults:
        raise SchemaError(f"table {contract.name!r} breaks its contract", where, fix, faults)
    return frame


def _columns_of(contract: Contract, names: Sequence[str]) -> dict[str, Column]:
    """The columns of a table that the contract knows."""
    patterns = [(re.compile(n), c) for n, c in contract.columns.items() if c.is_pattern]
    known = {n: c for n, c in contract.columns.items() if not c.is_pattern}
    for name in names:
        for pattern, found in patterns:
            if name not in known and pattern.fullmatch(name):
                known[name] = found
    return known


def _shape_faults(frame: pl.DataFrame, contract: Contract) -> Iterator[str]:
    known = _columns_of(contract, frame.columns)
    for name in known:
        if name not in frame.columns:
            yield f"column {name!r}: missing"
        elif frame.schema[name] != known[name].dtype:
            yield f"column {name!r}: want {known[name].dtype}, found {frame.schema[name]}"
    yield from (
        f"column {name!r}: not of this table" for name in frame.columns if name not in known
    )
    if contract.ordered and set(known) == set(frame.columns) and [*known] != frame.columns:
        yield f"columns out of order: want {', '.join(known)}, found {', '.join(frame.columns)}"


def _value_faults(frame: pl.DataFrame, contract: Contract) -> Iterator[str]:
    asked = [
        (name, rule)
        for name, column in _columns_of(contract, frame.columns).items()
        for rule in (
            *(() if column.nullable else (_PRESENT,)),
            # Not a number is no value: what is not defined is null.
            *((_NUMBER,) if frame.schema[name].is_float() and FINITE not in column.rules else ()),
            *column.rules,
        )
    ]
    broken = [~rule.holds(pl.col(name)).fill_null(value=True) for name, rule in asked]
    counts = [expr.sum().alias(str(place)) for place, expr in enumerate(broken)]
    repeated = pl.struct(contract.unique).is_duplicated() if contract.unique else pl.lit(False)
    (found,) = frame.select(*counts, repeated.sum().alias("repeated")).rows() or [()]
    for (name, rule), expr, n in zip(asked, broken, found, strict=False):
        if n:
            yield _fault(frame, f"column {name!r}: {rule.name}", pl.col(name), expr, n)
    if found and found[-1]:
        key = pl.struct(contract.unique)
        yield _fault(frame, f"unique {', '.join(contract.unique)}", key, repeated, found[-1])


def _fault(frame: pl.DataFrame, rule: str, value: pl.Expr, broken: pl.Expr, n: int) -> str:
    rows = (
        frame.select(value.alias("value")).with_row_index().filter(frame.select(broken).to_series())
    )
    shown = rows.head(_N_SHOWN)
    values = ", ".join(
        "/".join(map(str, each.values())) if isinstance(each, dict) else str(each)
        for each in shown["value"].to_list()
    )
    return f"{rule}, {n} fault(s), found {values} at row {', '.join(map(str, shown['index']))}"
