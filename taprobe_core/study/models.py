"""The part of a study that names models: rollouts folder, checkpoint, tokenizer, layers.

Finding and loading what it names belongs in `taprobe_core.checkpoints`.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from taprobe_core.study.parts import (
    CommitSha,
    Count,
    FolderName,
    Index,
    LocalPath,
    Seed,
    StudyPart,
    study_fault,
)

Layers = Literal["all", "quartiles", "mid"] | tuple[Index, ...]


class StandInCheckpoint(StudyPart):
    """A tiny seeded checkpoint of random weights, built by code: a stand-in or a control."""

    kind: Literal["stand_in"]
    architecture: Literal["qwen2", "llama"]
    n_layers: Annotated[int, Field(ge=1, le=128)] = 4
    d_model: Annotated[int, Field(ge=8, le=16384)] = 64
    n_heads: Count = 4
    n_kv_heads: Count = 2
    seed: Seed = 0

    @property
    def description(self) -> str:
        """What it is, for readers."""
        return "stand-in of random weights"

    @model_validator(mode="after")
    def _heads_fit(self) -> Self:
        if self.d_model % (2 * self.n_heads):
            raise study_fault(
                f"d_model {self.d_model} does not give {self.n_heads} heads of an even width",
                f"make d_model a multiple of {2 * self.n_heads}, or change n_heads",
            )
        if self.n_heads % self.n_kv_heads:
            raise study_fault(
                f"{self.n_heads} heads cannot share {self.n_kv_heads} key-value heads evenly",
                "make n_heads a multiple of n_kv_heads",
            )
        return self


class PretrainedCheckpoint(StudyPart):
    """A `from_pretrained` folder, or a hub model `org/name` at a commit sha (null: resolve one)."""

    kind: Literal["pretrained"]
    path: LocalPath
    revision: CommitSha | None = None

    @property
    def description(self) -> str:
        """What it is, for readers."""
        return self.path


class DemoCheckpoint(StudyPart):
    """A reasoner that comes with the library, trained on the demo's problems."""

    kind: Literal["demo"]
    name: Literal["tiny-qwen2", "tiny-llama"]

    @property
    def description(self) -> str:
        """What it is, for readers."""
        return f"bundled reasoner {self.name}"


Checkpoint = Annotated[
    StandInCheckpoint | PretrainedCheckpoint | DemoCheckpoint, Field(discriminator="kind")
]


class Model(StudyPart):
    """One model: where its rollouts, its weights and its tokenizer are, and which layers to read.

    `n_layers` is the depth of the checkpoint; it is stated so that partitions need no download,
    and checked against the checkpoint before the first forward pass. So is `d_model`, the width of
    the residual stream, which may be left out; a forecast of sizes needs it. `tokenizer` is a
    folder or a hub id, `org/name` or `org/name@sha`; null takes the checkpoint's own.
    `attn_implementation`, in transformers' words, is how attention is computed where texts go the
    library's own way: `eager` for an architecture that PyTorch's `scaled_dot_product_attention`
    does not compute (attention sinks, capped scores); memory then grows with the square of a
    text's length.
    """

    rollouts_dir: FolderName
    checkpoint: Checkpoint
    n_layers: Annotated[int, Field(ge=1, le=999)]
    d_model: Count | None = None
    tokenizer: LocalPath | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    attn_implementation: Literal["sdpa", "eager"] = "sdpa"
    layers: Layers = "all"

    @model_validator(mode="after")
    def _layers_exist(self) -> Self:
        if isinstance(self.layers, tuple):
            beyond = [layer for layer in self.layers if layer >= self.n_layers]
            if beyond or not self.layers or len(set(self.layers)) < len(self.layers):
                raise study_fault(
                    f"layers {list(self.layers)} of a model with {self.n_layers} layers",
                    f"give block indices from 0 to {self.n_layers - 1}, each once",
                )
        return self

    @model_validator(mode="after")
    def _stand_in_agrees(self) -> Self:
        if isinstance(self.checkpoint, StandInCheckpoint):
            for name in ("n_layers", "d_model"):
                stated, built = getattr(self, name), getattr(self.checkpoint, name)
                if stated is not None and stated != built:
                    raise study_fault(
                        f"{name} is {stated}, its stand-in checkpoint has {built}",
                        "make the two numbers equal",
                    )
        return self

    @property
    def layer_indices(self) -> tuple[int, ...]:
        """Requested block indices, ascending. Quartiles are n/4, n/2 and 3n/4; mid is n/2."""
        depth = self.n_layers
        if self.layers == "all":
            return tuple(range(depth))
        if self.layers == "mid":
            return (depth // 2,)
        if self.layers == "quartiles":
            return tuple(sorted({depth // 4, depth // 2, 3 * depth // 4}))
        return tuple(sorted(self.layers))
