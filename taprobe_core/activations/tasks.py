"""What is to be run, one task per text; what is kept of it; what it leaves behind at one layer.

Plain values on the CPU. How shards are written to files is said here, where those are kept is not.
What does not belong here: running (`extraction`). A task without layers is not run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import polars as pl

from taprobe_core.attention.mode import OFF, AttentionMode
from taprobe_core.errors import SpanError
from taprobe_core.store import write_tensors
from taprobe_core.study.parts import Pooling, Storage

if TYPE_CHECKING:
    from pathlib import Path

    import torch

ACCELERATOR_TOKEN_BUDGET = 8_192
"""Tokens of a pass on an accelerator. Matrix products of 14B shape gain nothing from more on an
H200, and results come earlier from smaller passes (`python -m benchmarks.extraction --sections
packs` measures both)."""


@dataclass(frozen=True)
class ExtractOptions:
    """What to keep of each text, and how.

    Attributes:
        poolings: what to keep of a sentence.
        storage: number type of the states that are kept.
        attention: vertical attention, for the layers that a task names.
        token_budget: most tokens of a pass; None: one text a pass on a CPU, where a text fills the
            cores by itself, and `ACCELERATOR_TOKEN_BUDGET` elsewhere.
    """

    poolings: tuple[Pooling, ...] = ("mean",)
    storage: Storage = "float16"
    attention: AttentionMode = OFF
    token_budget: int | None = None

    def budget_on(self, device: torch.device) -> int:
        """Most tokens of a pass on a device; 1 lets every text stand alone."""
        if self.token_budget is not None:
            return self.token_budget
        return 1 if device.type == "cpu" else ACCELERATOR_TOKEN_BUDGET


@dataclass(frozen=True)
class TextTask:
    """One text, and what is wanted of it.

    Attributes:
        problem_id: the problem.
        token_ids: BOS first where the model has one, [token].
        spans: half-open token range of each sentence, in sentence_idx order.
        layers: blocks whose pooled output is wanted, in any order.
        attention_layers: blocks whose vertical attention is wanted.
        input_sha256: `texts.input_sha256`; goes with the result.
    """

    problem_id: int
    token_ids: Sequence[int]
    spans: Sequence[tuple[int, int]]
    layers: tuple[int, ...] = ()
    attention_layers: tuple[int, ...] = ()
    input_sha256: str = ""

    @property
    def deepest(self) -> int:
        """The last block that has to run."""
        return max((*self.layers, *self.attention_layers))


def tasks_of(
    texts: pl.DataFrame,
    spans: pl.DataFrame,
    layers: Mapping[int, Sequence[int]],
    attention_layers: Mapping[int, Sequence[int]] | None = None,
) -> list[TextTask]:
    """Return a task for every problem that wants a layer.

    Args:
        texts: `tables.TEXTS`.
        spans: `tables.SPANS`.
        layers: problem_id to the layers whose activations are missing.
        attention_layers: problem_id to the layers whose vertical attention is missing.

    Raises:
        SpanError: a problem has no text or no spans.
    """
    attention_layers = attention_layers or {}
    wanted = [
        problem_id
        for problem_id in sorted({*layers, *attention_layers})
        if layers.get(problem_id) or attention_layers.get(problem_id)
    ]
    ranges = spans.sort("sentence_idx").group_by("problem_id").agg("start_token", "end_token")
    joined = texts.filter(pl.col("problem_id").is_in(wanted)).join(ranges, on="problem_id")
    absent = sorted(set(wanted) - set(joined["problem_id"]))
    if absent:
        raise SpanError(
            f"problems {absent} have no text or no spans",
            "tables 'texts' and 'spans'",
            "build the spans again, or leave these problems out",
        )
    return [
        TextTask(
            row["problem_id"],
            row["token_ids"],
            list(zip(row["start_token"], row["end_token"], strict=True)),
            tuple(sorted(set(layers.get(row["problem_id"], ())))),
            tuple(sorted(set(attention_layers.get(row["problem_id"], ())))),
            row["input_sha256"],
        )
        for row in joined.sort("problem_id").iter_rows(named=True)
    ]


ACTIVATIONS_FILE = "activations.safetensors"
ATTENTION_FILE = "attention.safetensors"


@dataclass(frozen=True, eq=False)
class ActivationShard:
    """Pooled states of one problem at one layer.

    Attributes:
        problem_id: the problem.
        layer: block index; the states are its output.
        tensors: by pooling, [sentence, d_model], in sentence_idx order, finite, on the CPU. For
            `tokens` [number of tokens in all sentences, d_model], and `offsets` int64
            [sentence + 1]: sentence i is tokens[offsets[i]:offsets[i + 1]]. Each is in the type
            asked for, or float32 where that could not hold it.
        ranges: by pooling, smallest and largest value before the cast.
        input_sha256: `texts.input_sha256`, what the states were made from.
    """

    problem_id: int
    layer: int
    tensors: dict[str, torch.Tensor]
    ranges: dict[str, tuple[float, float]]
    input_sha256: str

    @property
    def dtype(self) -> str:
        """Type of the states, of several poolings the widest."""
        widest = max((self.tensors[pooling].dtype for pooling in self.ranges), key=_width)
        return str(widest).removeprefix("torch.")

    @property
    def max_abs(self) -> float:
        """Largest magnitude before the cast."""
        return max(max(-low, high) for low, high in self.ranges.values())


def _width(dtype: torch.dtype) -> int:
    return dtype.itemsize


@dataclass(frozen=True, eq=False)
class AttentionShard:
    """Vertical attention of one problem at one layer.

    Attributes:
        problem_id: the problem.
        layer: block index.
        tensors: mode `full`: `mass` float32 [head, sentence, sentence], attention summed over the
            query tokens of the first and the key tokens of the second, and `bos_mass`
            [head, sentence]. Mode `light`: `tail_mass` [head, query, sentence] of the last tokens,
            `bos_mass` [head, query] and `is_after` bool [query, sentence]. Both: `n_tokens` int32
            [sentence].
        input_sha256: `texts.input_sha256`.
    """

    problem_id: int
    layer: int
    tensors: dict[str, torch.Tensor]
    input_sha256: str

    @property
    def n_bytes(self) -> int:
        """Bytes of the tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def tensor_name(layer: int, name: str) -> str:
    """Name of a shard's tensor in the file of its text, for example `L07.mean`."""
    return f"L{layer:02d}.{name}"


def text_tensors(
    shards: Mapping[int, ActivationShard] | Mapping[int, AttentionShard],
) -> dict[str, torch.Tensor]:
    """Return the tensors of one text's layers under their names in its file."""
    return {
        tensor_name(layer, name): tensor
        for layer, shard in shards.items()
        for name, tensor in shard.tensors.items()
    }


def write_text(folder: Path, file: str, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write one text's tensors into the folder of its artifact; `file` is one of the two names."""
    axes = "head query key_sentence" if file == ATTENTION_FILE else "sentence d_model"
    write_tensors(folder / file, tensors, {"dimensions": axes})
