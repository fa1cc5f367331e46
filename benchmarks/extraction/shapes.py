"""Model shapes with random weights, made on the device: no download, any size in seconds.

Weights are seeded: matrices and embeddings normal with a standard deviation of 0.02, norm weights
around one and biases around zero, so that a forgotten bias or norm weight shows in the numbers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Shape:
    """A model's dimensions, and the texts it is measured on.

    Attributes:
        kind: "qwen2" or "llama".
        n_layers: blocks.
        d_model: width.
        d_mlp: width inside the MLP.
        n_heads: query heads.
        n_kv_heads: key and value heads.
        n_vocab: rows of the embedding and of the language-model head.
        dtype: name of the type of the weights.
        n_texts: texts.
        shortest: tokens of the shortest possible text.
        longest: tokens of the longest possible text.
    """

    kind: str
    n_layers: int
    d_model: int
    d_mlp: int
    n_heads: int
    n_kv_heads: int
    n_vocab: int
    dtype: str
    n_texts: int
    shortest: int
    longest: int

    @property
    def torch_dtype(self) -> torch.dtype:
        """Type of the weights."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    @property
    def middle(self) -> int:
        """The block in the middle: half of the blocks lie before it."""
        return self.n_layers // 2

    def render(self) -> str:
        """Return the shape as one line."""
        return (
            f"{self.kind}, {self.n_layers} layers, d_model {self.d_model}, mlp {self.d_mlp}, heads "
            f"{self.n_heads}/{self.n_kv_heads}, vocabulary {self.n_vocab:,}, random {self.dtype} "
            f"weights"
        )


SHAPES = {
    "tiny": Shape("qwen2", 4, 64, 128, 4, 2, 512, "float32", 6, 60, 200),
    "small": Shape("qwen2", 16, 512, 1408, 8, 2, 32_000, "float32", 20, 382, 1494),
    "8b": Shape("llama", 32, 4096, 14_336, 32, 8, 128_256, "bfloat16", 20, 1500, 5200),
    "14b": Shape("qwen2", 48, 5120, 13_824, 40, 8, 152_064, "bfloat16", 20, 1500, 5200),
}


def quick(shape: Shape) -> Shape:
    """Return the shape with a few layers and texts, for a smoke run."""
    return replace(shape, n_layers=min(4, shape.n_layers), n_texts=4)


def build(shape: Shape, device: torch.device, seed: int) -> Any:
    """Return a causal language model of this shape, in evaluation mode, without gradients.

    Args:
        shape: its dimensions and type.
        device: where the weights are made.
        seed: of the weights; equal seeds give equal weights on equal devices.
    """
    model = _construct(shape, device)
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        around_one = "norm" in name
        parameter.normal_(1.0 if around_one else 0.0, 0.1 if around_one else 0.02)
    return model


def copy_base(causal: Any, shape: Shape, device: torch.device) -> nn.Module:
    """Return the base model, without head, with the same weights on another device.

    A shape of fewer layers copies the first ones; one of another type converts.

    Args:
        causal: the model to copy.
        shape: of the copy.
        device: of the copy.
    """
    copy: nn.Module = _construct(shape, device).model
    source = dict(causal.model.named_parameters())
    for name, parameter in copy.named_parameters():
        parameter.copy_(source[name])
    return copy


def _construct(shape: Shape, device: torch.device) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    config_class, model_class = {
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
        "llama": (LlamaConfig, LlamaForCausalLM),
    }[shape.kind]
    config = config_class(
        hidden_size=shape.d_model,
        intermediate_size=shape.d_mlp,
        num_hidden_layers=shape.n_layers,
        num_attention_heads=shape.n_heads,
        num_key_value_heads=shape.n_kv_heads,
        vocab_size=shape.n_vocab,
        max_position_embeddings=16_384,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=None,
        attn_implementation="sdpa",
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(shape.torch_dtype)
    try:
        with device:
            model = model_class(config)
    finally:
        torch.set_default_dtype(before)
    return model.eval().requires_grad_(False)
