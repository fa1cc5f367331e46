"""A trained reasoner -> texts, the same on every device: its network, base traces, their rests.

A draw is the first token whose cumulative probability exceeds a uniform number. The numbers come
from a named stream, not from a device, and the network is computed in double precision: two devices
then disagree about a cumulative probability by about 1e-13, and so about a token once in 1e13 draws
or so. In single precision it would be once in some million, and one token changes all that follow.

The library computes normalisation and rotary angles in single precision whatever it is given, and
keeps a copy of a prompt for each text that follows it. Here everything is float64, and texts share
the keys and values of the prompt they have in common: on two cores that is the difference between
three hours and half an hour for the demo's rollouts.

Each draw has a stream of its own, named by seed, reasoner, setting, problem, sentence and purpose,
so that any of them can be made again alone. What does not belong here: which to make (`build`), and
reading activations, for which the library's forward pass is the reference.

Invariant: a text depends on weights, prompt, temperature and stream alone, not on what is sampled
beside it; more texts begin with the same ones.

Sources: RMSNorm (Zhang and Sennrich 2019), rotary embedding (Su et al. 2021), SwiGLU (Shazeer
2020), grouped-query attention (Ainslie et al. 2023).
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch.nn.functional import linear, scaled_dot_product_attention, silu

from taprobe_core.demo.policy import read_trace
from taprobe_core.demo.task import FORCED_ANSWER, SETTINGS, Problem, Trace
from taprobe_core.demo.tokenizer import BOS, EOS, token_id
from taprobe_core.errors import NotEnoughDataError

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


TEMPERATURE = 1.0
"""Logits are divided by this; nothing is cut off (top p is 1)."""

MAX_NEW_TOKENS = 448
"""A text that has not ended by then breaks off; the policy's longest takes about 400."""

_DROPPED_SHARE = 0.2
_BITS = 53


def uniforms(n: int, length: int, *name: str | int) -> npt.NDArray[np.float64]:
    """Return the first `n` rows of the stream called `name`.

    Args:
        n: rows; a smaller n gives the first rows of a larger one.
        length: numbers in a row.
        name: any parts.

    Returns:
        [n, length] in [0, 1), multiples of 2**-53.
    """
    digest = hashlib.sha256("/".join(map(str, name)).encode()).digest()
    # Raw words: their stream is fixed for good, which that of higher-level draws is not.
    words = np.random.PCG64(int.from_bytes(digest, "big")).random_raw(n * length)
    numbers = (words >> np.uint64(64 - _BITS)).astype(np.float64) * 2.0**-_BITS
    return numbers.reshape(n, length)


class Reasoner:
    """A trained reasoner that samples in double precision.

    Args:
        folder: weights and tokenizer.
        device: where to compute; it must know float64.
        batch_size: texts that are sampled together; what is sampled does not depend on it. None
            takes 128 on a CPU, where more would leave its caches, and 4096 elsewhere.
    """

    def __init__(self, folder: Path, device: torch.device, batch_size: int | None = None) -> None:
        self.network = Network(folder, device)
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.device = device
        self.batch_size = batch_size or (128 if device.type == "cpu" else 4096)

    @torch.inference_mode()
    def complete(
        self,
        prompts: Sequence[str],
        streams: Sequence[npt.NDArray[np.float64]],
        stop: str | None = None,
    ) -> list[list[str]]:
        """Sample texts after each prompt.

        Args:
            prompts: texts without BOS, which is put before each.
            streams: per prompt, [n_texts, n_tokens] in [0, 1): one number decides one token; all
                have the same n_tokens.
            stop: a text ends with the first token that contains this, as it does with EOS.

        Returns:
            Per prompt, its n_texts texts, without EOS. A text that used up its numbers breaks off.
        """
        ends = self._ends(stop)
        ids = [
            [token_id(self.tokenizer, BOS), *encoded.ids]
            for encoded in self.tokenizer.encode_batch_fast(list(prompts))
        ]
        texts: list[list[str]] = [[""] * len(stream) for stream in streams]
        for batch in self._batches(ids, streams):
            numbers = torch.from_numpy(np.stack([streams[p][row] for p, row in batch]))
            # Texts of one prompt share what the network has read; else each has its own.
            is_shared = len({p for p, _ in batch}) == 1
            read = [ids[p] for p, _ in (batch[:1] if is_shared else batch)]
            memory, logits = self.network.read(torch.tensor(read, device=self.device))
            if is_shared:
                memory, logits = memory.shared_by(len(batch)), logits.expand(len(batch), -1)
            drawn = self._sample(memory, logits, numbers.to(self.device), ends)
            for (p, row), tokens in zip(batch, drawn, strict=True):
                texts[p][row] = self.tokenizer.decode(tokens, skip_special_tokens=True)
        return texts

    def _batches(
        self, ids: Sequence[list[int]], streams: Sequence[npt.NDArray[np.float64]]
    ) -> list[list[tuple[int, int]]]:
        """Group (prompt, row): rows of one prompt, or single rows of prompts of one length."""
        groups: dict[tuple[str, int], list[tuple[int, int]]] = defaultdict(list)
        for p, stream in enumerate(streams):
            key = ("length", len(ids[p])) if len(stream) == 1 else ("prompt", p)
            groups[key] += [(p, row) for row in range(len(stream))]
        size = self.batch_size
        return [
            group[i : i + size] for group in groups.values() for i in range(0, len(group), size)
        ]

    def _sample(
        self, memory: Memory, logits: torch.Tensor, numbers: torch.Tensor, ends: torch.Tensor
    ) -> list[list[int]]:
        drawn = torch.full(numbers.shape, -1, dtype=torch.int64, device=self.device)
        alive = torch.arange(len(numbers), device=self.device)
        ended = torch.zeros_like(alive, dtype=torch.bool)
        for step in range(numbers.shape[1]):
            tokens = draw(logits / TEMPERATURE, numbers[alive, step])
            drawn[alive, step] = tokens
            ended |= ends[tokens]
            n_ended = int(ended.sum())
            if n_ended == len(ended):
                break
            if n_ended > _DROPPED_SHARE * len(ended):
                kept = (~ended).nonzero().squeeze(1)
                alive, tokens, ended = alive[kept], tokens[kept], ended[kept]
                memory = memory.select(kept)
            logits = self.network.step(tokens, memory)
        is_end = ends.tolist()
        return [_until_end(tokens, is_end) for tokens in drawn.tolist()]

    def _ends(self, stop: str | None) -> torch.Tensor:
        """Return [vocabulary] bool: the tokens that end a text."""
        eos = token_id(self.tokenizer, EOS)
        found = [
            index == eos or (stop is not None and stop in self.tokenizer.decode([index]))
            for index in range(self.network.n_tokens)
        ]
        return torch.tensor(found, device=self.device)


def _until_end(tokens: list[int], is_end: Sequence[bool]) -> list[int]:
    for length, token in enumerate(tokens):
        if token < 0 or is_end[token]:
            return tokens[: length + 1] if token >= 0 else tokens[:length]
    return tokens


def draw(logits: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """Return the first index whose cumulative probability exceeds a number.

    Args:
        logits: [row, vocabulary] float64.
        numbers: [row] float64 in [0, 1).

    Returns:
        [row] int64.
    """
    cumulative = logits.softmax(dim=-1).cumsum(dim=-1)
    found = torch.searchsorted(cumulative, numbers[:, None], right=True).squeeze(1)
    # The last sum may round to less than 1, and a number may lie above it.
    return found.clamp(max=logits.shape[1] - 1)


MAX_ANSWER_TOKENS = 16
"""Tokens of a forced answer, at most."""


def base_traces(
    reasoner: Reasoner, seed: int, name: str, problems: Sequence[Problem], n_candidates: int
) -> dict[str, list[Trace]]:
    """Sample base traces: per setting, each problem's first one of its grade.

    Args:
        reasoner: who reasons.
        seed: of the recipe.
        name: of the reasoner, a part of the streams' names.
        problems: the problems.
        n_candidates: whole solutions per problem in search of the two.

    Raises:
        NotEnoughDataError: no candidate of a grade that the policy could have said.
    """
    streams = [
        uniforms(n_candidates, MAX_NEW_TOKENS, seed, name, some.id, "base") for some in problems
    ]
    candidates = reasoner.complete([some.prompt for some in problems], streams)
    found: dict[str, list[Trace]] = {setting: [] for setting in SETTINGS}
    for some, texts in zip(problems, candidates, strict=True):
        traces = [trace for text in texts if (trace := read_trace(some, text))]
        for setting, grade in SETTINGS.items():
            first = next((trace for trace in traces if trace.is_correct == grade), None)
            if first is None:
                raise NotEnoughDataError(
                    f"no {'right' if grade else 'wrong'} base trace in {len(texts)} candidates",
                    f"{name}, problem {some.id}",
                    "raise n_candidates, or train the reasoner longer",
                )
            found[setting].append(first)
    return found


class Resampler:
    """Samples what follows the prefixes of base traces.

    Args:
        reasoner: who reasons.
        seed: of the recipe.
        place: reasoner and setting, parts of the streams' names.
    """

    def __init__(self, reasoner: Reasoner, seed: int, *place: str) -> None:
        self.reasoner = reasoner
        self.name: tuple[str | int, ...] = (seed, *place)

    def rests(
        self, at: Sequence[tuple[Problem, Trace, int]], n: int, purpose: str
    ) -> list[list[str]]:
        """Sample `n` rests per (problem, base trace, removed sentence).

        Args:
            at: where.
            n: how many.
            purpose: "rollouts", "truth" or "forced", a part of the streams' names.
        """
        is_forced = purpose == "forced"
        length = MAX_ANSWER_TOKENS if is_forced else MAX_NEW_TOKENS
        prompts = []
        for some, trace, index in at:
            prefix = " ".join(sentence.text for sentence in trace.sentences[:index])
            prompts.append(some.prompt + prefix + (FORCED_ANSWER if is_forced else ""))
        streams = [
            uniforms(n, length, *self.name, some.id, index, purpose) for some, _, index in at
        ]
        return self.reasoner.complete(prompts, streams, stop="}" if is_forced else None)
