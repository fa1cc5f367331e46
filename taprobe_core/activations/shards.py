"""What one text leaves behind at one layer.

Plain values on the CPU; how they are written to files is said here too, where they are kept is not.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from taprobe_core.store import tensor_parts
from taprobe_core.study.activations import Storage

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
            [sentence + 1]: sentence i is tokens[offsets[i]:offsets[i + 1]].
        dtype: type of the states; float32 where the one asked for could not hold them.
        range: smallest and largest value before the cast.
        input_sha256: `texts.input_sha256`, what the states were made from.
    """

    problem_id: int
    layer: int
    tensors: dict[str, torch.Tensor]
    dtype: Storage
    range: tuple[float, float]
    input_sha256: str

    @property
    def max_abs(self) -> float:
        """Largest magnitude before the cast."""
        return max(-self.range[0], self.range[1])

    @property
    def n_bytes(self) -> int:
        """Bytes of the tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


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


def shard_file(shard: ActivationShard | AttentionShard) -> tuple[str, list[bytes | memoryview]]:
    """Return the name of a shard's file and its bytes, as safetensors.

    Args:
        shard: from `extract`; its tensors are not copied, and must stay as they are.
    """
    is_attention = isinstance(shard, AttentionShard)
    axes = "head query_sentence key_sentence" if is_attention else "sentence d_model"
    about = {"dimensions": axes, "layer": str(shard.layer)}
    name = ATTENTION_FILE if is_attention else ACTIVATIONS_FILE
    return name, tensor_parts(shard.tensors, about)
