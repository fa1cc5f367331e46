"""Checkpoints from a hub: a small hub on this machine, the client's own code, its own cache."""

from __future__ import annotations

import errno
import hashlib
import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import constants
from huggingface_hub._tree_cache import TreeCacheEntry, write_tree_cache
from safetensors.numpy import save

from taprobe_core.checkpoints import (
    checkpoint_identity,
    load_tokenizer,
    origin,
    resolve_checkpoint,
    tokenizer_sha256,
)
from taprobe_core.checkpoints.folder import files_to_load
from taprobe_core.errors import (
    ConfigError,
    DiskFullError,
    ModelError,
    ModelMissingError,
    UnsafeModelError,
)
from taprobe_core.study import Model, PretrainedCheckpoint

REPO, SHA = "owner/model", "c0ffee" + "0" * 34
TOKENIZER = {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": [],
    "normalizer": None,
    "pre_tokenizer": {"type": "WhitespaceSplit"},
    "post_processor": None,
    "decoder": None,
    "model": {"type": "WordLevel", "vocab": {"<bos>": 0, "a": 1}, "unk_token": "a"},
}


def repository() -> dict[str, bytes]:
    config = {"model_type": "qwen2", "num_hidden_layers": 2, "vocab_size": 64}
    return {
        "README.md": b"card",
        "config.json": json.dumps(config).encode(),
        "model.safetensors": save({"w": np.zeros(4, np.float32)}),
        "pytorch_model.bin": b"poison",
        "modeling_own.py": b"raise SystemExit",
        "tokenizer.json": json.dumps(TOKENIZER).encode(),
        "tokenizer_config.json": b'{"bos_token": "<bos>"}',
    }


class Hub(ThreadingHTTPServer):
    """Serves one model repository the way the client expects it; keeps what was asked for."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = repository()
        self.asked: list[str] = []
        self.is_down = False

    @property
    def downloaded(self) -> set[str]:
        lines = [line for line in self.asked if line.startswith(f"GET /{REPO}/resolve/")]
        return {line.partition(f"/{SHA}/")[2] for line in lines}


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(self.path.partition("?")[0])
        self.server.asked.append(f"{self.command} {path}")
        api, resolve = f"/api/models/{REPO}", f"/{REPO}/resolve/"
        if self.server.is_down:
            self.reply(507)  # a server error that the client does not try again for half a minute
        elif path in (api, f"{api}/revision/main"):
            self.reply(200, data=json.dumps({"id": REPO, "sha": SHA}).encode())
        elif not path.startswith((api, resolve)):
            self.reply(404, {"X-Error-Code": "RepoNotFound"})
        elif SHA not in path:
            self.reply(404, {"X-Error-Code": "RevisionNotFound"})
        elif path.startswith(api):
            listing = [
                {"type": "file", "path": name, "oid": "0" * 40, "size": len(data)}
                for name, data in self.server.files.items()
            ]
            self.reply(200, data=json.dumps(listing).encode())
        else:
            self.file(path.partition(f"/{SHA}/")[2])

    def file(self, name: str) -> None:
        data = self.server.files[name]
        etag = hashlib.sha1(data, usedforsecurity=False).hexdigest()
        self.reply(200, {"X-Repo-Commit": SHA, "ETag": f'"{etag}"'}, data)

    def reply(self, status: int, headers: dict[str, str] | None = None, data: bytes = b"") -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty hub cache of this test; the client reads its variables at import only."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    origin._main_revision.cache_clear()
    yield tmp_path / "hub"
    origin._main_revision.cache_clear()
    huggingface_hub.close_session()


@pytest.fixture
def hub(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub()
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    try:
        yield server
    finally:
        huggingface_hub.close_session()
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def offline(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    huggingface_hub.close_session()
    return cache


def model(path: str = REPO, revision: str | None = None, tokenizer: str | None = None) -> Model:
    checkpoint = PretrainedCheckpoint(kind="pretrained", path=path, revision=revision)
    return Model(rollouts_dir="tiny", checkpoint=checkpoint, n_layers=2, tokenizer=tokenizer)


def fill(cache: Path, *names: str, ref: bool = True) -> Path:
    """Lay out what an earlier download leaves, by hand."""
    folder = cache / "models--owner--model"
    snapshot = folder / "snapshots" / SHA
    snapshot.mkdir(parents=True)
    (folder / "blobs").mkdir()
    for name, data in repository().items():
        if name in names:
            (folder / "blobs" / name).write_bytes(data)
            (snapshot / name).symlink_to(f"../../blobs/{name}")
    if ref:
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text(SHA)
    return snapshot


def know(cache: Path, *names: str) -> None:
    """Write the listing of the repository that an earlier visit leaves."""
    entry = TreeCacheEntry(size=1, blob_id="x", lfs_sha256=None, lfs_size=None, xet_hash=None)
    write_tree_cache(str(cache / "models--owner--model"), SHA, dict.fromkeys(names, entry))


class TestOnline:
    def test_it_fetches_what_a_model_without_code_needs(self, hub: Hub, tmp_path: Path) -> None:
        files = resolve_checkpoint(model(), tmp_path)

        assert files.identity == {"kind": "hub", "repo": REPO, "revision": SHA}
        assert hub.downloaded == {
            "config.json",
            "model.safetensors",
            "tokenizer.json",
            "tokenizer_config.json",
        }
        assert {file.name for file in files.folder.iterdir()} == hub.downloaded

    def test_a_branch_is_resolved_once_and_an_identity_downloads_nothing(self, hub: Hub) -> None:
        for _ in range(3):
            assert checkpoint_identity(model())["revision"] == SHA

        assert len(hub.asked) == 1

    def test_a_pinned_revision_is_named_without_a_request(self, hub: Hub) -> None:
        assert checkpoint_identity(model(revision="a" * 40))["revision"] == "a" * 40
        assert hub.asked == []

    def test_what_is_cached_is_not_asked_for_again(self, hub: Hub, tmp_path: Path) -> None:
        first = resolve_checkpoint(model(revision=SHA), tmp_path)
        hub.asked.clear()

        assert resolve_checkpoint(model(revision=SHA), tmp_path) == first
        assert hub.asked == []

    def test_a_tokenizer_costs_no_weights(self, hub: Hub) -> None:
        loaded, sha256 = load_tokenizer(model())

        assert loaded("a <bos>").input_ids == [1, 0]
        assert sha256 == hashlib.sha256(hub.files["tokenizer.json"]).hexdigest()
        assert "model.safetensors" not in hub.downloaded

    def test_a_tokenizer_of_another_repository_may_be_pinned(self, hub: Hub) -> None:
        asked = model(path="other/gone", tokenizer=f"{REPO}@{SHA}")

        assert tokenizer_sha256(asked) == hashlib.sha256(hub.files["tokenizer.json"]).hexdigest()

    def test_pickles_only_are_refused_without_fetching_them(self, hub: Hub, tmp_path: Path) -> None:
        del hub.files["model.safetensors"]

        with pytest.raises(UnsafeModelError, match=r"pickles only \(pytorch_model\.bin\)"):
            resolve_checkpoint(model(), tmp_path)
        assert "pytorch_model.bin" not in hub.downloaded

    def test_second_copies_of_the_weights_stay_where_they_are(
        self, hub: Hub, tmp_path: Path
    ) -> None:
        shards = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
        whole = hub.files.pop("model.safetensors")
        index = {"weight_map": {"w": shards[0], "v": shards[1]}}
        hub.files |= {
            "model.safetensors.index.json": json.dumps(index).encode(),
            shards[0]: whole,
            shards[1]: save({"v": np.zeros(4, np.float32)}),
            "special_tokens_map.json": b"{}",
        }
        wanted = hub.files.keys() - {"README.md", "pytorch_model.bin", "modeling_own.py"}
        hub.files |= dict.fromkeys(
            (
                "consolidated.safetensors",
                "model-fp8.safetensors",
                "model-00003-of-00009.safetensors",
                "onnx/model.safetensors",
                "original/config.json",
                "original/model-00001-of-00001.safetensors",
                "original/tokenizer.json",
                "model.gguf",
                "generation_config.json",
                "vocab.json",
            ),
            whole,
        )
        files = resolve_checkpoint(model(), tmp_path)

        assert hub.downloaded == wanted
        assert files_to_load(files.folder, "again") == (
            "config.json",
            "model.safetensors.index.json",
            *shards,
        )

    def test_a_single_file_is_preferred_to_an_index(self, hub: Hub, tmp_path: Path) -> None:
        index = {"weight_map": {"w": "model-00001-of-00001.safetensors"}}
        hub.files["model.safetensors.index.json"] = json.dumps(index).encode()
        hub.files["model-00001-of-00001.safetensors"] = hub.files["model.safetensors"]
        files = resolve_checkpoint(model(), tmp_path)

        assert files_to_load(files.folder, "again") == ("config.json", "model.safetensors")
        assert not {name for name in hub.downloaded if "index" in name or "-of-" in name}

    def test_a_configuration_is_judged_before_the_weights_are_fetched(
        self, hub: Hub, tmp_path: Path
    ) -> None:
        hub.files["config.json"] = b'{"num_attention_heads": -4}'

        with pytest.raises(ModelError, match="num_attention_heads: -4"):
            resolve_checkpoint(model(), tmp_path)
        assert "model.safetensors" not in hub.downloaded

    def test_code_is_refused_without_fetching_it(self, hub: Hub, tmp_path: Path) -> None:
        hub.files["config.json"] = b'{"auto_map": {"AutoModel": "modeling_own.Model"}}'

        with pytest.raises(UnsafeModelError, match="auto_map"):
            resolve_checkpoint(model(), tmp_path)
        assert "modeling_own.py" not in hub.downloaded

    @pytest.mark.parametrize(
        ("asked", "found", "fix"),
        [
            (model("owner/unheard"), "no such model repository", "hf auth login"),
            (model(revision="d" * 40), "has no such revision", "a commit sha"),
        ],
    )
    def test_an_unknown_repository_or_revision(
        self, hub: Hub, tmp_path: Path, asked: Model, found: str, fix: str
    ) -> None:
        with pytest.raises(ModelMissingError) as caught:
            resolve_checkpoint(asked, tmp_path)
        assert found in caught.value.what
        assert "owner/" in str(caught.value.where)
        assert fix in str(caught.value.fix)

    def test_a_hub_that_is_down_names_the_command(self, hub: Hub, tmp_path: Path) -> None:
        hub.is_down = True

        with pytest.raises(ModelMissingError) as caught:
            resolve_checkpoint(model(revision=SHA), tmp_path)
        assert f"`hf download {REPO} --revision {SHA}`" in str(caught.value.fix)

    def test_a_hub_that_is_down_does_not_matter_for_what_is_cached(
        self, hub: Hub, cache: Path, tmp_path: Path
    ) -> None:
        hub.is_down = True
        snapshot = fill(cache, "config.json", "model.safetensors")

        assert resolve_checkpoint(model(), tmp_path).folder == snapshot

    def test_a_full_disk_is_said_as_such(
        self, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(*args: Any, **options: Any) -> str:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
        with pytest.raises(DiskFullError, match=r"no space left[\s\S]*Fix: .*HF_HOME"):
            resolve_checkpoint(model(revision=SHA), tmp_path)

    @pytest.mark.parametrize("name", ["not an id", "../up/there", "a/b/c", "owner/model@main"])
    def test_what_is_no_hub_id_asks_nobody(self, hub: Hub, tmp_path: Path, name: str) -> None:
        with pytest.raises(ModelMissingError, match=r"no such folder[\s\S]*Fix: .*org/name"):
            resolve_checkpoint(model(name), tmp_path)
        assert hub.asked == []

    def test_an_id_that_the_client_refuses_is_missing(self, hub: Hub, tmp_path: Path) -> None:
        with pytest.raises(ModelMissingError, match="cannot be fetched"):
            resolve_checkpoint(model("owner/a--b"), tmp_path)

    def test_two_revisions_contradict(self, hub: Hub, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"two revisions for owner/model[\s\S]*Fix: keep"):
            resolve_checkpoint(model(f"{REPO}@{SHA}", revision="a" * 40), tmp_path)


class TestOffline:
    def test_the_cache_serves_and_its_ref_names_the_revision(
        self, offline: Path, tmp_path: Path
    ) -> None:
        snapshot = fill(offline, *repository())
        files = resolve_checkpoint(model(), tmp_path)

        assert files.folder == snapshot
        assert files.identity["revision"] == SHA
        assert load_tokenizer(model(), files)[0].bos_token_id == 0

    @pytest.mark.parametrize(
        ("revision", "named"), [(None, "main"), (SHA, SHA), ("a" * 40, "a" * 40)]
    )
    def test_without_a_cache_the_error_is_the_command(
        self, offline: Path, tmp_path: Path, revision: str | None, named: str
    ) -> None:
        with pytest.raises(ModelMissingError) as caught:
            resolve_checkpoint(model(revision=revision), tmp_path)
        assert caught.value.where == f"{REPO}@{named}"
        assert "not in the hub cache" in caught.value.what
        assert caught.value.fix == (
            "unset HF_HUB_OFFLINE, or where there is a network run "
            f"`hf download {REPO} --revision {named}`"
        )

    @pytest.mark.parametrize(
        "others",
        [
            ("consolidated.safetensors",),
            ("onnx/model.safetensors", "original/model-00001-of-00001.safetensors"),
            ("special_tokens_map.json", "chat_template.jinja", "model-00001-of-00002.safetensors"),
        ],
    )
    def test_a_complete_cache_is_enough_whatever_else_the_repository_holds(
        self, offline: Path, tmp_path: Path, others: tuple[str, ...]
    ) -> None:
        names = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
        snapshot = fill(offline, *names)
        know(offline, *names, *others)
        files = resolve_checkpoint(model(), tmp_path)

        assert files.folder == snapshot
        assert load_tokenizer(model(), files)[0].bos_token_id == 0

    def test_a_file_that_decides_is_demanded_by_name(self, offline: Path, tmp_path: Path) -> None:
        fill(offline, "config.json", "tokenizer.json")
        know(offline, "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")

        with pytest.raises(ModelMissingError, match=r"no model\.safetensors in the hub") as caught:
            resolve_checkpoint(model(), tmp_path)
        assert f"`hf download {REPO} --revision {SHA} model.safetensors`" in str(caught.value.fix)
        with pytest.raises(ModelMissingError, match=r"no tokenizer_config\.json, which says"):
            load_tokenizer(model())

    def test_a_shard_that_was_pruned_is_named(self, offline: Path, tmp_path: Path) -> None:
        snapshot = fill(offline, "config.json")
        index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
        (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
        (snapshot / "model-1.safetensors").write_bytes(repository()["model.safetensors"])
        (snapshot / "model-2.safetensors").symlink_to("../../blobs/gone")

        with pytest.raises(ModelMissingError, match=r"no model-2\.safetensors") as caught:
            resolve_checkpoint(model(), tmp_path)
        assert "model-2.safetensors`" in str(caught.value.fix)
        assert "model-1" not in str(caught.value)

    def test_a_partial_cache_names_the_file_and_the_command(
        self, offline: Path, tmp_path: Path
    ) -> None:
        fill(offline, "config.json", "tokenizer.json")

        with pytest.raises(ModelError) as caught:
            resolve_checkpoint(model(), tmp_path)
        assert type(caught.value) is ModelMissingError
        assert "no model.safetensors" in caught.value.what
        assert f"hf download {REPO} --revision {SHA}" in str(caught.value.fix)
