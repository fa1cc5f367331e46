"""The policy's traces -> a small trained reasoner in a `from_pretrained` folder; its gates.

A plain next-token loss on completions only. Half of the examples have their first sentences joined
by one blank, as the prompts of rollouts join them, and in a tenth an answer is forced after some
sentence, so that nothing that is sampled later is foreign to the model. Three gates compare its
texts with the policy's: the format is valid, the plan is chosen as often as the policy chooses it,
sums and products come out right as often as the policy's. What does not belong here: sampling.

Invariant: on one machine and library version, the weights depend on the arguments alone; another
device rounds otherwise, so what is shipped are the weights, not a promise to reach them again.
"""

from __future__ import annotations

import logging
import math
import operator
import random
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from taprobe_core.demo.policy import (
    THINK_END,
    boxed,
    drawn_answers,
    drawn_trace,
    read_trace,
    split_sentences,
)
from taprobe_core.demo.rules import RIGHT_PLAN
from taprobe_core.demo.task import FORCED_ANSWER, N_TASKS, VERBS, Problem, problem, seeded
from taprobe_core.demo.tokenizer import BOS, EOS, MAX_LENGTH, token_id
from taprobe_core.demo.wording import KINDS
from taprobe_core.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer


MIN_FORMAT_VALID = 0.99
MAX_PLAN_ODDS_ERROR = 0.05
MIN_ARITHMETIC_RATIO = 0.97

_RIGHT = frozenset(KINDS["plan_products"].forms)
_PLANS = _RIGHT | frozenset(KINDS["plan_in_order"].forms)
_FORMS = [
    re.compile(re.sub(r"\\\{\w+\\\}", r"(?:[\\w ,=+*-]+)", re.escape(form)))
    for kind in KINDS.values()
    for form in kind.forms
]
_EQUATION = re.compile(r"(\d+) ([+*-]) (\d+) = (\d+)")
_SPOKEN = re.compile(r"(Multiplying|Adding) (\d+) (?:by|and) (\d+) gives (\d+)")
_OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul}


def is_valid_format(solution: str) -> bool:
    """Whether every sentence has a form of the policy, and an answer is boxed after the thinking.

    Numbers may be wrong, and sentences may stand in a wrong order.

    Args:
        solution: everything after the prompt.
    """
    thinking, tag, rest = solution.partition(THINK_END)
    texts, _, left = split_sentences(thinking)
    if not (tag and texts and not left and boxed(rest).isdecimal()):
        return False
    return all(any(form.fullmatch(text) for form in _FORMS) for text in texts)


def equations(solution: str) -> list[bool]:
    """Return, for each equation in the thinking, whether it is right."""
    thinking = solution.partition(THINK_END)[0]
    found = [(a, sign, b, c) for a, sign, b, c in _EQUATION.findall(thinking)]
    found += [
        (a, "*" if verb == "Multiplying" else "+", b, c)
        for verb, a, b, c in _SPOKEN.findall(thinking)
    ]
    return [_OPERATORS[sign](int(a), int(b)) == int(c) for a, sign, b, c in found]


def takes_right_plan(solution: str) -> bool | None:
    """Whether the first plan is to do the products first; None without a plan."""
    texts, _, _ = split_sentences(solution.partition(THINK_END)[0])
    plan = next((text for text in texts if text in _PLANS), None)
    return None if plan is None else plan in _RIGHT


def measure_gates(problems: Sequence[Problem], solutions: Sequence[str]) -> dict[str, float]:
    """Measure the gates.

    Args:
        problems: one per solution; every verb occurs.
        solutions: whole solutions of the trained reasoner, temperature 1.

    Returns:
        format_valid: share of valid formats. possible: share that the policy could have said to
        the letter. plan_odds_<verb>: share of right plans; plan_odds_error: the largest distance
        of these from the policy's odds. arithmetic: share of right equations; arithmetic_ratio:
        this over the same share of as many traces of the policy on the same problems.
    """
    rng = seeded("gates")
    policys = [trace.thinking for trace in (drawn_trace(some, rng) for some in problems)]
    odds = {verb: _right_plans(problems, solutions, verb) for verb in VERBS}
    arithmetic = _share_right(solutions)
    n = len(solutions)
    return {
        "format_valid": sum(map(is_valid_format, solutions)) / n,
        "possible": sum(
            read_trace(*pair) is not None for pair in zip(problems, solutions, strict=True)
        )
        / n,
        **{f"plan_odds_{verb}": share for verb, share in odds.items()},
        # Unlike `max`, this is NaN wherever one of them is.
        "plan_odds_error": float(np.max([abs(odds[verb] - RIGHT_PLAN[verb]) for verb in VERBS])),
        "arithmetic": arithmetic,
        "arithmetic_ratio": arithmetic / _share_right(policys),
    }


def failed_gates(measured: Mapping[str, float]) -> list[str]:
    """Return what a reasoner fails, in words; empty if it passes."""
    # Written so that an undefined figure (NaN) fails.
    faults = [
        f"{name} {measured[name]:.4f}, not {bound} or more"
        for name, bound in (
            ("format_valid", MIN_FORMAT_VALID),
            ("arithmetic_ratio", MIN_ARITHMETIC_RATIO),
        )
        if not measured[name] >= bound
    ]
    error = measured["plan_odds_error"]
    if not error <= MAX_PLAN_ODDS_ERROR:
        faults.append(f"plan_odds_error {error:.4f}, not {MAX_PLAN_ODDS_ERROR} or less")
    return faults


def _right_plans(problems: Sequence[Problem], solutions: Sequence[str], verb: str) -> float:
    plans = [
        plan
        for some, solution in zip(problems, solutions, strict=True)
        if some.verb == verb and (plan := takes_right_plan(solution)) is not None
    ]
    return sum(plans) / len(plans) if plans else math.nan


def _share_right(solutions: Sequence[str]) -> float:
    found = [right for solution in solutions for right in equations(solution)]
    return sum(found) / len(found) if found else math.nan


_log = logging.getLogger(__name__)

FLATTENED, FORCED = 0.5, 0.1
"""Shares of examples with a flattened beginning, and with a forced answer."""

_IGNORED = -100
_REPORT_EVERY = 500


@dataclass(frozen=True, slots=True)
class Architecture:
    """The shape of a reasoner.

    Attributes:
        family: the library's architecture.
        n_layers: blocks.
        d_model: width of the residual stream.
        n_heads: query heads.
        n_kv_heads: key-value heads.
    """

    family: Literal["qwen2", "llama"]
    n_layers: int = 4
    d_model: int = 128
    n_heads: int = 4
    n_kv_heads: int = 2


@dataclass(frozen=True, slots=True)
class Training:
    """How long and how fast a reasoner is trained.

    Attributes:
        n_traces: distinct examples; each is seen about n_steps * batch_size / n_traces times.
        n_steps: optimizer steps.
        batch_size: examples a step.
        learning_rate: peak, reached after `n_warmup` steps; falls to a hundredth by a cosine.
        n_warmup: steps of linear rise.
        weight_decay: of AdamW.
    """

    n_traces: int = 100_000
    n_steps: int = 6000
    batch_size: int = 192
    learning_rate: float = 2e-3
    n_warmup: int = 200
    weight_decay: float = 0.01


class Example(NamedTuple):
    """A text to learn from; the loss is on the completion alone."""

    prompt: str
    completion: str


def training_examples(n_traces: int, seed: int) -> list[Example]:
    """Draw traces of the policy on problems of all kinds.

    Args:
        n_traces: how many.
        seed: of the draw.
    """
    rng = seeded(seed, "training")
    return [_example(rng) for _ in range(n_traces)]


def train_reasoner(
    folder: Path,
    architecture: Architecture,
    training: Training,
    tokenizer: Tokenizer,
    examples: Sequence[Example],
    seed: int,
    device: torch.device,
) -> float:
    """Train a reasoner and write `config.json` and `model.safetensors` (float16).

    Args:
        folder: where the two files go; created if absent.
        architecture: its shape.
        training: its schedule.
        tokenizer: the demo's tokenizer.
        examples: what it reads.
        seed: of initial weights and order.
        device: where to compute: in float32, with TF32 products where the device has them.

    Returns:
        Mean loss of the last hundred steps, in nats a token.

    Raises:
        ConfigError: `examples` do not fill one batch.
    """
    import torch

    began = time.monotonic()
    ids, starts = _tokenized(examples, tokenizer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = new_reasoner(architecture, tokenizer.get_vocab_size()).to(device)
    optimizer = torch.optim.AdamW(
        model.parameters(), weight_decay=training.weight_decay, betas=(0.9, 0.98), fused=True
    )
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    losses = []
    batches = _batches(len(ids), training, seed)
    for step, rows in enumerate(islice(batches, training.n_steps)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, training)
        loss = _loss(model, ids[rows], starts[rows], device)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.detach())
        if (step + 1) % _REPORT_EVERY == 0:
            recent = float(torch.stack(losses[-100:]).mean())
            seconds = time.monotonic() - began
            _log.info("step %d: loss %.4f, %.0f s", step + 1, recent, seconds)
    torch.set_float32_matmul_precision(precision)
    model.half().save_pretrained(folder)
    return float(torch.stack(losses[-100:]).mean())


def new_reasoner(architecture: Architecture, vocab_size: int) -> Any:
    """Return an untrained causal language model, drawn from torch's default generator.

    Args:
        architecture: its shape.
        vocab_size: rows of the tied embedding.
    """
    from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

    family = {"qwen2": Qwen2Config, "llama": LlamaConfig}[architecture.family]
    return AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
        family(
            vocab_size=vocab_size,
            hidden_size=architecture.d_model,
            intermediate_size=3 * architecture.d_model,
            num_hidden_layers=architecture.n_layers,
            num_attention_heads=architecture.n_heads,
            num_key_value_heads=architecture.n_kv_heads,
            max_position_embeddings=MAX_LENGTH,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=2,
        )
    )


def learning_rate(step: int, training: Training) -> float:
    """Return the learning rate of a step: a linear rise, then half a cosine down to a hundredth."""
    if step < training.n_warmup:
        return training.learning_rate * (step + 1) / training.n_warmup
    done = (step - training.n_warmup) / max(1, training.n_steps - training.n_warmup)
    return training.learning_rate * (0.01 + 0.99 * (1 + math.cos(math.pi * done)) / 2)


def _batches(n: int, training: Training, seed: int) -> Iterator[npt.NDArray[np.int64]]:
    """Yield the rows of each step; every example once before any comes again."""
    rng, size = np.random.default_rng(seed), training.batch_size
    if n < size:
        raise ConfigError(
            f"{n} examples for batches of {size}",
            "training.n_traces",
            "raise n_traces, or lower batch_size",
        )
    while True:
        order = rng.permutation(n)
        yield from (order[i : i + size] for i in range(0, n - size + 1, size))


def _loss(
    model: Any,
    ids: npt.NDArray[np.int64],
    starts: npt.NDArray[np.int64],
    device: torch.device,
) -> torch.Tensor:
    import torch

    length = int((ids != _IGNORED).sum(axis=1).max())
    batch = torch.from_numpy(ids[:, :length]).to(device, torch.int64)
    place = torch.arange(length, device=device)
    prompt = place < torch.from_numpy(starts).to(device)[:, None]
    # Padding stands behind every token that counts, and attention is causal: no mask is needed.
    logits = model(input_ids=batch.clamp(min=0), use_cache=False).logits
    targets = batch.masked_fill(prompt, _IGNORED)[:, 1:]
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), targets.flatten(), ignore_index=_IGNORED
    )


def _tokenized(
    examples: Sequence[Example], tokenizer: Tokenizer
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return token ids [example, length], padded with `_IGNORED`, and where completions begin."""
    bos, eos = token_id(tokenizer, BOS), token_id(tokenizer, EOS)
    prompts = tokenizer.encode_batch_fast([example.prompt for example in examples])
    completions = tokenizer.encode_batch_fast([example.completion for example in examples])
    rows = [
        [bos, *prompt.ids, *completion.ids, eos]
        for prompt, completion in zip(prompts, completions, strict=True)
    ]
    ids = np.full((len(rows), max(map(len, rows))), _IGNORED, dtype=np.int64)
    for row, tokens in zip(ids, rows, strict=True):
        row[: len(tokens)] = tokens
    return ids, np.array([1 + len(prompt.ids) for prompt in prompts])


def _example(rng: random.Random) -> Example:
    asked = problem(rng.randrange(N_TASKS))
    trace = drawn_trace(asked, rng)
    texts = [sentence.text for sentence in trace.sentences]
    if rng.random() < FORCED:
        prefix = texts[: rng.randrange(len(texts))]
        (answer,) = drawn_answers(asked, prefix, 1, rng)
        return Example(asked.prompt + " ".join(prefix) + FORCED_ANSWER, answer.text)
    n_flat = rng.randrange(1, len(texts)) if rng.random() < FLATTENED else 1
    later = "".join(sentence.separator + sentence.text for sentence in trace.sentences[n_flat:])
    return Example(asked.prompt, " ".join(texts[:n_flat]) + later + trace.ending)
