"""All texts of a setting through the model, each once; their shards as soon as a pack is done.

In: tasks, one per text, and the model on one or several devices. Out: one item per text, so that
the caller can commit it while the next pack runs. What does not belong here: committing, and
choosing the devices.

The invariant: everything that can be refused is refused before the first pass; the longest text
runs first, so that one too long for the memory fails in the first minute and not in the last; short
memory makes packs smaller, never results different.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from torch import nn

from taprobe_core.activations.forward import LIBRARY_WAYS, MISMATCH_FIX, input_faults
from taprobe_core.activations.packing import plan_packs
from taprobe_core.activations.passes import ways_for
from taprobe_core.activations.pooling import span_index
from taprobe_core.activations.schedule import Progress, run_ahead, run_in_step
from taprobe_core.activations.tasks import ActivationShard, AttentionShard, ExtractOptions, TextTask
from taprobe_core.errors import ModelMismatchError, SpanError, TaprobeError, original


class Extracted(NamedTuple):
    """One text's shards by layer, and how far the extraction is with them.

    `faults` says of a layer why a shard of it is not there.
    """

    problem_id: int
    shards: dict[int, ActivationShard]
    attention: dict[int, AttentionShard]
    progress: Progress
    faults: dict[int, TaprobeError]


def extract(
    models: nn.Module | Sequence[nn.Module],
    tasks: Sequence[TextTask],
    options: ExtractOptions | None = None,
    *,
    clock: Callable[[], float] = time.monotonic,
    keeps_faults: bool = False,
) -> Iterator[Extracted]:
    """Run each text once and yield its shards, the longest text's pack first.

    The checks are made by the call itself, the passes by the iteration. On a CPU a pass begins when
    its caller asks for its texts; an accelerator is kept one pack ahead.

    Args:
        models: base transformer without LM head, in evaluation mode; its parameters name the
            device. Several: the same weights on several devices, packs are shared out.
        tasks: what to run; a task without layers is left out.
        options: what to keep; None for float16 means.
        clock: seconds, for the progress.
        keeps_faults: go on where a text fails, and tell with it what failed; otherwise raise it.

    Raises:
        SpanError: a span lies outside its text.
        ModelMismatchError: a layer, token id or length that the model lacks; lists all of them.
        ModelError: out of memory; names the problem and its tokens. Blocks not found.
        NonFiniteError: a value is NaN or infinite; names problem, layer and sentence.
    """
    models = (models,) if isinstance(models, nn.Module) else tuple(models)
    options = options or ExtractOptions()
    wanted = [task for task in tasks if task.layers or task.attention_layers]
    layers = sorted({layer for task in wanted for layer in (*task.layers, *task.attention_layers)})
    named = {f"problem {task.problem_id}": task.token_ids for task in wanted}
    faults = input_faults(models[0], named, layers)
    if faults:
        raise ModelMismatchError(
            f"the model cannot take this work: {'; '.join(faults)}",
            type(models[0]).__name__,
            MISMATCH_FIX,
        )
    for task in wanted:
        _check_spans(task)
    items = _Run(models, wanted, options, clock).items()
    return items if keeps_faults else _raising(items)


def _raising(items: Iterator[Extracted]) -> Iterator[Extracted]:
    for item in items:
        for fault in item.faults.values():
            raise original(fault)
        yield item


def _check_spans(task: TextTask) -> None:
    try:
        span_index(task.spans, len(task.token_ids))
    except SpanError as fault:
        where = f"problem {task.problem_id}, {fault.where}"
        raise SpanError(fault.what, where, fault.fix) from None


class _Run:
    def __init__(
        self,
        models: Sequence[nn.Module],
        tasks: Sequence[TextTask],
        options: ExtractOptions,
        clock: Callable[[], float],
    ) -> None:
        self._models = models
        self._options = options
        self._clock = clock
        self._n_texts = len(tasks)
        self._n_tokens = sum(len(task.token_ids) for task in tasks)
        self._device = next(models[0].parameters()).device
        self._tasks = tasks

    def _packs(self) -> list[list[TextTask]]:
        """Texts of each pass; those that the library runs its own way stand alone, and first."""
        ways = ways_for(self._models, self._tasks)
        lengths = [len(task.token_ids) for task in self._tasks]
        is_alone = [ways.of(each) in LIBRARY_WAYS for each in lengths]
        packs: list[list[TextTask]] = []
        for kind, budget in ((True, 1), (False, self._options.budget_on(self._device))):
            own = [at for at, each in enumerate(is_alone) if each is kind]
            planned = plan_packs([lengths[at] for at in own], budget)
            packs += [[self._tasks[own[at]] for at in pack] for pack in planned]
        return packs

    def items(self) -> Iterator[Extracted]:
        if not self._tasks:
            return
        packs = self._packs()
        started = self._clock()
        n_tokens = 0
        run = run_ahead if self._device.type == "cuda" else run_in_step
        texts = run(self._models, packs, self._options)
        for n_texts, (task, shards, attention, faults) in enumerate(texts, 1):
            n_tokens += len(task.token_ids)
            elapsed_s = self._clock() - started
            progress = Progress(n_texts, self._n_texts, n_tokens, self._n_tokens, elapsed_s)
            yield Extracted(task.problem_id, shards, attention, progress, faults)
