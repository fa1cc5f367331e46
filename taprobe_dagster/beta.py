"""The Dagster features we use that are marked beta, and why; nothing else may warn unseen.

- `MultiPartitionMapping` (in `partitions`): the way from one two-dimensional grid to another.
- `observable_source_asset` (in `sources`): the dataset's files get a data version of their own.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import dagster as dg


@contextmanager
def accepted_beta() -> Iterator[None]:
    """Silence Dagster's beta warning inside the block; every use is listed above."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dg.BetaWarning)
        yield
