"""Faults of kept attention: none in what the engine's own function makes, one for each planted."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from taprobe_core.activations.pooling import mass_faults
from taprobe_core.attention.mass import sentence_mass, tail_mass

N_TOKENS = 60
SPANS = [(1, 9), (8, 20), (20, 21), (25, 44), (44, 60)]
"""Two share a token, and four tokens are in none."""
Tensors = dict[str, torch.Tensor]


def tensors(mode: str) -> Tensors:
    rng = torch.Generator().manual_seed(0)
    query, key = (torch.randn(N_TOKENS, heads, 8, generator=rng) for heads in (4, 2))
    lengths = torch.tensor([end - start for start, end in SPANS], dtype=torch.int32)
    if mode == "full":
        found = sentence_mass(query, key, SPANS, 0.3)
        return {"mass": found.mass, "bos_mass": found.bos_mass, "n_tokens": lengths}
    tail = tail_mass(query, key, SPANS, 0.3, 20)
    return {
        "tail_mass": tail.mass,
        "bos_mass": tail.bos_mass,
        "is_after": tail.is_after,
        "n_tokens": lengths,
    }


@pytest.mark.parametrize("mode", ["full", "light"])
def test_measured_mass_has_no_fault(mode: str) -> None:
    found = tensors(mode)
    assert mass_faults(found, SPANS, N_TOKENS) == []
    # The shared token lets sentence 0 reach into sentence 1, and no further.
    if mode == "full":
        assert (found["mass"][:, 0, 1] > 0).all()
        assert (found["mass"][:, 0, 2:] == 0).all()


def put(name: str, at: tuple[int, ...], value: float) -> Callable[[Tensors], None]:
    def change(found: Tensors) -> None:
        found[name][at] = value

    return change


def without_first_sentence(found: Tensors) -> None:
    found["tail_mass"] = found["tail_mass"][..., 1:]


@pytest.mark.parametrize(
    ("mode", "change", "said"),
    [
        ("full", put("mass", (0, 2, 4), 0.1), "1 masses are on sentences that come later"),
        ("full", put("mass", (3, 2, 0), 3.0), "1 rows hold more than their tokens"),
        ("full", put("bos_mass", (1, 1), -0.1), "1 masses are below zero"),
        ("full", put("bos_mass", (1, 1), float("inf")), "1 masses are NaN or infinite"),
        ("full", put("n_tokens", (2,), 2), "1 sentences have another length"),
        ("light", put("tail_mass", (0, 0, 4), 0.1), "1 masses are on sentences that come later"),
        ("light", put("is_after", (19, 0), 0), "1 queries stand on the wrong side of a sentence"),
        (
            "light",
            without_first_sentence,
            "mass [4, 20, 4] and BOS mass [4, 20] for 5 sentences, 20 rows",
        ),
    ],
)
def test_a_planted_fault_is_the_one_named(
    mode: str, change: Callable[[Tensors], None], said: str
) -> None:
    found = tensors(mode)
    change(found)
    assert mass_faults(found, SPANS, N_TOKENS) == [said]
