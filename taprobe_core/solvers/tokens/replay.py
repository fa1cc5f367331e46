"""Work on a CUDA device that recurs, recorded as a graph and replayed, so that the host is free.

A step of a small model is some hundred short kernels, which Python hands out more slowly than the
device runs them. What does not belong here: which work recurs.

Source: CUDA graphs, as PyTorch wraps them (`torch.cuda.CUDAGraph`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, TypeVar

import torch

_T = TypeVar("_T")
_turn = threading.Lock()
"""Memory cannot be freed while another thread records: blocks take turns."""


class Recorder:
    """Memory that records share: one after another, never at once.

    While work is recorded the allocator cannot free what it keeps for later, nor memory of records
    that are gone: so all records have one pool, which an unused one keeps alive.
    """

    def __init__(self, device: torch.device) -> None:
        self.pool = torch.cuda.graph_pool_handle()
        work = partial(torch.zeros, 1, device=device)
        work()
        self._keeper: torch.cuda.CUDAGraph | None = self.record(work)[0]

    def close(self) -> None:
        """Give the memory back once the last record is gone."""
        self._keeper = None

    def record(self, work: Callable[[], _T]) -> tuple[torch.cuda.CUDAGraph, _T]:
        """Record work, which is not done, and return what it will write to."""
        graph = torch.cuda.CUDAGraph()
        # Other threads may go on allocating.
        graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
        try:
            found = work()
        finally:
            graph.capture_end()
        return graph, found


@contextmanager
def recording(device: torch.device) -> Iterator[Recorder | None]:
    """Run the block where work can be recorded: on CUDA, on a stream of its own.

    The block may use what the caller has queued, and the caller what the block leaves. Memory that
    the allocator keeps for later is freed before and after.

    Yields:
        A recorder; None on other devices.
    """
    if device.type != "cuda":
        yield None
        return
    with _turn:
        before = torch.cuda.current_stream(device)
        stream = _stream(before.device)
        stream.wait_stream(before)
        torch.cuda.empty_cache()
        with torch.cuda.stream(stream):
            recorder = Recorder(before.device)
            try:
                yield recorder
            finally:
                # Memory of a stream may be given out again as soon as that stream is done with it.
                stream.synchronize()
                recorder.close()
                torch.cuda.empty_cache()


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """Return one stream for all blocks; libraries keep memory for every stream they have seen."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


class Replays:
    """Recorded work, by name."""

    def __init__(self, recorder: Recorder, *, is_warm: bool = False) -> None:
        """Start without records.

        Args:
            recorder: of the block that this is used in.
            is_warm: whether work of this kind has run before: what is done only once, like loading
                kernels, cannot be recorded.
        """
        self.recorder = recorder
        self._is_warm = is_warm
        self._recorded: dict[Hashable, tuple[torch.cuda.CUDAGraph, Any]] = {}

    def run(self, name: Hashable, work: Callable[[], _T]) -> _T:
        """Do the work: recorded the first time, replayed from then on.

        Args:
            name: of the work.
            work: reads and writes the same memory, of equal shapes, whenever it has this name, and
                never waits for the device.

        Returns:
            What the work returns; its tensors hold until any work is run again.
        """
        if not self._is_warm:
            self._is_warm = True
            return work()
        if name not in self._recorded:
            self._recorded[name] = self.recorder.record(work)
        graph, found = self._recorded[name]
        graph.replay()
        return found  # type: ignore[no-any-return]
