"""The demo's tokenizer: equal bytes, no token of its own, merges that span code must survive."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from taprobe_core.demo import choose_problems
from taprobe_core.demo.policy import drawn_trace
from taprobe_core.demo.task import seeded
from taprobe_core.demo.tokenizer import BOS, EOS, PAD, VOCAB_SIZE, token_id, train_tokenizer

SEED = 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(target, SEED)
    return target


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def texts() -> list[str]:
    rng = seeded("texts")
    drawn = [(some, drawn_trace(some, rng)) for some in choose_problems(4, 0) * 5]
    return [some.prompt + trace.thinking + trace.ending for some, trace in drawn]


def test_equal_arguments_give_equal_bytes_in_another_process(folder: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from taprobe_core.demo.tokenizer import train_tokenizer\n"
        f"train_tokenizer(Path(sys.argv[1]), {SEED})\n"
    )
    changed = {"PYTHONHASHSEED": "4711", "RAYON_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "again")], check=True, env=os.environ | changed
    )
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["tokenizer.json", "tokenizer_config.json"]
    for name in names:
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()


def test_loads_as_a_fast_tokenizer_that_adds_nothing(folder: Path) -> None:
    loaded = AutoTokenizer.from_pretrained(folder)
    assert loaded.is_fast
    assert (loaded.bos_token, loaded.eos_token, loaded.pad_token) == (BOS, EOS, PAD)
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id) == (0, 1, 2)
    assert len(loaded) == VOCAB_SIZE
    for special in (True, False):
        ids = loaded("So x is 7.", add_special_tokens=special)["input_ids"]
        assert not set(ids) & {0, 1, 2}
        assert loaded.decode(ids) == "So x is 7."
    assert json.loads((folder / "tokenizer.json").read_text("utf-8"))["post_processor"] is None


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_any_text_survives(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_marks_merge_with_the_blank_line_behind_them(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode("That looks right.\n\nSo the answer is 7.\n</think>\n\n").tokens
    assert ".ĊĊ" in tokens
    assert ".Ċ" in tokens


def test_numbers_take_one_token_or_several(tokenizer: Tokenizer) -> None:
    n_tokens = [
        sum(a < number.end() and b > number.start() for a, b in tokenizer.encode(text).offsets)
        for text in texts()
        for number in re.finditer(r"\d\d+", text)
    ]
    several = sum(n > 1 for n in n_tokens) / len(n_tokens)
    assert 0.2 < several < 0.9


def test_special_tokens_have_their_ids_and_others_are_refused(tokenizer: Tokenizer) -> None:
    assert [token_id(tokenizer, token) for token in (BOS, EOS, PAD)] == [0, 1, 2]
    with pytest.raises(KeyError, match="im_start"):
        token_id(tokenizer, "<|im_start|>")


def test_the_seed_decides_the_training_traces(folder: Path, tmp_path: Path) -> None:
    train_tokenizer(tmp_path, SEED + 1)
    other = (tmp_path / "tokenizer.json").read_bytes()
    assert other != (folder / "tokenizer.json").read_bytes()


def test_the_vocabulary_has_the_size_asked_for(tmp_path: Path) -> None:
    train_tokenizer(tmp_path, SEED, vocab_size=300)
    assert Tokenizer.from_file(str(tmp_path / "tokenizer.json")).get_vocab_size() == 300
