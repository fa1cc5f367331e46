"""How many threads a solve gets."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from threadpoolctl import threadpool_limits

MAX_VALUES_ON_ONE_THREAD = 5_000_000
"""Rows times features, or tokens times width."""


@contextmanager
def threads_for(n_values: int) -> Iterator[None]:
    """Keep small products on one thread: sharing them out takes longer than computing them.

    On a machine whose other cores are busy, threads that wait for each other thousands of times a
    second make a fit of seconds one of minutes. The number of threads is given back.

    Args:
        n_values: size of what the products read.
    """
    if n_values > MAX_VALUES_ON_ONE_THREAD:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1):
            yield
    finally:
        torch.set_num_threads(before)
