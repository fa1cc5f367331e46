"""Training: it learns, from completions alone, reproducibly, and leaves a standard folder."""

from __future__ import annotations

import json
import logging
from itertools import takewhile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from taprobe_core.demo.policy import read_answer, read_trace
from taprobe_core.demo.task import FORCED_ANSWER, N_TASKS, VERBS, Trace, problem
from taprobe_core.demo.tokenizer import train_tokenizer
from taprobe_core.errors import ConfigError
from tools.demo import training
from tools.demo.training import (
    Architecture,
    Example,
    Training,
    learning_rate,
    new_reasoner,
    train_reasoner,
    training_examples,
)

pytestmark = pytest.mark.slow  # trains, if briefly

CPU = torch.device("cpu")
SHAPE = Architecture("llama", n_layers=2, d_model=32)
BRIEF = Training(n_traces=300, n_steps=5, batch_size=8, n_warmup=2)
PROMPTS = {problem(i).prompt: problem(i) for i in range(N_TASKS)}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(folder, 0)
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    return training_examples(300, seed=0)


def is_forced(example: Example) -> bool:
    return example.prompt.endswith(FORCED_ANSWER)


def test_examples_are_the_policys_traces(examples: list[Example]) -> None:
    whole = [example for example in examples if not is_forced(example)]
    traces = [read_trace(PROMPTS[example.prompt], example.completion) for example in whole]
    assert None not in traces
    assert {PROMPTS[example.prompt].verb for example in whole} == set(VERBS)
    n_flat = [n_joined_by_blanks(trace) for trace in traces if trace]
    # By chance alone, few traces would begin with eight sentences in one paragraph.
    assert sum(n >= 8 for n in n_flat) > 0.2 * len(n_flat)
    assert sum(n < 4 for n in n_flat) > 0.3 * len(n_flat)


def n_joined_by_blanks(trace: Trace) -> int:
    """Sentences after the first, until the first paragraph break."""
    separators = [sentence.separator for sentence in trace.sentences[1:]]
    return len(list(takewhile(lambda separator: separator == " ", separators)))


def test_some_examples_force_an_answer(examples: list[Example]) -> None:
    forced = [example for example in examples if is_forced(example)]
    assert 0.05 < len(forced) / len(examples) < 0.16
    for example in forced:
        start = next(prompt for prompt in PROMPTS if example.prompt.startswith(prompt))
        answer = read_answer(PROMPTS[start], example.completion)
        assert answer.answer.isdecimal()
        assert example.completion == f"{answer.answer}}}."
        assert "\n\n" not in example.prompt.removeprefix(start).removesuffix(FORCED_ANSWER)


def test_more_examples_begin_with_the_same_ones(examples: list[Example]) -> None:
    assert training_examples(40, seed=0) == examples[:40]
    assert training_examples(40, seed=1) != examples[:40]


def test_the_rate_rises_to_its_peak_and_falls_to_a_hundredth() -> None:
    schedule = Training(n_steps=100, n_warmup=10, learning_rate=0.5)
    rates = [learning_rate(step, schedule) for step in range(101)]
    assert rates[:10] == pytest.approx([0.05 * (step + 1) for step in range(10)])
    assert rates[10] == pytest.approx(0.5)
    assert rates[55] == pytest.approx(0.5 * (1 + 0.01) / 2)
    assert rates[100] == pytest.approx(0.005)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    only_rise = Training(n_steps=4, n_warmup=4, learning_rate=1.0)
    assert [learning_rate(step, only_rise) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]


def test_the_loss_falls(tmp_path: Path, tokenizer: Tokenizer, examples: list[Example]) -> None:
    before = Training(n_steps=1, batch_size=8, learning_rate=0.0, n_warmup=0)
    after = Training(n_steps=30, batch_size=8, learning_rate=5e-3, n_warmup=5)
    losses = [
        train_reasoner(tmp_path / str(i), SHAPE, schedule, tokenizer, examples, 3, CPU)
        for i, schedule in enumerate((before, after))
    ]
    assert losses[0] == pytest.approx(6.24, abs=0.1)  # ln 512: it knows nothing
    assert losses[1] < losses[0] - 1.0  # the mean over all steps, the first ones included


@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_the_loss_is_that_of_completions_alone(
    tmp_path: Path, tokenizer: Tokenizer, family: str
) -> None:
    few = training_examples(6, seed=2)
    shape = Architecture(family, n_layers=1, d_model=16)  # type: ignore[arg-type]
    still = Training(n_steps=1, batch_size=6, learning_rate=0.0, weight_decay=0.0, n_warmup=0)
    loss = train_reasoner(tmp_path, shape, still, tokenizer, few, 11, CPU)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        model = new_reasoner(shape, tokenizer.get_vocab_size())
    costs: list[float] = []
    for prompt, completion in few:
        told, learned = tokenizer.encode(prompt).ids, [*tokenizer.encode(completion).ids, 1]
        with torch.inference_mode():
            logits = model(torch.tensor([[0, *told, *learned]])).logits[0].log_softmax(dim=-1)
        start = 1 + len(told)
        costs += [-float(logits[start + i - 1, token]) for i, token in enumerate(learned)]
    assert loss == pytest.approx(sum(costs) / len(costs), abs=1e-4)


def trained(folder: Path, tokenizer: Tokenizer, examples: list[Example], seed: int) -> Path:
    train_reasoner(folder, SHAPE, BRIEF, tokenizer, examples, seed, CPU)
    return folder


def test_equal_seeds_give_equal_weights(
    tmp_path: Path, tokenizer: Tokenizer, examples: list[Example]
) -> None:
    torch.manual_seed(1)
    state, precision = torch.get_rng_state(), torch.get_float32_matmul_precision()
    first = trained(tmp_path / "first", tokenizer, examples, 5)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_float32_matmul_precision() == precision
    torch.manual_seed(2)
    again = trained(tmp_path / "again", tokenizer, examples, 5)
    other = trained(tmp_path / "other", tokenizer, examples, 6)
    weights = [(each / "model.safetensors").read_bytes() for each in (first, again, other)]
    assert weights[0] == weights[1] != weights[2]


def test_the_folder_is_a_standard_one(
    tmp_path: Path, tokenizer: Tokenizer, examples: list[Example]
) -> None:
    folder = trained(tmp_path, tokenizer, examples, 5)
    weights = load_file(folder / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    assert "lm_head.weight" not in weights
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert (config["num_hidden_layers"], config["hidden_size"]) == (2, 32)
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (0, 1, 2)
    assert config["vocab_size"] == tokenizer.get_vocab_size()
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.float16
    assert torch.equal(model.get_input_embeddings().weight, weights["model.embed_tokens.weight"])
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_progress_is_reported(
    tmp_path: Path,
    tokenizer: Tokenizer,
    examples: list[Example],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(training, "_REPORT_EVERY", 2)
    with caplog.at_level(logging.INFO, logger="tools.demo.training"):
        trained(tmp_path, tokenizer, examples, 5)
    assert [record.message[:12] for record in caplog.records] == ["step 2: loss", "step 4: loss"]


def test_too_few_examples_for_a_batch_are_refused_at_once(
    tmp_path: Path, tokenizer: Tokenizer, examples: list[Example]
) -> None:
    with pytest.raises(ConfigError, match="7 examples for batches of 8"):
        train_reasoner(tmp_path, SHAPE, BRIEF, tokenizer, examples[:7], 5, CPU)
