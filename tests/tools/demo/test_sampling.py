"""Sampling: fixed streams, exact draws, texts that do not depend on what is sampled beside them."""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from itertools import accumulate
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

from taprobe_core.demo.tokenizer import train_tokenizer
from tools.demo import sampling
from tools.demo.sampling import Reasoner, draw, uniforms
from tools.demo.training import Architecture, new_reasoner

CPU = torch.device("cpu")
LENGTH = 24

FloatArray = npt.NDArray[np.float64]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random reasoner; its texts are as varied as its vocabulary."""
    target = tmp_path_factory.mktemp("reasoner")
    train_tokenizer(target, 0, vocab_size=320)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = new_reasoner(Architecture("qwen2", n_layers=2, d_model=16), 320)
        with torch.no_grad():
            for weight in model.parameters():
                weight.normal_(mean=float(weight.ndim == 1), std=0.3)
    model.save_pretrained(target)
    return target


@pytest.fixture(scope="module")
def reasoner(folder: Path) -> Reasoner:
    return Reasoner(folder, CPU)


def test_streams_are_fixed_for_good() -> None:
    assert uniforms(2, 3, 0, "tiny-qwen2", 4711, "base").tolist() == [
        [0.1571553804198491, 0.6975938298242558, 0.25529105066234725],
        [0.3692719238547726, 0.5474105503719484, 0.3169730325362192],
    ]
    assert uniforms(1000, 50, "x")[-1, -1] == 0.27611712346746875


def test_fewer_rows_are_the_first_ones_and_names_tell_streams_apart() -> None:
    many = uniforms(50, 7, 1, "a", 2)
    assert np.array_equal(uniforms(3, 7, 1, "a", 2), many[:3])
    assert np.array_equal(uniforms(50, 7, "1", "a", "2"), many)
    for other in ((1, "a", 3), (1, "b", 2), (12, "a"), (1, "a")):
        assert not np.isin(uniforms(50, 7, *other), many).any()
    assert uniforms(0, 7, "a").shape == (0, 7)


def test_streams_are_uniform_multiples_of_the_finest_step() -> None:
    found = uniforms(400, 100, "uniform")
    assert (found.shape, found.dtype) == ((400, 100), np.float64)
    assert found.min() >= 0.0
    assert found.max() < 1.0
    assert np.array_equal(np.mod(found * 2.0**53, 1.0), np.zeros_like(found))
    counts, _ = np.histogram(found, bins=50, range=(0, 1))
    assert chisquare(counts).pvalue > 0.001


def first_above(logits: list[float], number: float) -> int:
    """The definition of a draw, in plain Python."""
    weights = np.exp(np.array(logits) - max(logits))
    shares = accumulate((weights / weights.sum()).tolist())
    return min(bisect_right(list(shares), number), len(logits) - 1)


def edges(logits: list[float]) -> list[float]:
    weights = np.exp(np.array(logits) - max(logits))
    return list(accumulate((weights / weights.sum()).tolist()))


@given(
    st.lists(st.floats(-30, 30), min_size=1, max_size=12),
    st.one_of(
        st.floats(0, 1, exclude_max=True),
        st.sampled_from([0.0, 0.5, 1 - 2.0**-53, 1 - 2.0**-40, 2.0**-53]),
    ),
)
def test_a_draw_is_the_first_index_above_its_number(logits: list[float], number: float) -> None:
    rows = torch.tensor([logits], dtype=torch.float64)
    found = int(draw(rows, torch.tensor([number], dtype=torch.float64)))
    wanted = first_above(logits, number)
    # Sums that are rounded in another order may put a number on the other side of an edge.
    is_edge = any(abs(edge - number) < 1e-14 for edge in edges(logits))
    assert found == wanted or is_edge
    assert 0 <= found < len(logits)


def test_draws_at_the_edges() -> None:
    logits = torch.zeros(6, 4, dtype=torch.float64)
    numbers = torch.tensor(
        [0.0, 0.25, 0.25 - 2.0**-54, 0.5, 0.75, 1 - 2.0**-53], dtype=torch.float64
    )
    assert draw(logits, numbers).tolist() == [0, 1, 0, 2, 3, 3]


def test_a_number_above_the_last_sum_draws_the_last_index() -> None:
    shares = torch.tensor([[0.1] * 10], dtype=torch.float64)
    assert float(shares.cumsum(dim=-1)[0, -1]) < 1 - 2.0**-54
    assert draw(shares.log(), torch.tensor([1 - 2.0**-53], dtype=torch.float64)).tolist() == [9]


def one_by_one(
    reasoner: Reasoner, prompt: str, numbers: FloatArray, stop: str | None = None
) -> str:
    """Sample one text the slow way: read everything again for each token."""
    ids = [0, *reasoner.tokenizer.encode(prompt).ids]
    drawn: list[int] = []
    for number in numbers:
        _, logits = reasoner.network.read(torch.tensor([ids + drawn]))
        drawn.append(first_above(logits[0].tolist(), number))
        if drawn[-1] == 1 or (stop and stop in reasoner.tokenizer.decode(drawn[-1:])):
            break
    text: str = reasoner.tokenizer.decode(drawn, skip_special_tokens=True)
    return text


PROMPTS = ["Find z.", "Evaluate z when x = 2.", "Hmm, which order is right?", "Find x.", "So"]
N_TEXTS = [9, 1, 4, 1, 1]
STREAMS = [uniforms(n, LENGTH, "test", i) for i, n in enumerate(N_TEXTS)]


@pytest.mark.parametrize("stop", [None, "e", "}"])
def test_texts_are_those_of_the_definition_alone(reasoner: Reasoner, stop: str | None) -> None:
    expected = [
        [one_by_one(reasoner, prompt, row, stop) for row in stream]
        for prompt, stream in zip(PROMPTS, STREAMS, strict=True)
    ]
    assert len({text for texts in expected for text in texts}) > 14
    assert reasoner.complete(PROMPTS, STREAMS, stop=stop) == expected
    for i in range(len(PROMPTS)):
        assert reasoner.complete([PROMPTS[i]], [STREAMS[i]], stop=stop) == [expected[i]]
    # The same row alone, among rows of its own prompt, and among single rows of other prompts.
    alone = [rows[:1] for rows in STREAMS]
    assert reasoner.complete(PROMPTS, alone, stop=stop) == [texts[:1] for texts in expected]


@pytest.mark.parametrize("batch_size", [1, 2, 5, 2048])
def test_texts_do_not_depend_on_the_batch_size(
    folder: Path, reasoner: Reasoner, batch_size: int
) -> None:
    wanted = reasoner.complete(PROMPTS, STREAMS, stop="e")
    other = Reasoner(folder, CPU, batch_size=batch_size)
    assert other.complete(PROMPTS, STREAMS, stop="e") == wanted


def test_a_text_ends_with_the_first_token_that_has_the_stop(reasoner: Reasoner) -> None:
    streams = [uniforms(60, LENGTH, "stop")]
    (free,), (stopped,) = (reasoner.complete(["Find z."], streams, stop) for stop in (None, "e"))
    assert sum("e" in text for text in free) > 30
    for whole, text in zip(free, stopped, strict=True):
        assert whole.startswith(text)
        assert text == whole or "e" in text
        assert "e" not in text[: text.find("e")]
    lengths = {len(text) for text in stopped}
    assert len(lengths) > 5


def test_a_text_that_uses_up_its_numbers_breaks_off(reasoner: Reasoner) -> None:
    numbers = uniforms(30, LENGTH, "short")
    (whole,) = reasoner.complete(["Find z."], [numbers])
    (short,) = reasoner.complete(["Find z."], [numbers[:, :5]])
    for text, longer in zip(short, whole, strict=True):
        # Bytes at the end may be a part of a character that the next token completes.
        assert longer.startswith(text.rstrip("\ufffd"))
    assert sum(len(text) < len(longer) for text, longer in zip(short, whole, strict=True)) > 25
    assert reasoner.complete(["Find z."], [numbers[:, :0]]) == [[""] * 30]


def test_no_texts_where_none_were_asked_for(reasoner: Reasoner) -> None:
    assert reasoner.complete([], []) == []
    streams = [uniforms(0, 4, "none"), uniforms(2, 4, "some")]
    none, some = reasoner.complete(["Find z.", "Find x."], streams)
    assert (none, len(some)) == ([], 2)


def test_eos_ends_a_text_and_is_not_in_it(folder: Path, reasoner: Reasoner, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    eager = Reasoner(tmp_path, CPU)
    # The end's cumulative share is up to the second: numbers below it end a text at once.
    _, logits = reasoner.network.read(torch.tensor([[0, *eager.tokenizer.encode("So").ids]]))
    first, second = edges(logits[0].tolist())[:2]
    rows = uniforms(2, LENGTH, "eos")
    rows[0, 0] = (first + second) / 2
    assert eager.complete(["So"], [rows]) == [["", one_by_one(reasoner, "So", rows[1])]]


def test_first_tokens_are_as_frequent_as_the_softmax_says(reasoner: Reasoner) -> None:
    n, prompt = 6000, "Hmm, which order is right?"
    (texts,) = reasoner.complete([prompt], [uniforms(n, 1, "frequencies")])
    _, logits = reasoner.network.read(torch.tensor([[0, *reasoner.tokenizer.encode(prompt).ids]]))
    expected: dict[str, float] = defaultdict(float)
    for token, share in enumerate(logits[0].softmax(dim=0).tolist()):
        expected[reasoner.tokenizer.decode([token], skip_special_tokens=True)] += n * share
    common = [text for text, count in expected.items() if count >= 8]
    observed = [texts.count(text) for text in common]
    rest = n - sum(observed), n - sum(expected[text] for text in common)
    assert len(common) > 20
    found = chisquare([*observed, rest[0]], [*(expected[text] for text in common), rest[1]])
    assert found.pvalue > 0.001


def test_the_temperature_divides_the_logits(
    reasoner: Reasoner, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = uniforms(200, 1, "temperature")
    _, logits = reasoner.network.read(torch.tensor([[0, *reasoner.tokenizer.encode("So").ids]]))
    monkeypatch.setattr(sampling, "TEMPERATURE", 0.5)
    (cold,) = reasoner.complete(["So"], [numbers])
    tokens = [first_above((2 * logits[0]).tolist(), number) for (number,) in numbers]
    assert cold == [reasoner.tokenizer.decode([i], skip_special_tokens=True) for i in tokens]
