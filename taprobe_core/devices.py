"""What a device has and allows: kernels of our own, memory, threads, precision of products.

Small products take longer to share out than to compute, and on a machine whose other cores are
busy, threads that wait for each other thousands of times a second make a fit of seconds one of
minutes. So a small solve has one thread and as many run at once as there are cores; a large one has
them all.

What does not belong here: what runs on a device, and which solves may be rounded
(`pipeline.fit`).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from typing import TypeVar

import torch

from taprobe_core.study import Precision


@cache
def has_triton() -> bool:
    """Whether the compiler of the kernels is there; PyTorch for Windows comes without it."""
    return find_spec("triton") is not None


def free_bytes(device: torch.device, on_cpu: int) -> int:
    """Return the bytes that a solve may take: half of what is free on CUDA.

    Args:
        device: where it computes.
        on_cpu: the answer for other devices.
    """
    if device.type != "cuda":
        return on_cpu
    free, _ = torch.cuda.mem_get_info(device)
    idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return (free + idle) // 2


T = TypeVar("T")
R = TypeVar("R")

MAX_VALUES_ON_ONE_THREAD = 5_000_000
"""Rows times features, or tokens times width."""

_large = threading.Lock()


@contextmanager
def threads_for(n_values: int) -> Iterator[None]:
    """Give a solve one thread, or all of them if it is large; one large solve at a time.

    PyTorch's number of threads belongs to the thread that asks; it is given back.

    Args:
        n_values: size of what the products read.
    """
    if n_values <= MAX_VALUES_ON_ONE_THREAD:
        with _threads(1):
            yield
    else:
        with _large, _threads(_cores()):
            yield


@contextmanager
def _threads(n: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _cores() -> int:
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return int(asked) if asked.isdigit() and int(asked) else len(os.sched_getaffinity(0))


def side_by_side(work: Callable[[T], R], items: Sequence[T]) -> Iterator[R]:
    """Work on items in as many threads as there are cores; yield results in their order.

    An error is raised where its item's result would stand; what has not begun by then is left.

    Args:
        work: mostly solves, which leave the interpreter to other threads.
        items: what to work on.
    """
    n = min(_cores(), len(items))
    if n < 2:
        yield from map(work, items)
        return
    pool = ThreadPoolExecutor(n)
    try:
        for future in [pool.submit(work, item) for item in items]:
            yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)


_turn = threading.Lock()
"""The setting is the process's, so that solves on CUDA take turns; they share its memory, too."""


@contextmanager
def products_in(precision: Precision, device: str) -> Iterator[None]:
    """Compute float32 products of a solve in `precision`, where the solve is on CUDA.

    Args:
        precision: `tf32` rounds the factors to 10 bits of mantissa and sums in float32.
        device: of the solve, as PyTorch names it; others than CUDA know float32 alone.
    """
    if torch.device(device).type != "cuda":
        yield
        return
    with _turn:
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
        try:
            yield
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before
