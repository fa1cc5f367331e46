"""Files of a hub's cache decide results as any others do: compared with their names, and pinned."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub
import pytest
import yaml
from huggingface_hub import constants

from taprobe_core.checkpoints import resolve_checkpoint
from taprobe_core.errors import DataError, ModelError
from taprobe_core.pipeline import Plan, open_plan, run_stage
from taprobe_core.store import pin_file

SETTING = "correct_base_solution"
DATASET, MODEL = "c0ffee" + "0" * 34, "beef" + "0" * 36
CACHES = {"datasets--own--rollouts": DATASET, "models--own--model": MODEL}


def blob_name(path: Path) -> str:
    """What the hub calls a file: its sha256 where it is large, else what git calls it."""
    content = path.read_bytes()
    if path.suffix == ".safetensors":
        return hashlib.sha256(content).hexdigest()
    head = b"blob %d\0" % len(content)
    return hashlib.sha1(head + content, usedforsecurity=False).hexdigest()


def lay_out(cache: Path, files: Path, revision: str, *, has_links: bool) -> None:
    """Make what a download leaves, or what a copy of it that does not know links leaves."""
    snapshot = cache / "snapshots" / revision
    (cache / "blobs").mkdir(parents=True)
    for path in sorted(each for each in files.rglob("*") if each.is_file()):
        place = snapshot / path.relative_to(files)
        place.parent.mkdir(parents=True, exist_ok=True)
        if has_links:
            blob = cache / "blobs" / blob_name(path)
            shutil.copyfile(path, blob)
            place.symlink_to(blob)
        else:
            shutil.copyfile(path, place)


class Hub(NamedTuple):
    """A study that reads a hub's cache, offline."""

    study: Path
    data: Path
    cache: Path

    def plan(self) -> Plan:
        return open_plan(self.study, self.data)

    def dataset_file(self, name: str = "chunks_labeled.json") -> Path:
        return min(self.cache.glob(f"datasets--*/snapshots/*/tiny/*/{SETTING}/problem_*/{name}"))

    def model_file(self, name: str) -> Path:
        return next(self.cache.glob(f"models--*/snapshots/*/{name}"))


@pytest.fixture
def make_hub(
    built: Any, copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Hub]]:
    (world,) = (copied / "demo").iterdir()
    for path in sorted((world / "rollouts").rglob("chunk_*")):
        shutil.rmtree(path)
    (weights,) = (copied / "checkpoints").iterdir()
    model = tmp_path / "files"
    shutil.copytree(weights, model)
    (model / "manifest.json").unlink()
    for path in (world / "tokenizer").iterdir():
        shutil.copyfile(path, model / path.name)
    values = yaml.safe_load(built.study.read_text())
    values["rollouts"]["source"] = {"kind": "hub", "repo": "own/rollouts", "revision": DATASET}
    checkpoint = {"kind": "pretrained", "path": "own/model", "revision": MODEL}
    values["models"]["tiny"]["checkpoint"] = checkpoint
    study = tmp_path / "hub.yaml"
    study.write_text(yaml.safe_dump(values))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    huggingface_hub.close_session()

    def make(name: str, *, has_links: bool = True) -> Hub:
        cache = tmp_path / name / "hub"
        sources = dict(zip(CACHES, (world / "rollouts", model), strict=True))
        for folder, revision in CACHES.items():
            lay_out(cache / folder, sources[folder], revision, has_links=has_links)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        return Hub(study, tmp_path / name / "data", cache)

    yield make
    huggingface_hub.close_session()


def spoil(path: Path, old: bytes = b"0", new: bytes = b"1") -> Path:
    """Change one byte behind a link, or of the file itself; return what was changed."""
    real = path.resolve()
    content = real.read_bytes()
    assert old in content
    place = content.rindex(old)
    real.write_bytes(content[:place] + new + content[place + len(old) :])
    return real


def identities(hub: Hub) -> tuple[str, dict[str, str]]:
    plan = hub.plan()
    version = plan.dataset_version("tiny", SETTING)
    plan.check_dataset("tiny", SETTING)
    resolve_checkpoint(plan.model("tiny"), plan.checkpoints_root, plan.pins)
    return version, dict(plan.checkpoint("tiny"))


def test_a_sound_cache_is_named_alike_on_every_machine_and_read_once(
    make_hub: Callable[..., Hub], monkeypatch: pytest.MonkeyPatch
) -> None:
    linked = make_hub("linked")
    first = identities(linked)
    assert first[1]["revision"] == MODEL
    assert "accepted_sha256" not in first[1]
    plain = make_hub("plain", has_links=False)
    assert identities(plain) == first

    def read(path: Path) -> str:
        raise AssertionError(f"{path} is hashed again")

    monkeypatch.setattr(pin_file, "file_sha256", read)
    assert identities(plain) == first


@pytest.mark.parametrize("is_pinned", [False, True])
@pytest.mark.parametrize("name", ["chunks_labeled.json", "problem.json"])
def test_a_changed_blob_of_a_dataset_is_refused_by_its_name(
    make_hub: Callable[..., Hub], taprobe: Any, name: str, is_pinned: bool
) -> None:
    hub = make_hub("hub")
    if is_pinned:
        identities(hub)
    blob = spoil(hub.dataset_file(name), b"e", b"f")
    for is_accepting in (False, True):
        plan = hub.plan()
        plan.pins.is_accepting = is_accepting
        with pytest.raises(DataError) as refused:
            list(run_stage(plan, "rollouts", [("tiny", SETTING)]))
        assert refused.value.where == str(blob)
        assert f"delete {blob} and download it again" in (refused.value.fix or "")
        assert list(plan.store.keys("rollouts")) == []


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_changed_blob_of_a_model_is_refused_by_its_name(
    make_hub: Callable[..., Hub], name: str
) -> None:
    hub = make_hub("hub")
    real = hub.model_file(name).resolve()
    content = bytearray(real.read_bytes())
    if name == "model.safetensors":
        content[-1] ^= 1
    else:
        content += b" "
    real.write_bytes(content)
    with pytest.raises(ModelError) as refused:
        identities(hub)
    assert refused.value.where == str(real)
    assert str(real) in (refused.value.fix or "")


def test_a_downloaded_again_blob_is_as_good_as_the_first(make_hub: Callable[..., Hub]) -> None:
    hub = make_hub("hub")
    first = identities(hub)
    link = hub.dataset_file()
    blob = link.resolve()
    content = blob.read_bytes()
    blob.unlink()
    blob.write_bytes(content)
    assert identities(hub) == first


def test_a_cache_without_links_is_pinned_and_an_accepted_change_gets_other_names(
    make_hub: Callable[..., Hub],
) -> None:
    hub = make_hub("plain", has_links=False)
    version, checkpoint = identities(hub)
    spoil(hub.dataset_file(), b"e", b"f")
    config = hub.model_file("config.json")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"rope_theta": 5.0}))
    with pytest.raises(DataError, match=r"chunks_labeled\.json: expected sha256"):
        hub.plan().dataset_version("tiny", SETTING)
    with pytest.raises(ModelError, match=r"config\.json: expected sha256"):
        hub.plan().checkpoint("tiny")
    accepting = hub.plan()
    accepting.pins.is_accepting = True
    accepting.dataset_version("tiny", SETTING)
    accepting.checkpoint("tiny")
    assert len(accepting.pins.accepted) == 2
    after = identities(hub)
    assert after[0] not in (version, "")
    assert after[1].pop("accepted_sha256")
    assert after[1] == checkpoint
    # Another setting of the same dataset did not change.
    other = "incorrect_base_solution"
    assert "+" not in hub.plan().dataset_version("tiny", other)


def test_check_says_offline_what_the_cache_lacks(
    make_hub: Callable[..., Hub], taprobe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = make_hub("hub")
    monkeypatch.setenv("TAPROBE_DATA", str(hub.data))
    assert taprobe("check", hub.study, "--no-measure").code == 0
    hub.model_file("model.safetensors").unlink()
    ended = taprobe("check", hub.study, "--no-measure")
    assert ended.code == 2
    assert "model.safetensors" in ended.err
    assert "is valid;" not in ended.out
