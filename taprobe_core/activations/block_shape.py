"""The dimensions of a transformer block, and the matrices that they make.

In: a configuration. Out: widths and heads, from which every count of operations and bytes follows.
What does not belong here: the counts (cost).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_GATED = frozenset({"llama", "mistral", "qwen2", "qwen3"})
_PLAIN = frozenset({"gpt2"})


@dataclass(frozen=True)
class BlockShape:
    """Dimensions of one transformer block.

    Attributes:
        d_model: width of the residual stream.
        d_mlp: width inside the MLP.
        n_heads: query heads.
        n_kv_heads: key and value heads.
        d_head: width of a head.
        gated: whether the MLP has a gate beside its two matrices.
    """

    d_model: int
    d_mlp: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    gated: bool

    @classmethod
    def of(cls, config: Any) -> BlockShape:
        """Return the shape that a transformers configuration states.

        Of an architecture that `is_known` does not know it is a guess: a gated MLP, the same in
        every block.

        Args:
            config: of a decoder-only model, or of one with such a part (`get_text_config`).
        """
        text = config.get_text_config()
        d_model, n_heads = int(text.hidden_size), count_of(text, "num_attention_heads") or 1
        d_mlp = count_of(text, "intermediate_size") or count_of(text, "n_inner")
        return cls(
            d_model=d_model,
            d_mlp=d_mlp or 4 * d_model,
            n_heads=n_heads,
            n_kv_heads=count_of(text, "num_key_value_heads") or n_heads,
            d_head=count_of(text, "head_dim") or d_model // n_heads,
            gated=text.model_type not in _PLAIN,
        )

    @classmethod
    def assumed(cls, d_model: int) -> BlockShape:
        """Return a block of 12 · d_model² weights, for a model of which only the width is known.

        Its heads are 128 wide where that divides the width, as in most models; else it has one.
        """
        d_head = 128 if d_model % 128 == 0 else d_model
        n_heads = d_model // d_head
        return cls(d_model, 4 * d_model, n_heads, n_heads, d_head, gated=False)

    @property
    def d_attn(self) -> int:
        """Width of all query heads together."""
        return self.n_heads * self.d_head

    @property
    def products(self) -> tuple[tuple[int, int], ...]:
        """Inputs and outputs of each matrix: q, k, v, o, gate if there is one, up, down."""
        d_kv = self.n_kv_heads * self.d_head
        n_into_mlp = 2 if self.gated else 1
        return (
            (self.d_model, self.d_attn),
            (self.d_model, d_kv),
            (self.d_model, d_kv),
            (self.d_attn, self.d_model),
            *((self.d_model, self.d_mlp),) * n_into_mlp,
            (self.d_mlp, self.d_model),
        )


def count_of(config: Any, name: str) -> int | None:
    """Return a count of a configuration; the largest where it says one for each block.

    Args:
        config: of transformers.
        name: of the count; None is returned where it is not said.
    """
    try:
        value = getattr(config, name, None)
    except RuntimeError:  # A configuration of unlike blocks says it of each block alone.
        value = [getattr(each, name, None) for each in config.per_layer_config]
    if isinstance(value, (list, tuple)):
        value = max((each for each in value if each), default=None)
    return int(value) if isinstance(value, (int, float)) else None


def is_known(config: Any) -> bool:
    """Whether `BlockShape.of` is exact for a configuration's architecture."""
    return config.get_text_config().model_type in _GATED | _PLAIN


def block_weights(shape: BlockShape) -> int:
    """Return the weights of a block's matrices; biases and norms are left out."""
    return sum(n_in * n_out for n_in, n_out in shape.products)
