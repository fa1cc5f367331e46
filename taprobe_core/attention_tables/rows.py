"""Arrays to rows, NaN to null."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import polars as pl


def long_rows(problem_id: int, dimensions: Sequence[str], **values: Any) -> pl.DataFrame:
    """Lay arrays of equal shape out as rows.

    Args:
        problem_id: fills column `problem_id`.
        dimensions: a column for each dimension, which holds the index along it.
        values: a column for each array.
    """
    indices = np.indices(next(iter(values.values())).shape)
    return pl.DataFrame(
        {
            "problem_id": np.full(indices[0].size, problem_id, dtype=np.int64),
            **{name: at.ravel() for name, at in zip(dimensions, indices, strict=True)},
            **{name: each.ravel() for name, each in values.items()},
        }
    )


def joined(frames: Iterable[pl.DataFrame]) -> pl.DataFrame:
    """Stack frames; NaN, which says that there is no value, becomes null.

    Args:
        frames: of one schema.
    """
    return pl.concat(frames).with_columns(pl.col(pl.Float64).fill_nan(None))
