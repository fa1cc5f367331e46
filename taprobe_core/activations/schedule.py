"""Packs over devices, one after the other in step or ahead of whoever takes the results; progress.

On a CPU a pass begins when its results are asked for. On CUDA a thread per model queues packs, so
that no device waits for the host, for another device, or for results to be taken. How far an
extraction is gets said by snapshots made from counts and a clock reading; tokens are the measure of
what is left, since texts differ in length tenfold. What does not belong here: which texts make a
pack, what a pack does, and printing.

The invariant: short memory makes packs smaller and is logged; a text that the model fails on costs
itself, and the others of its pack run without it; whatever ends the iteration ends the threads.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Condition
from typing import TypeVar

import torch
from torch import nn

from taprobe_core.activations.cost import duration_text
from taprobe_core.activations.passes import QueuedPack, TextShards
from taprobe_core.activations.tasks import ExtractOptions, TextTask
from taprobe_core.errors import ModelError, TaprobeError, attempted


@dataclass(frozen=True)
class Progress:
    """One moment of an extraction.

    Attributes:
        n_texts_done: texts finished.
        n_texts: texts in all.
        n_tokens_done: tokens of the finished texts.
        n_tokens: tokens of all texts.
        elapsed_s: seconds since the start, the consumer's own work between texts included.
    """

    n_texts_done: int
    n_texts: int
    n_tokens_done: int
    n_tokens: int
    elapsed_s: float

    @property
    def tokens_per_s(self) -> float | None:
        """Mean rate since the start; None before anything is measured."""
        is_known = self.elapsed_s > 0 and self.n_tokens_done
        return self.n_tokens_done / self.elapsed_s if is_known else None

    @property
    def eta_s(self) -> float | None:
        """Seconds left at the mean rate; None before anything is measured."""
        left = self.n_tokens - self.n_tokens_done
        if not left:
            return 0.0
        rate = self.tokens_per_s
        return None if rate is None else left / rate

    def render(self) -> str:
        """Return one line for a log.

        Example:
            >>> Progress(1, 4, 500, 2000, 10.0).render()
            '1/4 texts, 500/2,000 tokens (25 %), 50 tokens/s, 30 s left'
        """
        share = 100 * self.n_tokens_done // self.n_tokens if self.n_tokens else 100
        parts = [
            f"{self.n_texts_done}/{self.n_texts} texts",
            f"{self.n_tokens_done:,}/{self.n_tokens:,} tokens ({share} %)",
        ]
        rate, eta = self.tokens_per_s, self.eta_s
        if rate is not None and eta is not None:
            parts.append(f"{rate:,.0f} tokens/s")
            parts.append(f"{duration_text(eta)} left")
        return ", ".join(parts)


_log = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")

N_WRITERS = 8
"""Threads that commit texts while an accelerator goes on: the texts of a pack side by side, each
waiting for the disk or hashing outside the interpreter's lock."""

_AHEAD = 2
"""Packs of a device in flight: one running, one queued behind it."""

Packs = Sequence[Sequence[TextTask]]


def run_in_step(
    models: Sequence[nn.Module], packs: Packs, options: ExtractOptions
) -> Iterator[TextShards]:
    """Run one pack after the other, each when its first text is asked for.

    Args:
        models: equal weights; packs go round them.
        packs: texts of each pass, in order.
        options: what to keep.

    Yields:
        Each text; one that fails, or is too long for the memory, with its error at every layer.
    """
    waiting = deque(packs)
    n_run = 0
    while waiting:
        tasks = waiting.popleft()
        pack = _queued(models[n_run % len(models)], tasks, options)
        if pack is None:
            waiting.extendleft(reversed(_halves(tasks)))
            continue
        n_run += 1
        yield from pack.results()


def run_ahead(
    models: Sequence[nn.Module], packs: Packs, options: ExtractOptions
) -> Iterator[TextShards]:
    """Keep every model's device busy, and yield texts as their packs are done.

    Args:
        models: equal weights, each on devices of its own.
        packs: texts of each pass; the first ones begin first.
        options: what to keep.

    Yields:
        Each text; one that fails, or is too long for the memory, with its error at every layer.
    """
    lanes = _Lanes(packs, options)
    with ThreadPoolExecutor(len(models), thread_name_prefix="lane") as threads:
        runs = [threads.submit(lanes.run, model) for model in models]
        try:
            n_left = len(models)
            while n_left:
                item = lanes.done.get()
                if item is None:
                    n_left -= 1
                    continue
                model, pack = item
                yield from pack.results()
                lanes.release(model)
            for run in runs:
                run.result()
        finally:
            lanes.stop()


def each_ahead(work: Callable[[T], R], items: Iterable[T], n_threads: int) -> Iterator[tuple[T, R]]:
    """Yield each item with what some work on it returned, in order.

    Args:
        work: is done by threads while the next items are made; what it raises is raised here.
        items: are taken at most twice as many ahead as there are threads.
        n_threads: 0 does the work here, before the next item is asked for.
    """
    if not n_threads:
        yield from ((item, work(item)) for item in items)
        return
    with ThreadPoolExecutor(n_threads, thread_name_prefix="ahead") as threads:
        pending: deque[tuple[T, Future[R]]] = deque()
        for item in items:
            pending.append((item, threads.submit(work, item)))
            while len(pending) > 2 * n_threads or (pending and pending[0][1].done()):
                first, future = pending.popleft()
                yield first, future.result()
        for first, future in pending:
            yield first, future.result()


class _Lanes:
    """What the threads share: packs that wait, packs in flight, packs that are queued."""

    def __init__(self, packs: Packs, options: ExtractOptions) -> None:
        self.done: SimpleQueue[tuple[nn.Module, QueuedPack | _FailedText] | None] = SimpleQueue()
        self._options = options
        self._waiting = deque(packs)
        self._in_flight: dict[nn.Module, int] = {}
        self._changed = Condition()
        self._is_stopped = False

    def run(self, model: nn.Module) -> None:
        """Queue packs on one model's device until none waits; the body of a thread."""
        try:
            device = next(model.parameters()).device
            with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
                while (tasks := self._next(model)) is not None:
                    self._launch(model, tasks)
        except BaseException:
            self.stop()
            raise
        finally:
            self.done.put(None)

    def release(self, model: nn.Module) -> None:
        """One pack of the model has been taken: its memory is free."""
        with self._changed:
            self._in_flight[model] -= 1
            self._changed.notify_all()

    def stop(self) -> None:
        """Let every thread end after the pack it is queueing."""
        with self._changed:
            self._is_stopped = True
            self._changed.notify_all()

    def _next(self, model: nn.Module) -> Sequence[TextTask] | None:
        with self._changed:
            self._wait(model, _AHEAD - 1)
            if self._is_stopped or not self._waiting:
                return None
            self._in_flight[model] = self._in_flight.get(model, 0) + 1
            return self._waiting.popleft()

    def _wait(self, model: nn.Module, n_in_flight: int) -> None:
        """Wait, holding the condition, until so few packs of the model are in flight."""
        self._changed.wait_for(
            lambda: self._is_stopped or self._in_flight.get(model, 0) <= n_in_flight
        )

    def _launch(self, model: nn.Module, tasks: Sequence[TextTask]) -> None:
        if self._is_queued(model, tasks, is_last=False):
            return
        # Others of this device may hold the memory: it is theirs until they are taken.
        with self._changed:
            self._wait(model, 1)
        torch.cuda.empty_cache()
        if self._is_queued(model, tasks, is_last=True):
            return
        with self._changed:
            self._waiting.extendleft(reversed(_halves(tasks)))
        self.release(model)

    def _is_queued(self, model: nn.Module, tasks: Sequence[TextTask], *, is_last: bool) -> bool:
        """Queue a pack; False where it has to be tried again, or smaller."""
        pack = _queued(model, tasks, self._options, is_last=is_last)
        if pack is None:
            return False
        self.done.put((model, pack))
        return True


class _FailedText:
    """Stands for the pack of a single text that failed."""

    def __init__(self, task: TextTask, error: TaprobeError) -> None:
        self._task, self._error = task, error

    def results(self) -> Iterator[TextShards]:
        layers = {*self._task.layers, *self._task.attention_layers}
        yield TextShards(self._task, {}, {}, dict.fromkeys(sorted(layers), self._error))


def _queued(
    model: nn.Module, tasks: Sequence[TextTask], options: ExtractOptions, *, is_last: bool = True
) -> QueuedPack | _FailedText | None:
    """Queue a pack; None where it fails and a smaller one, or another try, may not."""
    where = ", ".join(f"problem {task.problem_id}" for task in tasks)

    def queue() -> QueuedPack | None:
        try:
            return QueuedPack(model, tasks, options)
        except RuntimeError as error:
            _check_out_of_memory(error, tasks if is_last else ())
            if is_last:
                _say_smaller(tasks, "out of memory")
            return None

    found = attempted(queue, where)
    if not isinstance(found, TaprobeError):
        return found
    if len(tasks) > 1:
        if is_last:
            _say_smaller(tasks, found.what)
        return None
    if not (found.where or "").startswith(where):
        named = type(found)(found.what, f"{where}, {found.where}", found.fix)
        named.__cause__ = found.__cause__
        found = named
    return _FailedText(tasks[0], found)


def _check_out_of_memory(error: RuntimeError, tasks: Sequence[TextTask]) -> None:
    """Raise what is no lack of memory, and a lack of it on a single text with the text's name."""
    # On the CPU the allocator raises a plain RuntimeError; its text is all there is to know it by.
    if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
        raise error
    if len(tasks) == 1:
        task = tasks[0]
        n_layers = len({*task.layers, *task.attention_layers})
        raise ModelError(
            f"out of memory on a text of {len(task.token_ids)} tokens at {n_layers} layers",
            f"problem {task.problem_id}",
            "free the device, use a smaller dtype or fewer layers, set activations.device to "
            "cpu, or leave the problem out with rollouts.problem_ids",
        ) from error


def _halves(tasks: Sequence[TextTask]) -> tuple[Sequence[TextTask], Sequence[TextTask]]:
    half = len(tasks) // 2
    return tasks[:half], tasks[half:]


def _say_smaller(tasks: Sequence[TextTask], why: str) -> None:
    half, n_tokens = len(tasks) // 2, sum(len(task.token_ids) for task in tasks)
    _log.warning(
        "%s on a pack of %d texts, %d tokens: going on with packs of %d and %d",
        *(why, len(tasks), n_tokens, half, len(tasks) - half),
    )
