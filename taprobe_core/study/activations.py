"""The parts of a study that say what is read from the models: hidden states and attention.

`SPEED_ONLY` names the fields that decide no value. Reading states and attention belongs in
`taprobe_core.activations` and `taprobe_core.attention`.
"""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import AfterValidator, Field

from taprobe_core.study.fields import Count, StudyPart, distinct

Pooling = Literal["mean", "last", "max", "boundary", "tokens"]
Storage = Literal["float16", "bfloat16", "float32"]


def _in_order(poolings: tuple[Pooling, ...]) -> tuple[Pooling, ...]:
    """Put them in one order: a set written in another order is the same set of files."""
    return tuple(pooling for pooling in get_args(Pooling) if pooling in poolings)


class Activations(StudyPart):
    """How hidden states are read and kept.

    `poolings`: of each sentence the mean, the last token's state, the maximum of every dimension,
    the state of the token before it (`boundary`), or the states of all its tokens; any number of
    them in the same pass. `storage` is the number type on disk. `token_budget` is the number of
    tokens in a forward pass, for which short texts are packed together; null is one text a pass on
    a CPU and 8,192 tokens on an accelerator.
    """

    poolings: Annotated[
        tuple[Pooling, ...],
        Field(min_length=1),
        AfterValidator(distinct),
        AfterValidator(_in_order),
    ] = ("mean",)
    storage: Storage = "float16"
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    token_budget: Count | None = None


SPEED_ONLY = frozenset({"device", "token_budget"})
"""Fields of `Activations` that decide no value, and so stand in no fingerprint."""


class Attention(StudyPart):
    """Which attention between sentences is kept of the layers that are read.

    `mode`: `off`; `light`, from the last `last_n` tokens to every sentence; `full`, from every
    sentence to every sentence. The rest says how scores are made of the full mass. `proximity`: a
    sentence is scored by those at least this many after it; the first number also chooses receiver
    heads, `n_receiver_heads` of them. `depth_control`: a late sentence spreads its attention over
    more sentences; correct for it by rank, by their count, or not.
    """

    mode: Literal["off", "light", "full"] = "off"
    last_n: Count = 4
    proximity: Annotated[tuple[Count, ...], Field(min_length=1), AfterValidator(distinct)] = (4,)
    depth_control: Literal["none", "rank", "count"] = "none"
    n_receiver_heads: Count = 20
