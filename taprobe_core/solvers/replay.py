"""Work on a CUDA device that recurs, recorded as a graph and replayed, so that the host is free.

A step of a small model is some hundred short kernels, which Python hands out more slowly than the
device runs them. What does not belong here: which work recurs.

Source: CUDA graphs, as PyTorch wraps them (`torch.cuda.CUDAGraph`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

_T = TypeVar("_T")
_own = threading.local()


@contextmanager
def recordable(device: torch.device) -> Iterator[None]:
    """Run the block where work can be recorded: on CUDA, on a stream of the thread's own.

    The block may use what the caller has queued, and the caller what the block leaves.
    """
    if device.type != "cuda":
        yield
        return
    before = torch.cuda.current_stream(device)
    streams: dict[torch.device, torch.cuda.Stream] = _own.__dict__.setdefault("streams", {})
    if before.device not in streams:
        streams[before.device] = torch.cuda.Stream(before.device)  # type: ignore[no-untyped-call]
    stream = streams[before.device]
    stream.wait_stream(before)
    try:
        with torch.cuda.stream(stream):
            yield
    finally:
        # Memory of one stream may be given out again as soon as that stream is done with it.
        stream.synchronize()


class Replays:
    """Recorded work, by name. To be used inside `recordable`."""

    def __init__(self, *, is_warm: bool = False) -> None:
        """Start without records.

        Args:
            is_warm: whether work of this kind has run before: what is done only once, like loading
                kernels, cannot be recorded.
        """
        self._is_warm = is_warm
        self._recorded: dict[Hashable, tuple[torch.cuda.CUDAGraph, Any]] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def run(self, name: Hashable, work: Callable[[], _T]) -> _T:
        """Do the work: recorded the first time, replayed from then on.

        Args:
            name: of the work.
            work: reads and writes the same memory, of equal shapes, whenever it has this name, and
                never waits for the device.

        Returns:
            What the work returns; its tensors hold until any work is run again.
        """
        if name in self._recorded:
            graph, found = self._recorded[name]
            graph.replay()
            return found  # type: ignore[no-any-return]
        if not self._is_warm:
            self._is_warm = True
            return work()
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        try:
            found = work()
        finally:
            graph.capture_end()
        self._recorded[name] = (graph, found)
        graph.replay()
        return found
