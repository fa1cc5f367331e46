"""Every architecture is equal to eager transformers or refused by name: a part of the sweep.

The whole is `make architectures`, which writes docs/architectures.md; here some types of each kind
and some drawn configurations, and that the page speaks of the transformers that is installed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers

from tools.architectures import sweep
from tools.architectures.agreement import Ways, make_texts
from tools.architectures.fuzz import draw
from tools.architectures.page import page_of, rows_of
from tools.architectures.sweep import Verdict, causal_types, judge_seed, judge_type

PAGE = (Path(__file__).parents[3] / "docs" / "architectures.md").read_text(encoding="utf-8")

TYPES = (
    *("llama", "gpt2"),  # plain attention
    *("mistral", "gemma3_text", "gpt_neo"),  # windows: in the configuration, by layer, in a buffer
    "llama4_text",  # chunks, in the mask alone
    *("gemma2", "gpt_oss"),  # capped scores, sinks
    *("falcon_h1", "mamba2", "recurrent_gemma", "lfm2"),  # states and convolutions
    *("bloom", "deepseek_v3", "gemma3n_text"),  # biases of position, latent attention, side inputs
    *("bert", "bart"),  # encoders
)
SEEDS = range(15)

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers, about tiny configurations


EAGER = "by `attn_implementation: eager`"
"""What the page says of an architecture that a study has to ask eager attention for."""


@pytest.fixture(autouse=True)
def _quiet() -> None:
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


@pytest.mark.parametrize("model_type", TYPES)
def test_a_type_is_equal_or_refused_as_the_page_says(model_type: str) -> None:
    verdict = judge_type(model_type)
    assert verdict.is_right, verdict.detail
    found = [verdict.kind, verdict.alone, verdict.packed, verdict.attention]
    assert found == rows_of(PAGE)[model_type][:4]
    if "refused" in found or "not built" in found:
        assert verdict.reason
    else:
        assert verdict.reason in ("", EAGER)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_drawn_configuration_is_equal_or_refused(seed: int) -> None:
    verdict = judge_seed(seed)
    assert verdict.is_right, f"{verdict.detail}; {verdict.told}"
    assert "not built" not in (verdict.alone, verdict.packed, verdict.attention)


def test_the_page_lists_every_causal_type_of_the_installed_transformers() -> None:
    rows = rows_of(PAGE)
    assert {name: row[0] for name, row in rows.items()} == causal_types()
    assert f"transformers {transformers.__version__} " in PAGE, "run `make architectures`"
    words = {word for row in rows.values() for word in row[1:4]}
    assert words <= {"equal", "refused", "not built"}
    for name, row in rows.items():
        assert (row[1:4] == ["equal"] * 3) is (row[4] in ("", EAGER)), name
    assert sum("not built" not in row for row in rows.values()) >= 120


def test_a_difference_is_seen_and_an_exception_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sweep can fail: another reference is a silent difference, a KeyError is raw."""
    true = sweep.references

    def a_little_off(*args: Any) -> Any:
        found = true(*args)
        found[-1].states[2][5] *= 1.01
        return found

    monkeypatch.setattr(sweep, "references", a_little_off)
    verdict = judge_type("llama")
    assert (verdict.alone, verdict.packed, verdict.attention) == ("SILENT",) * 3
    assert f"{sweep.LENGTHS[-1]} tokens, layer 2" in verdict.detail
    assert not verdict.is_right
    assert "SILENT" in page_of([verdict])

    def fail(*_: Any) -> Any:
        raise KeyError("layer 3")

    monkeypatch.setattr(Ways, "run", fail)
    verdict = judge_type("llama")
    assert (verdict.alone, verdict.packed) == ("RAW", "RAW")
    assert "KeyError: 'layer 3'" in verdict.detail


def test_a_case_whose_process_ends_or_hangs_is_raw() -> None:
    class Child:
        def kill(self) -> None: ...

        def join(self) -> None: ...

    class Gone:
        def poll(self, seconds: float) -> bool:
            return True

        def recv(self) -> Any:
            raise EOFError

    class Silent(Gone):
        def poll(self, seconds: float) -> bool:
            return False

    for pipe, said in ((Gone(), "without a verdict"), (Silent(), "no end within")):
        verdict = sweep._collect("llama", Child(), pipe)
        assert not verdict.is_right
        assert said in verdict.detail


def test_a_page_gives_its_rows_back() -> None:
    refused = Verdict("b", "B", "refused", "refused", "refused", reason="one | two\nthree")
    rows = rows_of(page_of([refused, Verdict("a", "A", "equal", "equal", "equal")]))
    assert rows == {
        "a": ["A", "equal", "equal", "equal", ""],
        "b": ["B", "refused", "refused", "refused", "one / two three"],
    }


def test_draws_and_texts_follow_from_their_seeds() -> None:
    assert draw(7).told == draw(7).told != draw(8).told
    texts = make_texts([2, 40])
    assert texts == make_texts([2, 40])
    for text in texts:
        assert text.spans[0][0] == 1
        assert text.spans[-1][1] == len(text.token_ids)
