"""Before a job: which way through a model is trusted for its texts, by comparison with the library.

Synthetic texts run through the first blocks, as many as hold every kind of block, by the library's
eager attention, each text alone, and by the ways that `ways_of` names, alone and in a pack. The
texts reach past every window, chunk and original rotary length that the configuration names and the
job's texts reach. The fastest way that agrees is taken. What does not belong here: what is known of
a model without running it (`understood`), and the ways themselves (`forward`).

The invariant: no way is taken that differed from the library's own; the library's own way with its
eager attention needs no proof, and is the last.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import nn

from taprobe_core.activations.forward import Way, run_pack, ways_of
from taprobe_core.activations.gemm_rate import count_of
from taprobe_core.activations.library_way import EAGER, call, failure, implementation_of, kind_of
from taprobe_core.activations.understood import Understanding, find_blocks, understand
from taprobe_core.errors import ModelError

_log = logging.getLogger(__name__)

FUSED_TOLERANCE = 0.05
"""Largest relative difference between the states of fused blocks and the library's.

Half precision rounds both, so they drift apart: 0.011 after one block and 0.025 after four, with
random weights of 14B shape. A wrong operation is of order one in the first block. On a CPU none is
allowed: a build of PyTorch that rounds a step otherwise must not change results unnoticed."""

TOLERANCE = 1e-4
"""Largest relative difference between two ways in float32, where rounding alone makes 1e-6."""

_SHORT = (150, 61, 45)
"""Tokens of the texts of every trial; together what fills a pack of a few."""

_MOST_SCORES = 2**28
"""Scores of one block beyond which eager attention is not tried: 1 GiB of float32."""

_TRIAL_BLOCKS = 4
_STRETCH = 16
"""Tokens of which the median counts: a kind of fault differs from some token on, while a router
that turns over in half precision, as it may by rounding alone, differs at single ones."""


@dataclass(frozen=True)
class Ways:
    """Which way a model's texts go.

    Attributes:
        short: of texts that packs take.
        window: longest of these; None for any.
        long: of the others.
    """

    short: Way
    window: int | None = None
    long: Way = "library"

    def of(self, n_tokens: int) -> Way:
        """Return the way of a text of so many tokens."""
        is_long = self.window is not None and n_tokens > self.window
        return self.long if is_long else self.short


def trial_lengths(known: Understanding, longest: int) -> tuple[int, ...]:
    """Return the tokens of the texts of a trial.

    Args:
        known: of the model.
        longest: tokens of the longest text of the job.

    Returns:
        A few short ones, and one past each token count that the configuration names and the job's
        longest text passes, by an eighth and not beyond that text.

    Example:
        >>> trial_lengths(Understanding(None, 4096, (4096,)), 9_000)
        (4608, 150, 61, 45)
        >>> trial_lengths(Understanding(None, 4096, (4096,)), 100)
        (100, 61, 45)
    """
    past = {min(longest, reach + max(33, reach // 8)) for reach in known.reaches if reach < longest}
    return tuple(sorted({*past, *(min(each, longest) for each in _SHORT)}, reverse=True))


def choose_ways(base_model: nn.Module, longest: int, deepest: int) -> Ways:
    """Try the ways through a model, and return the fastest that agrees with the library's own.

    Args:
        base_model: decoder-only transformer without LM head, in evaluation mode.
        longest: tokens of the longest text of the job.
        deepest: the last block that the job wants.

    Raises:
        ModelError: the model cannot run a text by any way; its blocks' outputs are not its hidden
            states.
    """
    with torch.inference_mode():
        try:
            return _Trial(base_model, longest, deepest).ways()
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
                raise
            raise failure(base_model, error) from error


def untried_ways(base_model: nn.Module) -> Ways:
    """Return the ways of a model that someone has hooked into, by what is known of it alone.

    A trial would show the hooks texts that are not the caller's, and `fused` would not call them.

    Args:
        base_model: decoder-only transformer without LM head, in evaluation mode.
    """
    known = understand(base_model)
    return Ways("packed", known.window) if known.reason is None else Ways("library")


class _Trial:
    def __init__(self, model: nn.Module, longest: int, deepest: int) -> None:
        self._model = model
        self._known = understand(model)
        self._deepest = min(deepest, last_new_kind(find_blocks(model)))
        self._texts = _synthetic(model, trial_lengths(self._known, longest))
        weights = next(model.parameters())
        self._is_on_cpu = weights.device.type == "cpu"
        self._allowed = TOLERANCE if weights.dtype == torch.float32 else FUSED_TOLERANCE

    def ways(self) -> Ways:
        if self._known.reason is not None:
            _log.info("one text a pass, as the library runs it: %s", self._known.reason)
        states = [self._states([text], "library") for text in self._texts]
        if self._known.reason is not None:
            _check_hidden_states(self._model, self._texts[-1])
        if not self._is_reference(states):
            return Ways("eager")
        packable = [
            (text, each)
            for text, each in zip(self._texts, states, strict=True)
            if self._known.window is None or len(text) <= self._known.window
        ]
        for way in ways_of(self._model, 1)[:-1]:
            if packable and self._agrees(way, packable):
                return Ways(way, self._known.window)
        return Ways("library")

    def _is_reference(self, states: Sequence[Sequence[torch.Tensor]]) -> bool:
        """Whether the library's attention, as the model was loaded, gives its eager states."""
        if implementation_of(self._model) in (None, EAGER):
            return True
        config: Any = self._model.config
        heads = count_of(config.get_text_config(), "num_attention_heads")
        worst = 0.0
        for text, found in zip(self._texts, states, strict=True):
            if (heads or 1) * len(text) ** 2 <= _MOST_SCORES:
                worst = max(worst, difference(found, self._states([text], "eager")))
        return self._allows("the library's attention", "its eager attention", worst, self._allowed)

    def _agrees(
        self, way: Way, packable: Sequence[tuple[Sequence[int], Sequence[torch.Tensor]]]
    ) -> bool:
        """Whether a way gives each text's states, alone and between others in a pack."""
        name = "fused blocks" if way == "fused" else "packed attention"
        is_exact = way == "fused" and self._is_on_cpu
        # The longest in the middle: what leaks from a text, or follows from its length, would show
        # on either side of it.
        order = [*packable[::-1], *(packable[1:] or packable)]
        expected = [torch.cat(each) for each in zip(*(states for _, states in order), strict=True)]
        try:
            worst = max(
                difference(self._states([text], way), states, is_exact=is_exact)
                for text, states in packable
            )
            together = self._states([text for text, _ in order], way)
        except ModelError as fault:
            _log.warning("%s refused: %s; the library's own run instead, slower", name, fault.what)
            return False
        worst = max(worst, difference(together, expected, is_exact=is_exact))
        allowed = 0.0 if is_exact else self._allowed
        return self._allows(name, "the library's", worst, allowed)

    def _allows(self, name: str, other: str, worst: float, allowed: float) -> bool:
        if worst <= allowed:
            _log.info("%s agree with %s to %.2g of the states", name, other, worst)
            return True
        _log.warning(
            "%s differ from %s by %.2g of the states (allowed %.2g); these run instead, slower",
            name,
            other,
            worst,
            allowed,
        )
        return False

    def _states(self, texts: Sequence[Sequence[int]], way: Way) -> list[torch.Tensor]:
        states: list[torch.Tensor] = []
        run_pack(
            self._model,
            texts,
            self._deepest,
            lambda _, hidden: states.append(hidden.to("cpu", torch.float32, copy=True)),
            way=way,
        )
        return states


def _synthetic(model: nn.Module, lengths: Sequence[int]) -> list[list[int]]:
    """Random tokens, the same for every trial of a model."""
    vocab_size = int(getattr(getattr(model, "config", None), "vocab_size", None) or 1)
    source = torch.Generator().manual_seed(0)
    return [torch.randint(vocab_size, (each,), generator=source).tolist() for each in lengths]


def difference(
    found: Sequence[torch.Tensor], reference: Sequence[torch.Tensor], *, is_exact: bool = False
) -> float:
    """Return how far states are from others, relative to the norm of each token's state.

    Args:
        found: [token, d_model] of each layer, float32.
        reference: of equal shapes; a token that is not finite in both does not count.
        is_exact: the largest of all tokens; else of the medians of stretches of tokens.
    """
    worst = 0.0
    for one, two in zip(found, reference, strict=True):
        broken = torch.stack([~each.isfinite().all(dim=1) for each in (one, two)])
        size = two.norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
        errors = ((one - two).norm(dim=1) / size).masked_fill(broken.any(dim=0), torch.inf)
        errors = errors.masked_fill(broken.all(dim=0), 0.0)
        if not is_exact:
            stretches = [*torch.split(errors, _STRETCH)[:-1], errors[-_STRETCH:]]
            errors = torch.stack([each.median() for each in stretches])
        worst = max(worst, float(errors.max()))
    return worst


_NUMBERING = re.compile(r"idx|index|layer_id|number|training")


def last_new_kind(blocks: nn.ModuleList) -> int:
    """Return the first block up to which every kind of block has been seen, at least the fourth.

    A kind is the classes of a block's parts and their settings: flags, counts and names.

    Args:
        blocks: of a model.
    """
    kinds: dict[Any, int] = {}
    for layer, block in enumerate(blocks):
        kind = tuple(
            (type(module).__name__, *sorted(_settings(module))) for module in block.modules()
        )
        kinds.setdefault(kind, layer)
    return max(min(_TRIAL_BLOCKS, len(blocks)) - 1, *kinds.values())


def _settings(module: nn.Module) -> list[tuple[str, str]]:
    return [
        (name, str(value))
        for name, value in vars(module).items()
        if isinstance(value, (bool, int, str))
        and not name.startswith("_")
        and not _NUMBERING.search(name)
    ]


def _check_hidden_states(model: nn.Module, text: Sequence[int]) -> None:
    """Refuse a model whose hidden states, by its own account, are not its blocks' outputs."""
    takes = signature(model.forward).parameters.values()
    if not any(
        each.name == "output_hidden_states" or each.kind == each.VAR_KEYWORD for each in takes
    ):
        return
    blocks, outputs = find_blocks(model), []
    hooks = [
        block.register_forward_hook(
            lambda _, __, output: outputs.append(
                (output[0] if isinstance(output, tuple) else output).clone()
            )
        )
        for block in blocks
    ]
    try:
        input_ids = torch.tensor(text, device=next(model.parameters()).device)
        own = getattr(call(model, input_ids, output_hidden_states=True), "hidden_states", None)
    finally:
        for hook in hooks:
            hook.remove()
    if own is None or len(own) != len(blocks) + 1:
        return
    # The last of the library's is normed.
    # Some give them from the first block's output on.
    if not any(
        all(
            one.shape == two.shape and torch.allclose(one, two, rtol=TOLERANCE, equal_nan=True)
            for one, two in zip(outputs[:-1], shown[: len(outputs) - 1], strict=True)
        )
        for shown in (own[1:], own)
    ):
        raise ModelError(
            "a model whose hidden states are not the outputs of its blocks",
            kind_of(model),
            "use a model with one residual stream, to which nothing is added between blocks",
        )
