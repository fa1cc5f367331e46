"""Stand-ins, tokenizers, resolving and loading: whole, safe, repeatable."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from taprobe_core.activations.gemm_rate import BlockShape, is_known
from taprobe_core.checkpoints import (
    CheckpointFiles,
    checkpoint_identity,
    load_base_model,
    load_tokenizer,
    pick_devices,
    resolve_checkpoint,
    tokenizer_sha256,
)
from taprobe_core.checkpoints.loading import weight_bytes
from taprobe_core.checkpoints.resolve import checkpoint_config, context_length
from taprobe_core.demo import BUNDLE
from taprobe_core.errors import (
    ConfigError,
    DiskFullError,
    ModelError,
    ModelMismatchError,
    ModelMissingError,
    UnsafeModelError,
)
from taprobe_core.study import DemoCheckpoint, Model, PretrainedCheckpoint, StandInCheckpoint

WORDS = ("<bos>", "<eos>", "a", "b", "c")
CPU = torch.device("cpu")


def write_tokenizer(folder: Path, **config: Any) -> Path:
    """Write a fast tokenizer of five words that a blank separates."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "version": "1.0",
        "truncation": {
            "direction": "Right",
            "max_length": 2,
            "strategy": "LongestFirst",
            "stride": 0,
        },
        "padding": None,
        "added_tokens": [
            {"id": index, "content": word, "single_word": False, "lstrip": False, "rstrip": False}
            | {"normalized": False, "special": True}
            for index, word in enumerate(WORDS[:2])
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {
            "type": "WordLevel",
            "vocab": {word: index for index, word in enumerate(WORDS)},
            "unk_token": "a",
        },
    }
    (folder / "tokenizer.json").write_text(json.dumps(content))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<bos>"} | config))
    return folder


def test_an_architecture_without_sdpa_is_refused_with_advice_that_works(tmp_path: Path) -> None:
    from transformers import AutoModel, BloomConfig

    torch.manual_seed(0)
    config = BloomConfig(vocab_size=32, hidden_size=16, n_layer=2, n_head=2)
    AutoModel.from_config(config).save_pretrained(tmp_path)
    model = pretrained_model(tmp_path)
    files = CheckpointFiles(tmp_path, {})
    with pytest.raises(ModelError, match="scaled_dot_product_attention") as refused:
        load_base_model(files, model, [CPU])
    assert "attn_implementation: eager" in str(refused.value.fix)
    loaded = load_base_model(
        files, model.model_copy(update={"attn_implementation": "eager"}), [CPU]
    )
    assert loaded.module.config._attn_implementation == "eager"
    assert loaded.n_layers == 2


def stand_in_model(tokenizer: Path | None, **spec: Any) -> Model:
    spec = {"architecture": "qwen2", "n_layers": 2, "d_model": 16} | spec
    return Model(
        rollouts_dir="tiny",
        checkpoint=StandInCheckpoint(kind="stand_in", **spec),
        n_layers=spec["n_layers"],
        tokenizer=None if tokenizer is None else str(tokenizer),
    )


def pretrained_model(path: Path | str, tokenizer: Path | None = None, **fields: Any) -> Model:
    return Model(
        rollouts_dir="tiny",
        checkpoint=PretrainedCheckpoint(kind="pretrained", path=str(path)),
        tokenizer=None if tokenizer is None else str(tokenizer),
        **({"n_layers": 2} | fields),
    )


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, tokenizer: Path) -> CheckpointFiles:
    return resolve_checkpoint(stand_in_model(tokenizer), tmp_path_factory.mktemp("built"))


@pytest.fixture
def folder(tmp_path: Path, built: CheckpointFiles) -> Path:
    """A pretrained folder of two layers, free to change."""
    folder = tmp_path / "pretrained"
    folder.mkdir()
    for file in built.folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def edit_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


class TestStandIn:
    @pytest.mark.parametrize("architecture", ["qwen2", "llama"])
    def test_same_spec_same_weights_other_seed_others(
        self, tmp_path: Path, tokenizer: Path, architecture: str
    ) -> None:
        model = stand_in_model(tokenizer, architecture=architecture, seed=7)
        first = resolve_checkpoint(model, tmp_path / "1")
        second = resolve_checkpoint(model, tmp_path / "2")
        other = resolve_checkpoint(
            stand_in_model(tokenizer, architecture=architecture, seed=8), tmp_path / "1"
        )
        bytes_of = [(files.folder / "model.safetensors").read_bytes() for files in (first, second)]

        assert first.identity == second.identity != other.identity
        assert bytes_of[0] == bytes_of[1] != (other.folder / "model.safetensors").read_bytes()
        assert (first.identity["embedding_rows"], first.identity["seed"]) == ("64", "7")

    def test_the_random_state_stays(self, tmp_path: Path, tokenizer: Path) -> None:
        torch.manual_seed(5)
        expected = torch.rand(3)
        torch.manual_seed(5)
        resolve_checkpoint(stand_in_model(tokenizer), tmp_path)

        assert torch.equal(torch.rand(3), expected)

    def test_a_built_folder_is_used_again(self, tokenizer: Path, built: CheckpointFiles) -> None:
        root = built.folder.parent
        before = (built.folder / "model.safetensors").stat()

        assert resolve_checkpoint(stand_in_model(tokenizer), root) == built
        assert (built.folder / "model.safetensors").stat() == before

    def test_builders_at_the_same_time_leave_one_folder(
        self, tmp_path: Path, tokenizer: Path, built: CheckpointFiles
    ) -> None:
        model = stand_in_model(tokenizer)
        with ThreadPoolExecutor(4) as pool:
            folders = list(pool.map(lambda _: resolve_checkpoint(model, tmp_path).folder, range(4)))

        assert len(set(folders)) == 1
        assert list(tmp_path.iterdir()) == folders[:1]
        for name in ("config.json", "model.safetensors"):
            assert (folders[0] / name).read_bytes() == (built.folder / name).read_bytes()

    def test_nothing_but_the_checkpoint_is_left(self, built: CheckpointFiles) -> None:
        assert [path.name for path in built.folder.parent.iterdir()] == [built.folder.name]
        modes = {file.stat().st_mode & 0o777 for file in built.folder.iterdir()}
        assert len(modes) == 1

    @pytest.mark.parametrize(
        ("number", "error", "found"),
        [
            (errno.ENOSPC, DiskFullError, "no space left"),
            (errno.EROFS, ModelError, "cannot be written"),
        ],
    )
    def test_a_full_or_read_only_disk_leaves_nothing(
        self,
        tmp_path: Path,
        tokenizer: Path,
        monkeypatch: pytest.MonkeyPatch,
        number: int,
        error: type[Exception],
        found: str,
    ) -> None:
        def refuse(source: Path, target: Path) -> Path:
            raise OSError(number, "said by the disk", str(target))

        monkeypatch.setattr(Path, "rename", refuse)
        root = tmp_path / "root"
        with pytest.raises(error, match=rf"{found}[\s\S]*{root}[\s\S]*Fix: "):
            resolve_checkpoint(stand_in_model(tokenizer), root)
        assert list(root.iterdir()) == []

    def test_a_lack_of_memory_names_the_size_and_leaves_nothing(
        self, tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(*args: object, **options: object) -> None:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to")

        monkeypatch.setattr("transformers.AutoModel.from_config", refuse)
        with pytest.raises(
            ModelError, match=r"no memory .* d_model 16, 2 layers[\s\S]*smaller d_m"
        ):
            resolve_checkpoint(stand_in_model(tokenizer), tmp_path)
        assert list(tmp_path.iterdir()) == []

    def test_a_damaged_one_says_to_remove_it(self, tmp_path: Path, tokenizer: Path) -> None:
        files = resolve_checkpoint(stand_in_model(tokenizer), tmp_path)
        (files.folder / "model.safetensors").write_bytes(b"")

        with pytest.raises(ModelError, match=rf"Fix: remove {files.folder}; it is built again"):
            resolve_checkpoint(stand_in_model(tokenizer), tmp_path)

    def test_it_needs_a_tokenizer(self) -> None:
        for ask in (checkpoint_identity, tokenizer_sha256):
            with pytest.raises(ConfigError, match=r"without a tokenizer in model tiny, tok.*\nFix"):
                ask(stand_in_model(None))

    def test_real_vocabularies_round_up_to_64(self, real_tokenizers: Path) -> None:
        rows = {
            name: checkpoint_identity(stand_in_model(real_tokenizers / name))
            for name in ("deepseek-r1-distill-llama-8b", "deepseek-r1-distill-qwen-14b")
        }

        assert [identity["embedding_rows"] for identity in rows.values()] == ["128256", "151680"]


class TestTokenizer:
    def test_it_is_fast_whole_and_adds_nothing(
        self, tokenizer: Path, built: CheckpointFiles
    ) -> None:
        loaded, sha256 = load_tokenizer(stand_in_model(tokenizer), built)
        encoded = loaded("a b c a", return_offsets_mapping=True)

        assert loaded.is_fast
        assert encoded.input_ids == [2, 3, 4, 2]
        assert encoded.offset_mapping == [(0, 1), (2, 3), (4, 5), (6, 7)]
        assert loaded.bos_token_id == 0
        assert sha256 == tokenizer_sha256(stand_in_model(tokenizer))

    def test_special_tokens_come_from_either_file_and_never_grow_the_vocabulary(
        self, tmp_path: Path
    ) -> None:
        folder = write_tokenizer(tmp_path, **{"bos_token": None, "pad_token": "<new>"})
        (folder / "special_tokens_map.json").write_text(
            json.dumps({"bos_token": {"content": "<bos>"}, "eos_token": "<eos>"})
        )
        loaded, _ = load_tokenizer(stand_in_model(folder))

        assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id) == (0, 1, None)
        assert len(loaded) == len(WORDS)

    def test_the_checkpoints_own_is_the_default(self, folder: Path) -> None:
        write_tokenizer(folder)

        assert load_tokenizer(pretrained_model(folder))[0].bos_token_id == 0

    @pytest.mark.parametrize("bos", ["<other>", 3])
    def test_a_bos_outside_the_vocabulary_is_refused(self, tmp_path: Path, bos: object) -> None:
        write_tokenizer(tmp_path, bos_token=bos)

        with pytest.raises(ModelMismatchError, match=rf"no BOS.*{tmp_path}\nFix: name one of its"):
            load_tokenizer(stand_in_model(tmp_path))

    def test_a_slow_one_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "tokenizer.model").write_bytes(b"")

        with pytest.raises(ModelMismatchError, match=r"slow tokenizer \(tokenizer\.model\)"):
            load_tokenizer(stand_in_model(tmp_path))

    def test_an_absent_one_is_missing(self, tmp_path: Path) -> None:
        with pytest.raises(ModelMissingError, match=rf"no tokenizer\.json in {tmp_path}\nFix: "):
            load_tokenizer(stand_in_model(tmp_path))

    def test_one_that_names_code_is_refused(self, tmp_path: Path) -> None:
        write_tokenizer(tmp_path, auto_map={"AutoTokenizer": ["m.T", None]})

        with pytest.raises(UnsafeModelError, match=r"tokenizer_config\.json, auto_map"):
            load_tokenizer(stand_in_model(tmp_path))

    @pytest.mark.parametrize(
        "content",
        [
            b"version https://git-lfs.github.com/spec/v1\n",
            b"not json",
            b"{}",
            b'{"model": {"vocab": {}}}',
            b'{"model": {"vocab": {"<bos>": "x"}}}',
            b'{"model": {"vocab": {"<bos>": 0}, "type": "Unheard"}}',
        ],
    )
    def test_a_broken_one_is_a_model_error(self, tmp_path: Path, content: bytes) -> None:
        write_tokenizer(tmp_path)
        (tmp_path / "tokenizer.json").write_bytes(content)

        with pytest.raises(ModelError, match=r"tokenizer\.json\nFix: "):
            load_tokenizer(stand_in_model(tmp_path))

    def test_unigram_vocabularies_are_counted(self, tmp_path: Path) -> None:
        write_tokenizer(tmp_path)
        pieces = [["<unk>", 0.0], ["<bos>", 0.0], *[[f"p{i}", -1.0] for i in range(98)]]
        edit_json(
            tmp_path / "tokenizer.json",
            model={"type": "Unigram", "unk_id": 0, "vocab": pieces},
            added_tokens=[],
        )

        assert checkpoint_identity(stand_in_model(tmp_path))["embedding_rows"] == "128"

    @pytest.mark.parametrize("is_at_hand", [True, False])
    def test_more_ids_than_embedding_rows_is_a_mismatch(
        self, folder: Path, tokenizer: Path, is_at_hand: bool
    ) -> None:
        edit_json(folder / "config.json", vocab_size=4)
        files = CheckpointFiles(folder, {}) if is_at_hand else None

        with pytest.raises(ModelMismatchError) as caught:
            load_tokenizer(pretrained_model(folder, tokenizer), files)
        assert "token id 4" in caught.value.what
        assert "4 rows" in caught.value.what
        assert caught.value.where == f"{folder}/config.json, vocab_size"

    @pytest.mark.real_data
    @pytest.mark.parametrize(
        ("name", "bos"),
        [("deepseek-r1-distill-llama-8b", 128_000), ("deepseek-r1-distill-qwen-14b", 151_646)],
    )
    def test_real_ones_load_and_add_no_bos(
        self, real_tokenizers: Path, name: str, bos: int
    ) -> None:
        loaded, _ = load_tokenizer(stand_in_model(real_tokenizers / name))
        text = f"{loaded.bos_token}Wait, 12 + 3\n\nis 15."

        assert loaded.bos_token_id == bos
        assert loaded(text, add_special_tokens=False).input_ids.count(bos) == 1
        assert loaded("Wait", add_special_tokens=True).input_ids.count(bos) == 0


class TestResolve:
    def test_a_folder_is_found_and_identified_by_content(
        self, folder: Path, tmp_path: Path
    ) -> None:
        files = resolve_checkpoint(pretrained_model(folder), tmp_path)
        identity = checkpoint_identity(pretrained_model(folder))

        assert files == CheckpointFiles(folder, identity)
        assert identity["kind"] == "folder"
        edit_json(folder / "config.json", rms_norm_eps=1e-5)
        assert checkpoint_identity(pretrained_model(folder)) != identity

    @pytest.mark.parametrize(
        ("asked", "field", "found", "fix"),
        [
            (
                {"n_layers": 3},
                "num_hidden_layers",
                "2, where the study says n_layers: 3",
                "set n_l",
            ),
            ({"d_model": 32}, "hidden_size", "16, where the study says d_model: 32", "set d_mod"),
        ],
    )
    def test_another_shape_is_a_mismatch(
        self,
        folder: Path,
        tmp_path: Path,
        asked: dict[str, int],
        field: str,
        found: str,
        fix: str,
    ) -> None:
        with pytest.raises(ModelMismatchError) as caught:
            resolve_checkpoint(pretrained_model(folder, **asked), tmp_path)
        assert caught.value.what == f"{field}: {found}"
        assert caught.value.where == f"{folder}/config.json, {field}"
        assert str(caught.value.fix).startswith(fix)

    def test_an_unstated_depth_is_a_mismatch(self, folder: Path, tmp_path: Path) -> None:
        edit_json(folder / "config.json", num_hidden_layers=None)

        with pytest.raises(ModelMismatchError, match="does not state its num_hidden"):
            resolve_checkpoint(pretrained_model(folder), tmp_path)

    def test_a_stated_width_that_fits_passes(self, folder: Path, tmp_path: Path) -> None:
        files = resolve_checkpoint(pretrained_model(folder, d_model=16), tmp_path)

        assert files.folder == folder

    @pytest.mark.parametrize("changes", [{"rope_parameters": [1]}, {"layer_types": 3}])
    def test_a_configuration_that_the_library_chokes_on(
        self, folder: Path, changes: dict[str, Any]
    ) -> None:
        edit_json(folder / "config.json", **changes)

        with pytest.raises(ModelError, match=r"that transformers cannot read[\s\S]*Fix: "):
            checkpoint_config(pretrained_model(folder))

    def test_no_such_folder(self, tmp_path: Path) -> None:
        with pytest.raises(ModelMissingError, match=r"no such folder: .*/gone in model tiny, che"):
            resolve_checkpoint(pretrained_model(tmp_path / "gone"), tmp_path)

    def test_a_folder_has_no_revision(self, folder: Path, tmp_path: Path) -> None:
        checkpoint = PretrainedCheckpoint(kind="pretrained", path=str(folder), revision="0" * 40)
        model = pretrained_model(folder).model_copy(update={"checkpoint": checkpoint})

        with pytest.raises(ConfigError, match=r"a revision for the local folder[\s\S]*to null"):
            resolve_checkpoint(model, tmp_path)

    def test_code_beside_the_weights_never_runs(self, folder: Path, tmp_path: Path) -> None:
        canary = tmp_path / "canary"
        (folder / "code.py").write_text(f"open({str(canary)!r}, 'w')")
        edit_json(folder / "config.json", auto_map={"AutoModel": "code.Model"})

        with pytest.raises(UnsafeModelError):
            resolve_checkpoint(pretrained_model(folder), tmp_path)
        assert not canary.exists()


class TestLoading:
    def test_the_base_model_is_what_the_files_say(
        self, built: CheckpointFiles, tokenizer: Path
    ) -> None:
        model = stand_in_model(tokenizer).model_copy(update={"dtype": "float32"})
        loaded = load_base_model(built, model, [CPU])
        stored = load_file(built.folder / "model.safetensors")
        state = loaded.module.state_dict()

        assert (loaded.d_model, loaded.n_layers, loaded.n_positions) == (16, 2, 131_072)
        assert stored.keys() == state.keys()
        assert all(torch.equal(stored[name], state[name]) for name in stored)
        assert not loaded.module.training
        assert not any(parameter.requires_grad for parameter in loaded.module.parameters())

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
    def test_a_model_computes_in_the_dtype_of_the_study(
        self, built: CheckpointFiles, tokenizer: Path, dtype: str
    ) -> None:
        model = stand_in_model(tokenizer).model_copy(update={"dtype": dtype})
        loaded = load_base_model(built, model, [CPU])

        assert loaded.dtype == getattr(torch, dtype)
        assert {parameter.dtype for parameter in loaded.module.parameters()} == {loaded.dtype}

    def test_every_device_gets_a_copy_with_weights_of_its_own(
        self, built: CheckpointFiles, tokenizer: Path
    ) -> None:
        loaded = load_base_model(built, stand_in_model(tokenizer), [CPU, CPU])
        one, two = loaded.modules
        tokens = torch.tensor([[1, 2, 3]])

        assert loaded.devices == (CPU, CPU)
        assert torch.equal(one(tokens).last_hidden_state, two(tokens).last_hidden_state)
        ones = {parameter.data_ptr() for parameter in one.parameters()}
        assert ones.isdisjoint(parameter.data_ptr() for parameter in two.parameters())

    def test_weights_are_counted_from_the_headers(self, built: CheckpointFiles) -> None:
        stored = load_file(built.folder / "model.safetensors")
        n_values = sum(tensor.numel() for tensor in stored.values())

        assert weight_bytes(built, torch.bfloat16) == 2 * n_values

    def test_a_head_is_left_out(self, folder: Path) -> None:
        file = folder / "model.safetensors"
        weights = {f"model.{name}": value for name, value in load_file(file).items()}
        save_file(weights | {"lm_head.weight": torch.zeros(64, 16)}, file, {"format": "pt"})
        edit_json(folder / "config.json", architectures=["Qwen2ForCausalLM"])
        loaded = load_base_model(CheckpointFiles(folder, {}), pretrained_model(folder), [CPU])

        assert not any("lm_head" in name for name, _ in loaded.module.named_parameters())
        assert torch.equal(loaded.module.state_dict()["norm.weight"], weights["model.norm.weight"])

    def test_a_missing_weight_is_no_random_one(self, folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        del weights["layers.1.mlp.up_proj.weight"]
        save_file(weights, folder / "model.safetensors", {"format": "pt"})

        with pytest.raises(ModelMismatchError, match=r"1 weights.*layers\.1\.mlp\.up_proj"):
            load_base_model(CheckpointFiles(folder, {}), pretrained_model(folder), [CPU])

    @pytest.mark.parametrize(
        "changes", [{"model_type": "unheard_of"}, {"model_type": None}, {"hidden_size": 32}]
    )
    def test_what_transformers_cannot_load(self, folder: Path, changes: dict[str, Any]) -> None:
        edit_json(folder / "config.json", **changes)

        with pytest.raises(ModelError, match=rf"cannot load[\s\S]*{folder}\nFix: "):
            load_base_model(CheckpointFiles(folder, {}), pretrained_model(folder), [CPU])

    def test_loading_is_quiet(
        self, built: CheckpointFiles, tokenizer: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        load_base_model(built, stand_in_model(tokenizer), [CPU])

        assert capfd.readouterr() == ("", "")


class TestDevice:
    def test_auto_takes_what_is_there(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert pick_devices("auto") == pick_devices("cpu") == (CPU,)

        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        assert pick_devices("auto") == (torch.device("cuda:0"), torch.device("cuda:1"))

    def test_an_absent_device_is_a_config_error(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

        with pytest.raises(ConfigError, match=r"'cuda'.*in activations\.device\nFix: set it to"):
            pick_devices("cuda")


@pytest.mark.parametrize("architecture", ["qwen2", "llama"])
def test_a_configuration_of_ours_says_what_transformers_reads(
    tmp_path: Path, tokenizer: Path, architecture: str
) -> None:
    stand_in = stand_in_model(tokenizer, architecture=architecture)
    built = resolve_checkpoint(stand_in, tmp_path).folder
    demo = DemoCheckpoint(kind="demo", name=f"tiny-{architecture}")
    for ours in (stand_in, stand_in.model_copy(update={"checkpoint": demo})):
        folder = built if ours is stand_in else BUNDLE / demo.name
        stated, read = checkpoint_config(ours), checkpoint_config(pretrained_model(folder))
        assert BlockShape.of(stated) == BlockShape.of(read)
        assert is_known(stated)
        assert context_length(ours) == read.max_position_embeddings


def test_naming_a_checkpoint_does_not_import_torch(tokenizer: Path) -> None:
    script = (
        "import sys\n"
        "from taprobe_core.checkpoints import checkpoint_identity\n"
        "from taprobe_core.study import Model, StandInCheckpoint\n"
        "spec = StandInCheckpoint(kind='stand_in', architecture='llama', n_layers=2)\n"
        f"tokenizer = {str(tokenizer)!r}\n"
        "model = Model(rollouts_dir='a', checkpoint=spec, n_layers=2, tokenizer=tokenizer)\n"
        "print(checkpoint_identity(model)['embedding_rows'])\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
    )
    printed = subprocess.run(
        [sys.executable, "-W", "error", "-c", script], capture_output=True, check=True, text=True
    )

    assert printed.stdout == "64\n"
