"""The weights of a Llama or Qwen2 checkpoint -> logits, in double precision throughout.

The library computes normalisation and rotary angles in single precision whatever it is given, and
keeps a copy of a prompt for each text that follows it. Here everything is float64, and texts share
the keys and values of the prompt they have in common: on two cores that is the difference between
three hours and half an hour for the demo's rollouts. What does not belong here: choosing a token
(`sampling`), and reading activations, for which the library's forward pass is the reference.

Sources: RMSNorm (Zhang and Sennrich 2019), rotary embedding (Su et al. 2021), SwiGLU (Shazeer
2020), grouped-query attention (Ainslie et al. 2023).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.nn.functional import linear, scaled_dot_product_attention, silu

_GROWTH = 64


@dataclass
class _Block:
    """Weights of one block; those that read the same input stand in one matrix."""

    norm: torch.Tensor
    qkv: torch.Tensor
    qkv_bias: torch.Tensor | None
    out: torch.Tensor
    mlp_norm: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor


class Memory:
    """Keys and values of texts in progress, per block.

    Args:
        shared: [2, n_kv_heads, n_shared, d_head] per block: what all texts have read.
        own: [2, n_texts, n_kv_heads, capacity, d_head] per block: what each has read after that.
        n_own: how much of the capacity is filled.
    """

    def __init__(self, shared: list[torch.Tensor], own: list[torch.Tensor], n_own: int) -> None:
        self.shared = shared
        self.own = own
        self.n_own = n_own

    @property
    def n_read(self) -> int:
        """Tokens that each text has read."""
        return self.shared[0].shape[2] + self.n_own

    def shared_by(self, n_texts: int) -> Memory:
        """Return the memory of `n_texts` texts that go on from this one text."""
        shared = [own[:, 0, :, : self.n_own] for own in self.own]
        return Memory(shared, [own.new_empty(2, n_texts, *_rest(own)) for own in self.own], 0)

    def select(self, rows: torch.Tensor) -> Memory:
        """Return the memory of some of the texts."""
        return Memory(self.shared, [own[:, rows] for own in self.own], self.n_own)

    def grow(self) -> None:
        """Make room for one more token of each text."""
        if self.n_own == self.own[0].shape[3]:
            self.own = [
                torch.cat([own, own.new_empty(*own.shape[:3], _GROWTH, own.shape[4])], dim=3)
                for own in self.own
            ]


def _rest(own: torch.Tensor) -> tuple[int, int, int]:
    return own.shape[2], _GROWTH, own.shape[4]


class Network:
    """A checkpoint's network.

    Args:
        folder: `config.json` and `model.safetensors`; Llama or Qwen2, embeddings tied.
        device: where to compute; it must know float64.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        weights = {
            name: tensor.to(device, torch.float64)
            for name, tensor in load_file(folder / "model.safetensors").items()
        }
        self.eps: float = config["rms_norm_eps"]
        self.n_heads: int = config["num_attention_heads"]
        self.n_kv_heads: int = config["num_key_value_heads"]
        self.d_head: int = config["hidden_size"] // self.n_heads
        self.embedding = weights["model.embed_tokens.weight"]
        self.norm = weights["model.norm.weight"]
        self.blocks = [_block(weights, i) for i in range(config["num_hidden_layers"])]
        steps = torch.arange(0, self.d_head, 2, dtype=torch.float64, device=device) / self.d_head
        self.frequencies = config["rope_parameters"]["rope_theta"] ** -steps

    @property
    def n_tokens(self) -> int:
        """Size of the vocabulary."""
        return len(self.embedding)

    def read(self, ids: torch.Tensor) -> tuple[Memory, torch.Tensor]:
        """Read texts from their beginning.

        Args:
            ids: [text, position] int64.

        Returns:
            What was read, and the logits after the last position, [text, vocabulary] float64.
        """
        x = self.embedding[ids]
        positions = torch.arange(ids.shape[1], device=ids.device)
        own = []
        for block in self.blocks:
            q, k, v = self._project(block, x, positions)
            read = scaled_dot_product_attention(
                q.flatten(1, 2),
                k.repeat_interleave(q.shape[2], dim=1),
                v.repeat_interleave(q.shape[2], dim=1),
                is_causal=True,
            )
            x = self._finish(block, x, read.transpose(1, 2).flatten(2))
            own.append(torch.stack([k, v]))
        empty = [kv[:, 0, :, :0] for kv in own]
        return Memory(empty, own, ids.shape[1]), self._logits(x[:, -1])

    def step(self, tokens: torch.Tensor, memory: Memory) -> torch.Tensor:
        """Read one more token of each text; the memory takes it in.

        Args:
            tokens: [text] int64.
            memory: of the same texts.

        Returns:
            Logits, [text, vocabulary] float64.
        """
        memory.grow()
        x = self.embedding[tokens][:, None]
        position = torch.tensor([memory.n_read], device=tokens.device)
        n_shared, end = memory.shared[0].shape[2], memory.n_own + 1
        for block, shared, own in zip(self.blocks, memory.shared, memory.own, strict=True):
            q, k, v = self._project(block, x, position)
            own[0, :, :, end - 1], own[1, :, :, end - 1] = k[:, :, 0], v[:, :, 0]
            q = q.squeeze(3)  # [text, kv head, query head of it, d_head]
            keys, values = own[:, :, :, :end]
            # One product for all texts: [kv head, text * query head, position].
            common = _by_head(_by_text(q) @ shared[0].mT, len(q))
            scores = torch.cat([common, q @ keys.mT], dim=3) / self.d_head**0.5
            shares = scores.softmax(dim=3)
            read = _by_head(_by_text(shares[..., :n_shared]) @ shared[1], len(q))
            read = read + shares[..., n_shared:] @ values
            x = self._finish(block, x, read.flatten(1)[:, None])
        memory.n_own = end
        return self._logits(x[:, 0])

    def _project(
        self, block: _Block, x: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return q [text, kv head, query head of it, position, d_head], k and v without the third.

        q and k are rotated.
        """
        n_q, n_kv = self.n_heads, self.n_kv_heads
        qkv = linear(self._normed(x, block.norm), block.qkv, block.qkv_bias)
        heads = qkv.view(*qkv.shape[:2], -1, self.d_head).transpose(1, 2)
        angles = positions[:, None] * self.frequencies
        cos, sin = angles.cos(), angles.sin()
        first, second = heads[:, : n_q + n_kv].chunk(2, dim=3)
        turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=3)
        q = turned[:, :n_q].reshape(len(x), n_kv, -1, *turned.shape[2:])
        return q, turned[:, n_q:], heads[:, n_q + n_kv :]

    def _finish(self, block: _Block, x: torch.Tensor, read: torch.Tensor) -> torch.Tensor:
        x = x + linear(read, block.out)
        gate, up = linear(self._normed(x, block.mlp_norm), block.gate_up).chunk(2, dim=-1)
        return x + linear(silu(gate) * up, block.down)

    def _normed(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + self.eps) * weight

    def _logits(self, x: torch.Tensor) -> torch.Tensor:
        return linear(self._normed(x, self.norm), self.embedding)


def _by_text(per_text: torch.Tensor) -> torch.Tensor:
    """[text, kv head, query head of it, ...] -> [kv head, text * query head of it, ...]."""
    return per_text.transpose(0, 1).flatten(1, 2)


def _by_head(per_head: torch.Tensor, n_texts: int) -> torch.Tensor:
    """Undo `_by_text`."""
    n_kv, rows, width = per_head.shape
    return per_head.view(n_kv, n_texts, rows // n_texts, width).transpose(0, 1)


def _block(weights: dict[str, torch.Tensor], index: int) -> _Block:
    def of(name: str) -> torch.Tensor:
        return weights[f"model.layers.{index}.{name}"]

    qkv = [f"self_attn.{part}_proj" for part in "qkv"]
    has_bias = f"model.layers.{index}.{qkv[0]}.bias" in weights
    return _Block(
        norm=of("input_layernorm.weight"),
        qkv=torch.cat([of(f"{name}.weight") for name in qkv]),
        qkv_bias=torch.cat([of(f"{name}.bias") for name in qkv]) if has_bias else None,
        out=of("self_attn.o_proj.weight"),
        mlp_norm=of("post_attention_layernorm.weight"),
        gate_up=torch.cat([of("mlp.gate_proj.weight"), of("mlp.up_proj.weight")]),
        down=of("mlp.down_proj.weight"),
    )
