"""What a tokenizer's files say of BOS, how far it may make a text grow, and whose it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from taprobe_core.checkpoints import CheckpointFiles, bos_token, load_tokenizer
from taprobe_core.checkpoints.tokenizer_files import check_growth
from taprobe_core.errors import ModelError, ModelMismatchError
from taprobe_core.study import Model, PretrainedCheckpoint, StandInCheckpoint

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False}
WORDS = ("<s>", "</s>", "one", "two", "three", "four")


def write_tokenizer(folder: Path, config: dict[str, Any] | None, **content: Any) -> Path:
    """Write a tokenizer of words between blanks."""
    folder.mkdir(parents=True, exist_ok=True)
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    (folder / "tokenizer.json").write_text(
        json.dumps(
            {
                "version": "1.0",
                "truncation": None,
                "padding": None,
                "added_tokens": [
                    {"id": at, "content": word, "special": True} | special
                    for at, word in enumerate(WORDS[:2])
                ],
                "normalizer": None,
                "pre_tokenizer": {"type": "WhitespaceSplit"},
                "post_processor": None,
                "decoder": None,
                "model": {
                    "type": "WordLevel",
                    "vocab": {word: at for at, word in enumerate(WORDS)},
                    "unk_token": "one",
                },
            }
            | content
        )
    )
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def stand_in(folder: Path) -> Model:
    checkpoint = StandInCheckpoint(kind="stand_in", architecture="qwen2", n_layers=2)
    return Model(rollouts_dir="m", checkpoint=checkpoint, n_layers=2, tokenizer=str(folder))


def pretrained(folder: Path, tokenizer: Path | None, **config: Any) -> Model:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2"} | config))
    return Model(
        rollouts_dir="m",
        checkpoint=PretrainedCheckpoint(kind="pretrained", path=str(folder)),
        n_layers=2,
        tokenizer=None if tokenizer is None else str(tokenizer),
    )


def template(*tokens: str) -> dict[str, Any]:
    pieces = [{"SpecialToken": {"id": token, "type_id": 0}} for token in tokens]
    return {
        "type": "TemplateProcessing",
        "single": [*pieces, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {
            token: {"id": token, "ids": [WORDS.index(token)], "tokens": [token]} for token in tokens
        },
    }


class TestBos:
    @pytest.mark.parametrize(
        ("config", "more", "bos"),
        [
            ({"bos_token": None}, {}, None),  # as Qwen3 says it
            ({"eos_token": "</s>", "add_bos_token": False}, {}, None),
            ({"bos_token": "<s>"}, {}, "<s>"),
            ({"bos_token": {"content": "<s>", "special": True}}, {}, "<s>"),
            ({"bos_token": None}, {"post_processor": template("<s>")}, "<s>"),
            (None, {"post_processor": template("<s>")}, "<s>"),
            (
                {},
                {"post_processor": {"type": "Sequence", "processors": [template("<s>")]}},
                "<s>",
            ),
            ({}, {"post_processor": BYTE_LEVEL}, None),
            ({}, {"post_processor": template()}, None),
        ],
    )
    def test_the_files_say_whether_there_is_one(
        self, tmp_path: Path, config: dict[str, Any] | None, more: dict[str, Any], bos: str | None
    ) -> None:
        model = stand_in(write_tokenizer(tmp_path, config, **more))
        loaded, _ = load_tokenizer(model)

        assert bos_token(model) == loaded.bos_token == bos
        assert loaded.bos_token_id == (None if bos is None else 0)

    def test_a_lone_vocabulary_does_not_say(self, tmp_path: Path) -> None:
        with pytest.raises(ModelMismatchError, match="no file that says whether texts begin"):
            load_tokenizer(stand_in(write_tokenizer(tmp_path, None)))

    def test_two_tokens_before_a_text_are_no_bos(self, tmp_path: Path) -> None:
        write_tokenizer(tmp_path, {}, post_processor=template("<s>", "</s>"))

        with pytest.raises(ModelMismatchError, match=r"puts 2 tokens before a text \(<s>, </s>\)"):
            load_tokenizer(stand_in(tmp_path))


def replace(content: str, **pattern: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


class TestGrowth:
    @pytest.mark.parametrize(
        "normalizer",
        [
            replace("b" * 1_000_000, String="a"),
            replace("b" * 1_000_000, Regex="a"),
            {"type": "Sequence", "normalizers": [replace("aa", String="a")] * 30},
            {
                "type": "Sequence",
                "normalizers": [
                    {"type": "Sequence", "normalizers": [replace("xyz", Regex="x*")] * 4},
                    {"type": "NFC"},
                ],
            },
            {"type": "Prepend", "prepend": "x" * 100_000},
        ],
    )
    def test_a_normaliser_that_makes_texts_explode_is_refused(
        self, tmp_path: Path, normalizer: dict[str, Any]
    ) -> None:
        write_tokenizer(tmp_path, {"bos_token": None}, normalizer=normalizer)

        with pytest.raises(ModelError, match=r"may make .* characters of one") as caught:
            load_tokenizer(stand_in(tmp_path))
        assert caught.value.where == f"{tmp_path / 'tokenizer.json'}, normalizer"

    @pytest.mark.parametrize(
        "part",
        [
            {"model": {"type": "BPE", "vocab": {}, "continuing_subword_prefix": "x" * 1_000}},
            {
                "model": {"vocab": {}},
                "pre_tokenizer": {"type": "Metaspace", "replacement": "▁" * 99},
            },
        ],
    )
    def test_so_is_what_is_put_to_every_piece(self, part: dict[str, Any]) -> None:
        with pytest.raises(ModelError, match="to each piece of a text"):
            check_growth(part, Path("tokenizer.json"))

    @pytest.mark.parametrize(
        "normalizer",
        [
            {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}]},
            {
                "type": "Sequence",
                "normalizers": [replace("▁", String=" "), replace(" ", Regex=" {2,}")] * 2,
            },
            {"type": "Sequence", "normalizers": [{"type": "NFKC"}, replace('"', String="``")]},
        ],
    )
    def test_what_tokenizers_do_passes(self, normalizer: dict[str, Any]) -> None:
        check_growth({"model": {"vocab": {}}, "normalizer": normalizer}, Path("tokenizer.json"))


class TestMatch:
    def test_its_own_passes(self, tmp_path: Path) -> None:
        write_tokenizer(tmp_path / "m", {"bos_token": "<s>"})
        model = pretrained(tmp_path / "m", None, vocab_size=64, eos_token_id=[1, 5])

        assert load_tokenizer(model)[0].bos_token_id == 0

    @pytest.mark.parametrize(
        ("config", "found", "field"),
        [
            ({"vocab_size": 5}, "token id 5", "vocab_size"),
            ({"vocab_size": 151_936}, "has no token for 151930", "vocab_size"),
            ({"vocab_size": 64, "eos_token_id": 40}, "eos_token_id 40", "eos_token_id"),
            (
                {"text_config": {"vocab_size": 64, "bos_token_id": 9}},
                "bos_token_id 9, where the ids",
                "bos_token_id",
            ),
        ],
    )
    def test_ids_that_the_checkpoint_contradicts_are_refused(
        self, tmp_path: Path, config: dict[str, Any], found: str, field: str
    ) -> None:
        other = write_tokenizer(tmp_path / "other", {"bos_token": "<s>"})
        model = pretrained(tmp_path / "m", other, **config)

        with pytest.raises(ModelMismatchError) as caught:
            load_tokenizer(model)
        assert found in caught.value.what
        assert caught.value.where == f"{tmp_path / 'm' / 'config.json'}, {field}"

    @pytest.mark.parametrize(
        "config",
        [
            {"vocab_size": 64, "bos_token_id": None, "eos_token_id": 50_256},
            {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2},
            {"vocab_size": 64, "eos_token_id": [3, 60]},
        ],
    )
    def test_leftovers_of_a_class_are_no_contradiction(
        self, tmp_path: Path, config: dict[str, Any]
    ) -> None:
        write_tokenizer(tmp_path / "m", {"bos_token": "<s>"})

        load_tokenizer(pretrained(tmp_path / "m", None, **config))

    def test_the_vocabulary_beside_the_weights_is_compared(self, tmp_path: Path) -> None:
        write_tokenizer(tmp_path / "m", {"bos_token": "<s>"})
        swapped = dict(zip(WORDS, (0, 1, 3, 2, 4, 5), strict=True))
        words = {"type": "WordLevel", "vocab": swapped, "unk_token": "one"}
        other = write_tokenizer(tmp_path / "other", {"bos_token": "<s>"}, model=words)
        again = write_tokenizer(tmp_path / "again", {}, decoder={"type": "Fuse"})

        with pytest.raises(ModelMismatchError, match=r"id 3 is 'one', there 'two' \(sha256 "):
            load_tokenizer(pretrained(tmp_path / "m", other, vocab_size=64))
        load_tokenizer(pretrained(tmp_path / "m", again, vocab_size=64))

    @pytest.mark.real_data
    @pytest.mark.parametrize(
        ("name", "rows", "eos"),
        [
            ("deepseek-r1-distill-llama-8b", 128_256, 128_001),
            ("deepseek-r1-distill-qwen-14b", 152_064, 151_643),
        ],
    )
    def test_real_ones_are_those_of_their_checkpoints(
        self, real_tokenizers: Path, tmp_path: Path, name: str, rows: int, eos: int
    ) -> None:
        config = {"vocab_size": rows, "bos_token_id": eos, "eos_token_id": eos}
        model = pretrained(tmp_path / "m", real_tokenizers / name, **config)
        other = {"vocab_size": 152_064, "eos_token_id": 151_643}

        load_tokenizer(model, CheckpointFiles(tmp_path / "m", {}))
        if rows < 152_064:
            with pytest.raises(ModelMismatchError, match="no token for"):
                load_tokenizer(pretrained(tmp_path / "q", real_tokenizers / name, **other))
