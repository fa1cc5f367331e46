"""What there is to show of an artifact, and the summaries that it is made with.

What does not belong here: which numbers describe which stage (describe).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import polars as pl


@dataclass(frozen=True)
class Description:
    """What to show of one artifact.

    Attributes:
        metrics: numbers, named as in the tables they come from.
        n_rows: rows of its main table; None where there is none.
        picture: a PNG as a data URI; None where there is none.
        tables: short tables by name, to be shown whole.
    """

    metrics: Mapping[str, float] = field(default_factory=dict)
    n_rows: int | None = None
    picture: str | None = None
    tables: Mapping[str, pl.DataFrame] = field(default_factory=dict)


def present(metrics: Mapping[str, float | None]) -> dict[str, float]:
    """Leave out what is not defined: a missing point is honest, a plotted zero is not."""
    return {name: float(value) for name, value in metrics.items() if value is not None}


def mean(values: pl.Series) -> float | None:
    """Mean of the values that are there."""
    return values.cast(pl.Float64).mean()  # type: ignore[return-value]


def median(values: pl.Series) -> float | None:
    """Median of the values that are there."""
    return values.cast(pl.Float64).median()  # type: ignore[return-value]


def largest(values: pl.Series) -> float | None:
    """Largest of the values that are there."""
    return values.cast(pl.Float64).max()  # type: ignore[return-value]
