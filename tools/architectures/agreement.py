"""The product's extraction of a checkpoint beside plain eager transformers, text by text.

In: a folder with a checkpoint, and token counts. Out: the largest difference of every pooling,
layer and attention table, or the product's refusal. What does not belong here: making checkpoints
(tiny), and many of them (sweep).

The invariant: the reference is transformers alone, one text at a time: `output_hidden_states`, a
hook on the last block (whose entry is after the final norm), and `output_attentions`; nothing of it
goes through the product.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModel

from taprobe_core.activations.extraction import Extracted, extract
from taprobe_core.activations.tasks import ExtractOptions, TextTask
from taprobe_core.attention.mode import AttentionMode
from taprobe_core.checkpoints import LoadedModel, load_base_model, pick_devices, resolve_checkpoint
from taprobe_core.errors import ModelError, TaprobeError
from taprobe_core.study import Model, PretrainedCheckpoint

TOLERANCE = 1e-4
"""Largest relative difference (norm of a text's states at a layer) in float32."""

HALF_FACTOR, HALF_FLOOR = 2.0, 2e-3
"""In half precision eager attention itself is off by its rounding. The product, which may round at
other places, may be off from the same weights in float32 by twice that, and by half a unit of
bfloat16's last place (2^-9)."""

POOLINGS = ("mean", "last", "max", "boundary", "tokens")
LAST_N = 5
ONE_PACK = 1 << 20
VOCABULARY = 128


@dataclass(frozen=True)
class Text:
    """Tokens of a text, and the spans of its sentences."""

    token_ids: list[int]
    spans: list[tuple[int, int]]


@dataclass(frozen=True)
class Reference:
    """What eager transformers computes of one text.

    Attributes:
        states: by layer, output of the block, float32 [token, d_model].
        attentions: by layer, float32 [head, query, key]; without layers that do not attend.
    """

    states: list[torch.Tensor]
    attentions: dict[int, torch.Tensor]


@dataclass
class Comparison:
    """Differences between the product and the reference in one way of running.

    Attributes:
        worst: largest difference, as a share of what is allowed.
        relative: the same, as a share of the norm.
        where: text, layer and pooling of the largest.
        refusal: what the product refused with; None where it ran.
    """

    worst: float = 0.0
    relative: float = 0.0
    where: str = ""
    refusal: TaprobeError | None = None

    def add(
        self, found: torch.Tensor, expected: torch.Tensor, exact: torch.Tensor | None, where: str
    ) -> None:
        """Take another pair of tensors into account.

        Args:
            found: by the product.
            expected: by the reference.
            exact: by the reference in float32, where the model computes in half precision.
            where: for the message.
        """
        if found.shape != expected.shape:
            where = f"{where}, shape {list(found.shape)} for {list(expected.shape)}"
            self.worst, self.relative, self.where = float("inf"), float("inf"), where
            return
        norm = float(torch.linalg.norm(expected.double()).clamp_min(1e-30))
        if exact is None:
            gap, allowed = _gap(found, expected), TOLERANCE * norm
        else:
            gap = _gap(found, exact)
            allowed = HALF_FACTOR * _gap(expected, exact) + HALF_FLOOR * norm
        if not gap / allowed <= self.worst:  # a NaN is the worst of all
            self.worst, self.relative, self.where = gap / allowed, gap / norm, where


def _gap(one: torch.Tensor, other: torch.Tensor) -> float:
    return float(torch.linalg.norm(one.double() - other.double()))


def make_texts(
    lengths: Sequence[int], *, seed: int = 1, vocabulary: int = VOCABULARY
) -> list[Text]:
    """Return texts of random tokens, BOS first, with sentences of random lengths.

    Args:
        lengths: tokens of each text, each at least 2.
        seed: of tokens and sentences.
        vocabulary: token ids are below it.
    """
    draw = torch.Generator().manual_seed(seed)
    texts = []
    for length in lengths:
        tokens = torch.randint(5, vocabulary, (length - 1,), generator=draw).tolist()
        cuts = torch.randint(1, length, (max(2, length // 12),), generator=draw).tolist()
        edges = sorted({1, length, *cuts})
        texts.append(Text([1, *tokens], list(pairwise(edges))))
    return texts


def load(folder: Path, n_layers: int, dtype: str = "float32") -> LoadedModel:
    """Load a checkpoint as a study would, by eager attention where it is refused by SDPA.

    Args:
        folder: of the checkpoint.
        n_layers: its blocks.
        dtype: what it computes in.
    """
    checkpoint = PretrainedCheckpoint(kind="pretrained", path=str(folder))
    model = Model(rollouts_dir="none", checkpoint=checkpoint, n_layers=n_layers, dtype=dtype)
    files = resolve_checkpoint(model, folder.parent / "stand-ins")
    try:
        return load_base_model(files, model, pick_devices("cpu"))
    except ModelError as error:
        if "attn_implementation: eager" not in str(error.fix):
            raise
        eager = model.model_copy(update={"attn_implementation": "eager"})
        return load_base_model(files, eager, pick_devices("cpu"))


def references(
    folder: Path, texts: Sequence[Text], dtype: torch.dtype = torch.float32
) -> list[Reference]:
    """Run each text alone through eager transformers.

    Args:
        folder: of the checkpoint.
        texts: from `make_texts`.
        dtype: what the model computes in.
    """
    model = AutoModel.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()
    # Each text meets a model that has seen no other: rotary factors may remember the longest.
    return [_reference(copy.deepcopy(model), text.token_ids) for text in texts]


def _reference(model: Any, token_ids: list[int]) -> Reference:
    n_layers = int(model.config.get_text_config().num_hidden_layers)
    blocks = _blocks(model, n_layers)
    outputs: dict[int, torch.Tensor] = {}

    def keep(at: int, output: Any) -> None:
        outputs[at] = (output[0] if isinstance(output, tuple) else output).detach().clone()

    hooks = [
        block.register_forward_hook(lambda _, __, output, at=at: keep(at, output))
        for at, block in enumerate(blocks)
    ]
    try:
        with torch.no_grad():
            result = model(
                input_ids=torch.tensor([token_ids]),
                output_hidden_states=True,
                output_attentions=True,
                use_cache=False,
            )
    finally:
        for hook in hooks:
            hook.remove()
    listed = result.hidden_states
    states = [outputs[at][0].float() for at in range(n_layers)]
    # Some state-space models leave the embeddings out of their list.
    first = 0 if torch.equal(listed[0][0].float(), states[0]) else 1
    for at in range(n_layers - 1):
        if not torch.equal(listed[at + first][0].float(), states[at]):
            raise AssertionError(f"hidden_states[{at + first}] is not the output of block {at}")
    return Reference(states, _attentions(getattr(result, "attentions", None), blocks, model.config))


def _attentions(found: Any, blocks: nn.ModuleList, config: Any) -> dict[int, torch.Tensor]:
    tables = [] if found is None else list(found)
    kinds = getattr(config.get_text_config(), "layer_types", None) or []
    layers = list(range(len(blocks)))
    if len(tables) != len(blocks):
        layers = [at for at, kind in enumerate(kinds) if "linear" not in kind and kind != "conv"]
    if len(tables) != len(layers):
        return {}
    return {
        at: table[0].float() for at, table in zip(layers, tables, strict=True) if table is not None
    }


def _blocks(model: nn.Module, n_layers: int) -> nn.ModuleList:
    """The outermost list of as many modules as the model has layers."""
    lists = [each for each in model.modules() if isinstance(each, nn.ModuleList)]
    return next(each for each in lists if len(each) == n_layers)


@dataclass
class Ways:
    """The product's ways of running a set of texts: alone or packed, with or without attention.

    Attributes:
        loaded: from `load`.
        texts: from `make_texts`.
        expected: from `references`.
        exact: the references in float32, where the model computes in half precision.
        trouble: why there is no reference; then all that is not refused differs.
    """

    loaded: LoadedModel
    texts: Sequence[Text]
    expected: Sequence[Reference] = ()
    exact: Sequence[Reference] = ()
    trouble: str = ""

    def run(self, budget: int, mode: str = "off") -> Comparison:
        """Extract all layers, and compare all poolings and the attention.

        Args:
            budget: tokens of a pack.
            mode: attention: off, light or full.
        """
        layers = tuple(range(self.loaded.n_layers))
        watched = () if mode == "off" else self._attending() or layers
        tasks = [
            TextTask(at, text.token_ids, text.spans, layers, watched)
            for at, text in enumerate(self.texts)
        ]
        options = ExtractOptions(
            poolings=POOLINGS,
            storage="float32",
            attention=AttentionMode(mode, LAST_N),  # type: ignore[arg-type]
            token_budget=budget,
        )
        comparison = Comparison()
        try:
            found = {each.problem_id: each for each in extract(self.loaded.modules, tasks, options)}
        except TaprobeError as refusal:
            comparison.refusal = refusal
            return comparison
        if self.trouble:
            comparison.worst = comparison.relative = float("inf")
            comparison.where = self.trouble
            return comparison
        for at, text in enumerate(self.texts):
            exact = self.exact[at] if self.exact else None
            _compare(comparison, found[at], text, self.expected[at], exact, mode)
        return comparison

    def _attending(self) -> tuple[int, ...]:
        """Layers that hand out attention weights; a layer without them has nothing to compare."""
        return tuple(sorted(self.expected[0].attentions)) if self.expected else ()


def _compare(
    comparison: Comparison,
    found: Extracted,
    text: Text,
    expected: Reference,
    exact: Reference | None,
    mode: str,
) -> None:
    for layer, states in enumerate(expected.states):
        tensors = found.shards[layer].tensors
        truth = {} if exact is None else pooled(exact.states[layer], text.spans)
        for pooling, rows in pooled(states, text.spans).items():
            where = f"{len(text.token_ids)} tokens, layer {layer}, {pooling}"
            comparison.add(tensors[pooling], rows, truth.get(pooling), where)
    for layer, shard in found.attention.items():
        where = f"{len(text.token_ids)} tokens, layer {layer}, attention"
        if layer not in expected.attentions:
            comparison.add(torch.ones(1), torch.zeros(1), None, f"{where} of no table")
            continue
        tables = masses(expected.attentions[layer], text.spans, mode)
        if exact is None:
            for name, table in tables.items():
                comparison.add(shard.tensors[name], table, None, f"{where}, {name}")
            continue
        # In half precision the few weights on one token are off by luck, all of a row less so.
        truth = masses(exact.attentions[layer], text.spans, mode)
        found_row = _joined({name: shard.tensors[name] for name in tables})
        comparison.add(found_row, _joined(tables), _joined(truth), where)


def _joined(tables: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The masses of each query on every sentence and on the first token, side by side."""
    mass, bos_mass = tables.values()
    return torch.cat([mass, bos_mass[..., None]], dim=-1)


def pooled(states: torch.Tensor, spans: Sequence[tuple[int, int]]) -> dict[str, torch.Tensor]:
    """Return every pooling of a text's states, each in the plainest way.

    Args:
        states: [token, d_model].
        spans: half-open token ranges.
    """
    parts = [states[start:end] for start, end in spans]
    return {
        "mean": torch.stack([part.mean(0) for part in parts]),
        "last": torch.stack([part[-1] for part in parts]),
        "max": torch.stack([part.amax(0) for part in parts]),
        "boundary": torch.stack([states[start - 1] for start, _ in spans]),
        "tokens": torch.cat(parts),
    }


def masses(
    table: torch.Tensor, spans: Sequence[tuple[int, int]], mode: str
) -> dict[str, torch.Tensor]:
    """Return what an attention shard holds, summed from a table of weights.

    Args:
        table: softmax weights [head, query, key].
        spans: half-open token ranges.
        mode: full or light.
    """
    onto = torch.stack([table[:, :, start:end].sum(-1) for start, end in spans], dim=-1)
    if mode == "light":
        return {"tail_mass": onto[:, -LAST_N:], "bos_mass": table[:, -LAST_N:, 0]}
    return {
        "mass": torch.stack([onto[:, start:end].sum(1) for start, end in spans], dim=1),
        "bos_mass": torch.stack([table[:, start:end, 0].sum(1) for start, end in spans], dim=1),
    }
