"""The double-precision network: the library's logits, and one text however it was read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tools.demo.sampling import Memory, Network
from tools.demo.training import Architecture, new_reasoner

CPU = torch.device("cpu")
N_TOKENS = 160
IDS = torch.randint(0, N_TOKENS, (3, 90), generator=torch.Generator().manual_seed(1))
EXACT = 1e-12


@pytest.fixture(scope="module", params=["qwen2", "llama"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint without a zero bias or a unit norm weight, so that all of them count."""
    shape = Architecture(request.param, n_layers=2, d_model=32, n_heads=4, n_kv_heads=2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model = new_reasoner(shape, N_TOKENS)
        with torch.no_grad():
            for weight in model.parameters():
                weight.normal_(mean=float(weight.ndim == 1), std=0.25)
    target = tmp_path_factory.mktemp(str(request.param))
    model.save_pretrained(target)
    return target


@pytest.fixture(scope="module")
def network(folder: Path) -> Network:
    return Network(folder, CPU)


@pytest.fixture(scope="module")
def expected(folder: Path) -> torch.Tensor:
    """The library's logits after each position, [text, position, vocabulary]."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        return model(IDS).logits.double()


def stepped(network: Network, memory: Memory, ids: torch.Tensor) -> list[torch.Tensor]:
    return [network.step(tokens, memory) for tokens in ids.T]


def test_both_architectures_have_what_tells_them_apart(folder: Path, network: Network) -> None:
    assert (network.blocks[0].qkv_bias is not None) == ("qwen2" in folder.name)
    assert network.n_tokens == N_TOKENS
    assert network.embedding.dtype == torch.float64


def test_reading_gives_the_librarys_logits(network: Network, expected: torch.Tensor) -> None:
    assert float(expected.std()) > 0.3
    for length in (1, 2, 17, 90):
        memory, logits = network.read(IDS[:, :length])
        assert (logits.dtype, memory.n_read) == (torch.float64, length)
        torch.testing.assert_close(logits, expected[:, length - 1], atol=1e-4, rtol=0)


def test_every_step_gives_the_librarys_logits(network: Network, expected: torch.Tensor) -> None:
    memory, _ = network.read(IDS[:, :4])
    for place, logits in enumerate(stepped(network, memory, IDS[:, 4:]), start=4):
        torch.testing.assert_close(logits, expected[:, place], atol=1e-4, rtol=0)
    assert memory.n_read == 90


@pytest.mark.parametrize("n_read", [1, 20, 64, 89])
def test_stepping_is_reading_on(network: Network, n_read: int) -> None:
    memory, _ = network.read(IDS[:, :n_read])
    found = stepped(network, memory, IDS[:, n_read:])
    for place in {n_read, 63, 64, 65, 89} - set(range(n_read)):
        _, wanted = network.read(IDS[:, : place + 1])
        torch.testing.assert_close(found[place - n_read], wanted, atol=EXACT, rtol=0)


def test_texts_that_share_a_prompt_are_read_as_if_alone(network: Network) -> None:
    # More than 64 tokens of their own, so that what each text has read outgrows its room.
    n_shared = 15
    together = torch.cat([IDS[:1, :n_shared].expand(3, -1), IDS[:, n_shared:]], dim=1)
    memory, _ = network.read(IDS[:1, :n_shared])
    shared = memory.shared_by(3)
    assert shared.n_read == n_shared
    found = stepped(network, shared, together[:, n_shared:])
    for place in (n_shared, 60, 78, 79, 80, 89):
        _, wanted = network.read(together[:, : place + 1])
        torch.testing.assert_close(found[place - n_shared], wanted, atol=EXACT, rtol=0)


def test_a_prompt_can_be_shared_twice_and_read_on(network: Network) -> None:
    memory, _ = network.read(IDS[:1, :10])
    first, second = memory.shared_by(2), memory.shared_by(2)
    network.step(IDS[:2, 10], first)
    network.step(IDS[:1, 11], memory)
    found = network.step(IDS[1:, 12], second)
    for row, last in enumerate(IDS[1:, 12:13]):
        _, wanted = network.read(torch.cat([IDS[:1, :10], last[None]], dim=1))
        torch.testing.assert_close(found[row : row + 1], wanted, atol=EXACT, rtol=0)


@pytest.mark.parametrize("is_shared", [True, False])
def test_some_of_the_texts_go_on_without_the_others(network: Network, is_shared: bool) -> None:
    n_read, kept = 30, torch.tensor([2, 0])
    texts = IDS.clone()
    if is_shared:
        texts[:, :n_read] = texts[0, :n_read]
    memory, _ = network.read(texts[: 1 if is_shared else 3, :n_read])
    memory = memory.shared_by(3) if is_shared else memory
    stepped(network, memory, texts[:, n_read:50])
    some = memory.select(kept)
    found = stepped(network, some, texts[kept, 50:])
    for place in (50, 70, 89):
        _, wanted = network.read(texts[kept, : place + 1])
        torch.testing.assert_close(found[place - 50], wanted, atol=EXACT, rtol=0)
    # What was selected is a copy: the others read on undisturbed.
    _, wanted = network.read(texts[:, :51])
    torch.testing.assert_close(network.step(texts[:, 50], memory), wanted, atol=EXACT, rtol=0)
