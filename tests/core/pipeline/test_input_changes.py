"""A changed dataset, checkpoint or tokenizer is named and refused, and goes on once accepted."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from taprobe_core.errors import DataError, ModelError, TaprobeError
from taprobe_core.pipeline import Plan, cells_of, key_of, open_plan, run_stage
from taprobe_core.store import pin_file

SETTING = "correct_base_solution"
Command = Callable[..., Any]


def world(data: Path) -> Path:
    (folder,) = (data / "demo").iterdir()
    return folder


def problem(data: Path) -> Path:
    return min(world(data).glob(f"rollouts/tiny/*/{SETTING}/problem_*"))


def one_label(data: Path) -> str:
    path = problem(data) / "chunks_labeled.json"
    rows = json.loads(path.read_text())
    rows[0]["counterfactual_importance_accuracy"] = -0.75
    path.write_text(json.dumps(rows))
    return f"{problem(data).name}/chunks_labeled.json: expected sha256"


def cut_file(data: Path) -> str:
    path = problem(data) / "base_solution.json"
    path.write_bytes(path.read_bytes()[:-40])
    return f"{problem(data).name}/base_solution.json: expected sha256"


def deleted_file(data: Path) -> str:
    (problem(data) / "problem.json").unlink()
    return f"{problem(data).name}/problem.json: deleted"


def deleted_problem(data: Path) -> str:
    name = problem(data).name
    shutil.rmtree(problem(data))
    return f"{SETTING}/{name}: deleted"


def added_problem(data: Path) -> str:
    shutil.copytree(problem(data), problem(data).with_name("problem_7"))
    return f"{SETTING}/problem_7: added"


def tokenizer_byte(data: Path) -> str:
    path = world(data) / "tokenizer" / "tokenizer.json"
    path.write_bytes(path.read_bytes() + b" ")
    return "tokenizer/tokenizer.json: expected sha256"


def special_tokens(data: Path) -> str:
    path = world(data) / "tokenizer" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"unk_token": "1"}))
    return "tokenizer/tokenizer_config.json: expected sha256"


def weight_bits(data: Path) -> str:
    (path,) = (data / "checkpoints").glob("*/model.safetensors")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    return "model.safetensors: expected sha256"


CHANGES = [
    one_label,
    cut_file,
    deleted_file,
    deleted_problem,
    added_problem,
    tokenizer_byte,
    special_tokens,
    weight_bits,
]


def all_keys(plan: Plan) -> dict[str, str]:
    stages = ("rollouts", "labels", "spans", "activations", "probe_fits", "leaderboard")
    return {
        f"{stage} {cell}": key_of(plan, stage, cell).fingerprint
        for stage in stages
        for cell in cells_of(plan.study, stage)
    }


@pytest.mark.parametrize("are_pins_lost", [False, True], ids=["pinned", "as made"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_was_made_here_is_compared_and_goes_on_once_accepted(
    built: Any,
    copied: Path,
    taprobe: Command,
    change: Callable[[Path], str],
    are_pins_lost: bool,
) -> None:
    before = all_keys(open_plan(built.study, copied))
    if are_pins_lost:
        shutil.rmtree(copied / "pins")
    said = change(copied)
    with pytest.raises((DataError, ModelError), match="changed since"):
        all_keys(open_plan(built.study, copied))
    refused = taprobe("check", built.study, "--no-measure")
    assert refused.code == 2
    assert "study small cannot run yet, 1 input(s) as said below; data folder" in refused.out
    assert said in refused.err
    assert refused.err.count("Fix: ") == 1
    assert "taprobe check STUDY --accept" in refused.err

    held = {path: path.read_bytes() for path in (copied / "artifacts").rglob("*.json")}
    accepted = taprobe("check", built.study, "--no-measure", "--accept")
    assert accepted.code == 0
    assert "accepted: " in accepted.err
    assert "study small is valid" in accepted.out
    after = all_keys(open_plan(built.study, copied))
    assert after["probe_fits ('tiny@L00', 'correct_base_solution@s00')"] not in before.values()
    assert after["leaderboard ()"] != before["leaderboard ()"]
    assert {path: path.read_bytes() for path in held} == held
    assert taprobe("check", built.study, "--no-measure").code == 0


def test_verify_reads_every_input_and_names_what_changed(
    built: Any, copied: Path, taprobe: Command
) -> None:
    sound = taprobe("verify", built.study)
    assert (sound.code, "changed" in sound.out) == (0, False)
    # The bench's own copy is what the pins name once it has been used.
    all_keys(open_plan(built.study, copied))
    n_pins = len(list((copied / "pins").glob("*.json")))
    said = one_label(copied)
    found = taprobe("verify", built.study)
    assert found.code == 3
    assert f"changed dataset {world(copied)}" in found.out
    assert said in found.out
    assert f"{n_pins} inputs, {n_pins - 1} as they were pinned" in found.out
    as_json = json.loads(taprobe("verify", built.study, "--json").out)
    assert (as_json["n_inputs"], len(as_json["changed"]), as_json["unsound"]) == (n_pins, 1, [])


def test_a_second_plan_opens_no_input(
    built: Any, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = all_keys(open_plan(built.study, copied))

    def read(path: Path) -> str:
        raise AssertionError(f"{path} is hashed again")

    monkeypatch.setattr(pin_file, "file_sha256", read)
    assert all_keys(open_plan(built.study, copied)) == first


def test_a_stand_in_is_compared_before_it_is_loaded(built: Any, copied: Path) -> None:
    plan = open_plan(built.study, copied)
    plan.checkpoint("tiny")
    said = weight_bits(copied)
    with pytest.raises(ModelError, match=said):
        plan.check_model("tiny")


def test_a_removed_stand_in_or_world_is_made_again_and_is_the_same(
    built: Any, copied: Path
) -> None:
    before = all_keys(open_plan(built.study, copied))
    shutil.rmtree(copied / "demo")
    shutil.rmtree(copied / "checkpoints")
    assert all_keys(open_plan(built.study, copied)) == before


@pytest.fixture
def mirror(built: Any, copied: Path, tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """A study on folders of the user's own: rollouts, tokenizer and checkpoint."""
    shutil.copytree(world(copied) / "rollouts", tmp_path / "mirror")
    shutil.copytree(world(copied) / "tokenizer", tmp_path / "own")
    (weights,) = (copied / "checkpoints").iterdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(weights / name, tmp_path / "own" / name)
    values = yaml.safe_load(built.study.read_text())
    values["rollouts"]["source"] = {"kind": "mirror", "folder": str(tmp_path / "mirror")}
    values["models"]["tiny"]["checkpoint"] = {
        "kind": "pretrained",
        "path": str(tmp_path / "own"),
    }
    study = tmp_path / "mirror.yaml"
    study.write_text(yaml.safe_dump(values))
    yield study, copied
    (tmp_path / "mirror.yaml").unlink()


def mirrored(folder: Path) -> Path:
    return min((folder / "mirror").glob(f"tiny/*/{SETTING}/problem_*"))


def edit_mirror(folder: Path) -> str:
    path = mirrored(folder) / "problem.json"
    path.write_text(path.read_text() + " ")
    return f"{mirrored(folder).name}/problem.json: expected sha256"


def grow_mirror(folder: Path) -> str:
    shutil.copytree(mirrored(folder), mirrored(folder).with_name("problem_1"))
    return f"{SETTING}/problem_1: added"


def edit_tokenizer(folder: Path) -> str:
    path = folder / "own" / "tokenizer.json"
    path.write_bytes(path.read_bytes() + b"\n")
    return "tokenizer.json: expected sha256"


def add_special_tokens(folder: Path) -> str:
    path = folder / "own" / "special_tokens_map.json"
    path.write_text('{"unk_token": "2"}')
    return "special_tokens_map.json: added"


def edit_config(folder: Path) -> str:
    path = folder / "own" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rope_theta": 5.0}))
    return "config.json: expected sha256"


def shard_weights(folder: Path) -> str:
    own = folder / "own"
    (own / "model.safetensors").rename(own / "one.safetensors")
    index = {"weight_map": {"w": "one.safetensors"}}
    (own / "model.safetensors.index.json").write_text(json.dumps(index))
    return "model.safetensors: deleted; model.safetensors.index.json: added"


OWN = [edit_mirror, grow_mirror, edit_tokenizer, add_special_tokens, edit_config, shard_weights]


@pytest.mark.parametrize("change", OWN, ids=lambda change: change.__name__)
def test_a_folder_of_ones_own_goes_on_after_one_command(
    mirror: tuple[Path, Path], tmp_path: Path, taprobe: Command, change: Callable[[Path], str]
) -> None:
    study, data = mirror
    before = all_keys(open_plan(study, data))
    said = change(tmp_path)
    refused = taprobe("check", study, "--no-measure")
    assert (refused.code, said in refused.err) == (2, True)
    assert taprobe("check", study, "--no-measure", "--accept").code == 0
    after = all_keys(open_plan(study, data))
    assert after["leaderboard ()"] != before["leaderboard ()"]


def test_a_change_while_reading_commits_nothing(
    mirror: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, data = mirror
    plan = open_plan(study, data)
    key = plan.key("rollouts", ("tiny", SETTING))
    from taprobe_core import rollouts

    real = rollouts.read_rollouts

    def read_then_change(*arguments: Any) -> Any:
        found = real(*arguments)
        edit_mirror(tmp_path)
        return found

    monkeypatch.setattr(rollouts, "read_rollouts", read_then_change)
    plan.store.discard(key) if plan.store.find(key) else None
    with pytest.raises(DataError, match="changed since"):
        list(run_stage(plan, "rollouts", [("tiny", SETTING)]))
    assert plan.store.find(key) is None


def test_a_tokenizer_that_changes_while_it_is_read_commits_nothing(
    mirror: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, data = mirror
    plan = open_plan(study, data)
    list(run_stage(plan, "rollouts", [("tiny", SETTING)]))
    key = plan.key("spans", ("tiny", SETTING))
    from taprobe_core import checkpoints

    real = checkpoints.load_tokenizer

    def load_then_change(*arguments: Any) -> Any:
        found = real(*arguments)
        edit_tokenizer(tmp_path)
        return found

    monkeypatch.setattr(checkpoints, "load_tokenizer", load_then_change)
    plan.store.discard(key) if plan.store.find(key) else None
    with pytest.raises(ModelError, match="changed since"):
        list(run_stage(plan, "spans", [("tiny", SETTING)]))
    assert plan.store.find(key) is None


MISSING = {
    "mirror": (("rollouts", "source", "folder"), "no such folder"),
    "tokenizer": (("models", "tiny", "tokenizer"), "no such folder"),
    "checkpoint": (("models", "tiny", "checkpoint", "path"), "no such folder"),
}


@pytest.mark.parametrize(("place", "said"), MISSING.values(), ids=MISSING.keys())
def test_check_does_not_call_valid_what_lacks_its_inputs(
    mirror: tuple[Path, Path],
    tmp_path: Path,
    taprobe: Command,
    place: tuple[str, ...],
    said: str,
) -> None:
    values = yaml.safe_load(mirror[0].read_text())
    part = values
    for name in place[:-1]:
        part = part[name]
    part[place[-1]] = str(tmp_path / "gone")
    mirror[0].write_text(yaml.safe_dump(values))
    ended = taprobe("check", mirror[0], "--no-measure")
    assert ended.code == 2
    assert "is valid;" not in ended.out
    assert said in ended.err
    assert str(tmp_path / "gone") in ended.err
    as_json = taprobe("check", mirror[0], "--no-measure", "--json")
    assert as_json.code == 2
    assert [fault["what"] for fault in json.loads(as_json.out)["faults"]]


@pytest.mark.parametrize("verb", [["verify"], ["du"], ["prune"], ["prune", "--dry-run"]])
@pytest.mark.parametrize("is_file", [True, False])
def test_a_data_folder_that_is_none_is_no_empty_store(
    tmp_path: Path, taprobe: Command, built: Any, verb: list[str], is_file: bool
) -> None:
    if is_file:
        (tmp_path / "data").write_text("a file")
    options = verb[1:]
    argument = ["--study", built.study] if verb[0] == "lineage" else [built.study]
    ended = taprobe(verb[0], *argument, *options)
    assert (ended.code, ended.out) == (2, "")
    said = "a file in place of the data folder" if is_file else "no such data folder"
    assert f"{said} in {tmp_path / 'data'}" in ended.err


def test_a_bundle_that_differs_from_its_manifest_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from taprobe_core.checkpoints import checkpoint_identity, origin
    from taprobe_core.checkpoints import origin as pinned
    from taprobe_core.demo import BUNDLE
    from taprobe_core.study import DemoCheckpoint, Model

    bundle = Path(shutil.copytree(BUNDLE, tmp_path / "bundle"))
    for module in (origin, pinned):
        monkeypatch.setattr(module, "BUNDLE", bundle)
    name = min(path.name for path in bundle.iterdir() if path.is_dir())
    config = json.loads((bundle / name / "config.json").read_text())
    model = Model(
        rollouts_dir=name,
        checkpoint=DemoCheckpoint(kind="demo", name=name),
        n_layers=config["num_hidden_layers"],
    )
    assert checkpoint_identity(model)["kind"] == "folder"
    weights = bundle / name / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(TaprobeError, match=r"since it was made: 1 file \(model\.safetensors: "):
        checkpoint_identity(model)
