"""Model types and configurations one by one: equal to eager transformers, or refused by name.

In: names of cases. Out: a verdict each, from a process of its own, so that one that hangs or
crashes costs itself. What does not belong here: the page that is made of them (page).
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import shutil
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from taprobe_core.errors import ModelMismatchError, TaprobeError
from tools.architectures.agreement import ONE_PACK, Ways, load, make_texts, references
from tools.architectures.fuzz import draw
from tools.architectures.tiny import N_LAYERS, tiny_config, write_checkpoint

LENGTHS = (110, 9, 25, 60)
"""Tokens of the texts: far past every window and chunk, just at it, and short of it."""

SEED = "seed:"
"""Before the seed in the name of a drawn configuration."""

TIMEOUT_S = 240.0
"""Of one case, on a machine that does other work besides; most take two seconds."""

WAYS = {
    "alone": [(1, "off")],
    "packed": [(ONE_PACK, "off")],
    "attention": [(1, "full"), (ONE_PACK, "full"), (ONE_PACK, "light")],
}
"""Token budget and attention mode of the runs behind each column of the page."""

_ORDER = ("RAW", "SILENT", "refused", "equal")


@dataclass
class Verdict:
    """What came of one case.

    Attributes:
        name: model type, or `seed:` and the seed of a drawn configuration.
        kind: class of the causal model.
        alone: of the states, each text by itself; see below.
        packed: of the states, all texts in one pack.
        attention: of the attention between sentences, full and light, alone and packed.
        reason: why something was refused or was not built.
        detail: of a difference which, how large and where; of a raw exception its end.
        told: what was drawn.
        relative: the largest relative difference of each way.

    Of each way: `equal`, `refused`, `RAW` (an exception that is not the product's), `SILENT` (a
    difference without a word), or `not built`.
    """

    name: str
    kind: str
    alone: str = "not built"
    packed: str = "not built"
    attention: str = "not built"
    reason: str = ""
    detail: str = ""
    told: str = ""
    relative: dict[str, float] = field(default_factory=dict)

    @property
    def is_right(self) -> bool:
        """Whether nothing is raw and nothing silent."""
        return not {"RAW", "SILENT"} & {self.alone, self.packed, self.attention}

    def set_all(self, word: str) -> None:
        """Say the same of every way."""
        self.alone = self.packed = self.attention = word


def causal_types() -> dict[str, str]:
    """Return every causal model type of the installed transformers, and its class."""
    return {name: str(kind) for name, kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()}


def judge_type(model_type: str) -> Verdict:
    """Judge a model type by its tiny configuration.

    Args:
        model_type: a key of `causal_types`.
    """
    verdict = Verdict(model_type, causal_types()[model_type])
    try:
        config = tiny_config(model_type)
    except Exception as error:  # any type may fail in its own way
        verdict.reason = _tail(error)
        return verdict
    return judge(verdict, config, LENGTHS, "float32")


def judge_seed(seed: int) -> Verdict:
    """Judge the configuration that a seed draws.

    Args:
        seed: any whole number.
    """
    case = draw(seed)
    verdict = Verdict(f"{SEED}{seed}", causal_types()[case.model_type], told=case.told)
    return judge(verdict, case.config, case.lengths, case.dtype)


def judge_named(name: str) -> Verdict:
    """Judge a model type, or a drawn configuration.

    Args:
        name: a key of `causal_types`, or `seed:` and a whole number.
    """
    if name.startswith(SEED):
        return judge_seed(int(name.removeprefix(SEED)))
    return judge_type(name)


def judge(verdict: Verdict, config: Any, lengths: Sequence[int], dtype: str) -> Verdict:
    """Write a random checkpoint, run it every way, and compare with eager transformers.

    The weights are written with the language-model head, as checkpoints have it. Where the product
    misses weights in those, as it does where the base model has parts that the causal one lacks,
    the base model's own are written and judged in their place.

    Args:
        verdict: is filled in and returned.
        config: of the model.
        lengths: tokens of the texts.
        dtype: what the model computes in.
    """
    with tempfile.TemporaryDirectory() as home:
        for is_causal in (True, False):
            folder = Path(home) / "checkpoint"
            shutil.rmtree(folder, ignore_errors=True)
            try:
                write_checkpoint(config, folder, is_causal=is_causal, dtype=dtype)
            except Exception as error:  # any type may fail in its own way
                verdict.reason = verdict.reason or _tail(error)
                return verdict
            if _judge_folder(verdict, folder, lengths, dtype):
                return verdict
    return verdict


def _judge_folder(verdict: Verdict, folder: Path, lengths: Sequence[int], dtype: str) -> bool:
    """Fill the verdict in; False where other weights might be taken."""
    verdict.reason = ""
    try:
        loaded = load(folder, _depth(folder), dtype)
    except TaprobeError as refusal:
        verdict.set_all("refused")
        verdict.reason = refusal.what
        return not isinstance(refusal, ModelMismatchError)
    except Exception as error:  # a raw exception is a finding
        verdict.set_all("RAW")
        verdict.detail = _tail(error)
        return True
    ways = Ways(loaded, make_texts(lengths))
    try:
        ways.expected = references(folder, ways.texts, getattr(torch, dtype))
        if dtype != "float32":
            ways.exact = references(folder, ways.texts)
    except Exception as error:  # of no matter where the product refuses
        ways.trouble = f"no reference: {_tail(error)}"
    details = []
    for way, runs in WAYS.items():
        words = []
        for budget, mode in runs:
            word, detail = _run(ways, budget, mode, verdict)
            words.append(word)
            if detail:
                place = "alone" if budget == 1 else "packed"
                details.append(f"{place}, attention {mode}: {detail}")
        setattr(verdict, way, min(words, key=_ORDER.index))
    if loaded.module.config._attn_implementation == "eager":
        verdict.reason = verdict.reason or "by `attn_implementation: eager`"
    verdict.detail = "; ".join(details)
    return True


def _depth(folder: Path) -> int:
    """Layers as a study would state them; a model of several stacks states none."""
    config = transformers.AutoConfig.from_pretrained(folder).get_text_config()
    return getattr(config, "num_hidden_layers", None) or N_LAYERS


def _run(ways: Ways, budget: int, mode: str, verdict: Verdict) -> tuple[str, str]:
    try:
        comparison = ways.run(budget, mode)
    except Exception as error:  # a raw exception is a finding
        return "RAW", _tail(error)
    if comparison.refusal is not None:
        verdict.reason = verdict.reason or comparison.refusal.what
        return "refused", ""
    verdict.relative[f"{budget} {mode}"] = comparison.relative
    if comparison.worst <= 1:
        return "equal", ""
    return "SILENT", f"off by {comparison.relative:.2g} at {comparison.where}"


def _tail(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    at = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    said = " ".join(str(error).split())
    return f"{type(error).__name__}: {said[:200]} ({at})"


def judge_all(names: Sequence[str], jobs: int = 1) -> Iterator[Verdict]:
    """Judge cases, each in a child process.

    Args:
        names: as `judge_named` takes them.
        jobs: children at a time.
    """
    warm_up()
    context = multiprocessing.get_context("fork")
    waiting = list(names)
    running: list[tuple[str, Any, Any]] = []
    while waiting or running:
        while waiting and len(running) < jobs:
            name = waiting.pop(0)
            ours, theirs = context.Pipe(duplex=False)
            child = context.Process(target=_child, args=(name, theirs))
            child.start()
            theirs.close()
            running.append((name, child, ours))
        yield _collect(*running.pop(0))


def _child(name: str, pipe: Any) -> None:
    pipe.send(asdict(judge_named(name)))


def _collect(name: str, child: Any, pipe: Any) -> Verdict:
    try:
        if pipe.poll(TIMEOUT_S):
            return Verdict(**pipe.recv())
        reason = f"no end within {TIMEOUT_S:.0f} s"
    except EOFError:
        reason = "its process ended without a verdict"
    finally:
        child.kill()
        child.join()
    return Verdict(name, causal_types().get(name, ""), "RAW", "RAW", "RAW", detail=reason)


def warm_up() -> None:
    """Judge one type here, so that no child has to import what all of them need; be quiet."""
    torch.set_num_threads(1)  # a fork has no use for another thread's pool
    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"  # nor for threads that load weights
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    judge_type("llama")
    gc.collect()
    gc.freeze()
