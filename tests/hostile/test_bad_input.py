"""Bad input from end to end: the study, the dataset, the checkpoint, the network, the disk.

Every case starts from a data folder in which the same study has already run. Whatever goes wrong
then is one error of the right class that says what was found, where, and a fix; and everything
that was committed before is still found and sound. `test_rollout_files` has every way in which one
file can be wrong; here one of each kind goes through the whole pipeline.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from taprobe_core.errors import (
    DataError,
    DiskFullError,
    ModelError,
    ModelMismatchError,
    ModelMissingError,
    NotEnoughDataError,
    PlanError,
    SchemaError,
    TaprobeError,
    UnsafeModelError,
)
from taprobe_core.keys import Site, Trial
from taprobe_core.pipeline import Plan, cells_of, open_plan, read_scores, run_stage
from taprobe_core.store import Store

CORRECT = "correct_base_solution"
UP_TO_FITS = ("rollouts", "labels", "spans", "activations", "probe_fits")
Values = dict[str, Any]


@dataclass(frozen=True)
class Bench:
    """A mirror, a study file on it, and a data folder in which it has run up to its fits."""

    folder: Path

    @property
    def study(self) -> Path:
        return self.folder / "study.yaml"

    @property
    def data(self) -> Path:
        return self.folder / "data"

    @property
    def mirror(self) -> Path:
        return self.folder / "mirror"

    @property
    def problems(self) -> list[Path]:
        return sorted(self.mirror.glob(f"tiny/*/{CORRECT}/problem_*"))

    def named(self, parts: tuple[str, ...]) -> tuple[str, ...]:
        """Put the id of the first problem into what a message should say."""
        first = self.problems[0].name.removeprefix("problem_") if self.problems else ""
        return tuple(part.replace("<first>", first) for part in parts)

    def change(self, change: Callable[[Values], object]) -> None:
        values = yaml.safe_load(self.study.read_text())
        change(values)
        self.study.write_text(yaml.safe_dump(values))

    def run(self, stages: tuple[str, ...] = UP_TO_FITS) -> Plan:
        plan = open_plan(self.study, self.data)
        for stage in stages:
            list(run_stage(plan, stage, cells_of(plan.study, stage)))
        return plan

    def committed(self) -> dict[str, Any]:
        store = Store(self.data / "artifacts")
        assert all(verdict.is_sound for verdict in store.verify())
        return {str(key): store.open(key).manifest for key in store.keys(None)}


def lay_out(folder: Path, mirror: Path, tokenizer: Path) -> Bench:
    bench = Bench(folder)
    shutil.copytree(mirror, bench.mirror)
    values = {
        "name": "mirrored",
        "rollouts": {
            "source": {"kind": "mirror", "folder": str(bench.mirror)},
            "on_bad_problem": "fail",
        },
        "models": {
            "tiny": {
                "rollouts_dir": "tiny",
                "checkpoint": {
                    "kind": "stand_in",
                    "architecture": "qwen2",
                    "n_layers": 2,
                    "d_model": 16,
                },
                "n_layers": 2,
                "dtype": "float32",
                "tokenizer": str(tokenizer),
                "layers": [1],
            }
        },
        "settings": [CORRECT],
        "probes": {
            "recipes": [
                {"name": "position_baseline", "features": ["position"]},
                {"name": "linear_probe", "features": ["activations"]},
            ]
        },
        "splits": {"protocols": ["lopo"]},
        "evaluation": {"baselines": ["position_baseline"], "n_bootstrap": 10},
    }
    bench.study.write_text(yaml.safe_dump(values))
    return bench


@pytest.fixture(scope="module")
def sound(built: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Artifacts of the study on a sound mirror, and the tokenizer."""
    demo = open_plan(built.study, built.data).demo
    bench = lay_out(tmp_path_factory.mktemp("sound"), demo.rollouts_folder, demo.tokenizer_folder)
    bench.run()
    return bench.folder, demo.tokenizer_folder


@pytest.fixture
def bench(sound: tuple[Path, Path], tmp_path: Path) -> Bench:
    folder, tokenizer = sound
    made = lay_out(tmp_path, folder / "mirror", tokenizer)
    shutil.copytree(folder / "data", made.data)
    return made


def assert_said(text: str, parts: tuple[str, ...]) -> None:
    for part in parts:
        assert part in text
    assert text.count("Fix: ") == 1
    assert len(text) < 1200


def test_the_bench_is_complete_though_its_mirror_has_moved(bench: Bench) -> None:
    before = bench.committed()
    bench.run()
    assert bench.committed() == before
    assert len(before) > 10


def replaced(name: str, change: Callable[[bytes], bytes]) -> Callable[[Bench], object]:
    def apply(bench: Bench) -> None:
        path = bench.problems[0] / name
        path.write_bytes(change(path.read_bytes()))

    return apply


def edited(name: str, change: Callable[[Any], object]) -> Callable[[Bench], object]:
    def apply(raw: bytes) -> bytes:
        value = json.loads(raw)
        change(value)
        return json.dumps(value).encode()

    return replaced(name, apply)


def without_problems(bench: Bench) -> None:
    for path in bench.problems:
        shutil.rmtree(path)


def in_study(*path: str, value: Any) -> Callable[[Bench], object]:
    def apply(values: Values) -> None:
        for part in path[:-1]:
            values = values.setdefault(part, {})
        values[path[-1]] = value

    return lambda bench: bench.change(apply)


def checkpoint_folder(bench: Bench) -> Path:
    (folder,) = (bench.data / "checkpoints").iterdir()
    return folder


def other_checkpoint(spoil: Callable[[Path], object], **model: Any) -> Callable[[Bench], object]:
    """Point the study at a copy of the stand-in's folder, spoiled."""

    def apply(bench: Bench) -> None:
        path = bench.folder / "checkpoint"
        shutil.copytree(checkpoint_folder(bench), path)
        spoil(path)
        bench.change(
            lambda values: values["models"]["tiny"].update(
                checkpoint={"kind": "pretrained", "path": str(path)}, **model
            )
        )

    return apply


def config_edit(path: Path, **values: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | values))


def pickled(path: Path) -> None:
    (path / "model.safetensors").rename(path / "pytorch_model.bin")


CHUNKS, BASE, PROBLEM = "chunks_labeled.json", "base_solution.json", "problem.json"

CASES: dict[str, tuple[Callable[[Bench], object], str, type[TaprobeError], tuple[str, ...]]] = {
    "missing folder": (
        lambda b: b.mirror.rename(b.folder / "gone"), "rollouts", DataError,
        ("no such folder", "mirror", "rollouts.source.folder")),
    "cut": (
        replaced(CHUNKS, lambda raw: raw[: len(raw) // 2]), "rollouts", DataError,
        ("breaks off", f"problem_<first>/{CHUNKS}, line ")),
    "not UTF-8": (
        replaced(PROBLEM, lambda raw: b"\xff" + raw), "rollouts", DataError,
        ("not UTF-8", "byte 0xff at offset 0", f"problem_<first>/{PROBLEM}")),
    "missing key": (
        edited(BASE, lambda value: value.pop("prompt")), "rollouts", SchemaError,
        ("$.prompt: found nothing", f"problem_<first>/{BASE}")),
    "wrong type": (
        edited(CHUNKS, lambda value: value[2].update(accuracy="high")), "rollouts", SchemaError,
        ("$[2].accuracy: found 'high'", f"problem_<first>/{CHUNKS}")),
    "missing file": (
        lambda b: (b.problems[0] / CHUNKS).unlink(), "rollouts", DataError,
        (f"problem <first> has no {CHUNKS}", "problem_<first>", "rollouts.exclude_ids")),
    "zero problems": (
        without_problems, "rollouts", NotEnoughDataError,
        ("no problem_<id> folder", f"tiny/temperature_0.6_top_p_0.95/{CORRECT}")),
    "two problems": (
        in_study("rollouts", "max_problems", value=2), "probe_fits", PlanError,
        ("lopo needs 3 problems or more, found n = 2", "splits.protocols", "max_problems")),
    "an empty side": (
        in_study("splits", value={
            "protocols": ["lopo"], "train_fraction": 0.05, "val_fraction": 0.94}),
        "probe_fits", PlanError,
        ("lopo with n = 6 problems leaves train empty", "splits.val_fraction")),
    "no checkpoint there": (
        in_study("models", "tiny", "checkpoint", value={"kind": "pretrained", "path": "/gone"}),
        "spans", ModelMissingError,
        ("no such folder: /gone", "model tiny, checkpoint", "org/name")),
    "a folder that is no checkpoint": (
        other_checkpoint(lambda path: (path / "config.json").unlink()), "spans", ModelMissingError,
        ("no config.json", "checkpoint")),
    "weights that run code": (
        other_checkpoint(pickled), "spans", UnsafeModelError, ("pytorch_model.bin", "checkpoint")),
    "a layer beyond the checkpoint": (
        other_checkpoint(lambda path: None, n_layers=5, layers=[4]), "activations",
        ModelMismatchError,
        ("num_hidden_layers: 2, where the study says n_layers: 5", "config.json",
         "set n_layers: 2")),
    "a configuration at odds with itself": (
        other_checkpoint(lambda path: config_edit(path, num_hidden_layers=3), n_layers=3),
        "activations", ModelError, ("`num_hidden_layers` (3)", "checkpoint", "config.json")),
    "a configuration at odds with the weights": (
        other_checkpoint(lambda path: config_edit(path, intermediate_size=8)),
        "activations", ModelMismatchError, ("checkpoint", "config.json", "another shape")),
}  # fmt: skip


@pytest.mark.parametrize(("spoil", "stage", "kind", "said"), CASES.values(), ids=CASES.keys())
def test_bad_input_is_one_error_at_its_stage_and_costs_nothing_committed(
    bench: Bench,
    spoil: Callable[[Bench], object],
    stage: str,
    kind: type[TaprobeError],
    said: tuple[str, ...],
) -> None:
    said = bench.named(said)
    before = bench.committed()
    spoil(bench)
    bench.run(UP_TO_FITS[: UP_TO_FITS.index(stage)])
    earlier = bench.committed()
    with pytest.raises(kind) as caught:
        bench.run((stage,))
    assert type(caught.value) is kind
    assert_said(str(caught.value), said)
    after = bench.committed()
    assert before.items() <= earlier.items() <= after.items()
    # Fits of one stage that were done before the faulty one may be new; the stage itself is not.
    assert not any(key.startswith(f"{stage}/") for key in after.keys() - earlier.keys())
    assert list(bench.data.rglob(".tmp-*")) == []


def test_a_bad_problem_that_may_be_skipped_is_left_out_of_everything_and_said_so(
    bench: Bench,
) -> None:
    CASES["cut"][0](bench)
    bench.change(lambda values: values["rollouts"].update(on_bad_problem="skip"))
    plan = bench.run()
    skipped = plan.read("rollouts", ("tiny", CORRECT), "skipped")
    (row,) = skipped.iter_rows(named=True)
    ids = [int(path.name.removeprefix("problem_")) for path in bench.problems]
    assert (row["problem_id"], row["error"]) == (ids[0], "DataError")
    assert "breaks off" in row["what"]
    scores = read_scores(plan, Site("tiny", 1), Trial(CORRECT, 0))
    assert set(scores["problem_id"]) == set(ids[1:])


STUDY_FAULTS: dict[str, tuple[Callable[[str], str], tuple[str, ...]]] = {
    "unknown key": (
        lambda text: text + "labells: {percentile: 90}\n", ("labells", "labels")),
    "a layer beyond the study": (
        lambda text: text.replace("    - 1\n", "    - 2\n"),
        ("layers [2] of a model with 2 layers", "models.tiny", "0 to 1")),
    "percentile 0": (
        lambda text: text + "labels: {percentile: 0}\n", ("labels.percentile", "0")),
    "percentile 100": (
        lambda text: text + "labels: {percentile: 100}\n", ("labels.percentile", "100")),
    "percentile 101": (
        lambda text: text + "labels: {percentile: 101}\n", ("labels.percentile", "101")),
    "percentile nan": (
        lambda text: text + "labels: {percentile: .nan}\n", ("labels.percentile", "nan")),
}  # fmt: skip


@pytest.mark.parametrize("verb", ["check", "run"])
@pytest.mark.parametrize(("spoil", "said"), STUDY_FAULTS.values(), ids=STUDY_FAULTS.keys())
def test_a_wrong_study_names_file_line_and_field_before_anything_runs(
    bench: Bench,
    taprobe: Callable[..., Any],
    spoil: Callable[[str], str],
    said: tuple[str, ...],
    verb: str,
) -> None:
    before = bench.committed()
    bench.study.write_text(spoil(bench.study.read_text()))
    ended = taprobe(verb, bench.study)
    assert (ended.code, ended.out) == (2, "")
    assert_said(ended.err, ("error: ", "study.yaml:", *said))
    assert "Traceback" not in ended.err
    assert bench.committed() == before


@pytest.mark.parametrize("name", ["cut", "two problems", "a layer beyond the checkpoint"])
def test_the_command_says_the_same_and_ends_with_2(
    bench: Bench, taprobe: Callable[..., Any], name: str
) -> None:
    before = bench.committed()
    spoil, _, _, parts = CASES[name]
    said = bench.named(parts)
    spoil(bench)
    ended = taprobe("run", bench.study)
    assert ended.code == 2
    assert "Traceback" not in ended.err
    assert_said(ended.err[ended.err.index("error: ") :], said)
    assert before.items() <= bench.committed().items()


OFFLINE = """
import json, sys
from pathlib import Path
from taprobe_core.errors import TaprobeError
from taprobe_core.pipeline import cells_of, open_plan, run_stage
said = {}
for path in map(Path, sys.argv[1:]):
    plan = open_plan(path)
    try:
        for stage in ("rollouts", "spans"):
            list(run_stage(plan, stage, cells_of(plan.study, stage)))
    except TaprobeError as error:
        said[path.stem] = [type(error).__name__, str(error)]
print(json.dumps(said))
"""


def test_offline_without_a_cache_says_which_command_fetches_what(bench: Bench) -> None:
    studies = {}
    for name, change in {
        "dataset": lambda v: v["rollouts"].update(source={"kind": "hub", "repo": "org/rollouts"}),
        "pinned": lambda v: v["rollouts"].update(
            source={"kind": "hub", "repo": "org/rollouts", "revision": "a" * 40}
        ),
        "model": lambda v: v["models"]["tiny"].update(
            checkpoint={"kind": "pretrained", "path": "org/model"}, tokenizer=None
        ),
    }.items():
        values = yaml.safe_load(bench.study.read_text())
        change(values)
        studies[name] = bench.folder / f"{name}.yaml"
        studies[name].write_text(yaml.safe_dump(values))
    before = bench.committed()
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE, *map(str, studies.values())],
        env={
            **{name: value for name, value in os.environ.items() if not name.startswith("HF_")},
            "PYTHONPATH": os.pathsep.join(sys.path),
            "TAPROBE_DATA": str(bench.data),
            "HF_HOME": str(bench.folder / "hf"),
            "HF_HUB_OFFLINE": "1",
        },
        capture_output=True,
        text=True,
        timeout=90,
        check=True,
    )
    said = json.loads(done.stdout)
    assert {name: error for name, (error, _) in said.items()} == {
        "dataset": "SourceUnavailableError",
        "pinned": "SourceUnavailableError",
        "model": "ModelMissingError",
    }
    for _, text in said.values():
        assert_said(text, ("unset HF_HUB_OFFLINE", "hf download org/"))
    assert before.items() <= bench.committed().items()


def fill_disk(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Refuse every fsync from the n-th on, as a full disk does."""
    real, left = os.fsync, [after]

    def fsync(descriptor: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)


def forget(bench: Bench, *stages: str) -> None:
    for stage in stages:
        shutil.rmtree(bench.data / "artifacts" / stage)


@pytest.mark.parametrize("after", [0, 7, 20])
def test_a_disk_that_fills_up_stops_the_run_and_space_lets_it_go_on(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    everything = bench.committed()
    forget(bench, "activation_shards", "activations", "fits", "probe_fits")
    before = bench.committed()
    with monkeypatch.context() as full:
        fill_disk(full, after)
        with pytest.raises(DiskFullError, match="bytes needed") as caught:
            bench.run()
    # The pins of what goes in are the first to be written.
    assert_said(str(caught.value), (str(bench.data / ("artifacts" if after else "pins")), "free"))
    kept = bench.committed()
    assert before.items() <= kept.items()
    assert list(bench.data.rglob(".tmp-*")) == []
    bench.run()
    found = bench.committed()
    assert kept.items() <= found.items()
    assert {key: manifest.files for key, manifest in found.items()} == {
        key: manifest.files for key, manifest in everything.items()
    }


def test_too_little_space_is_said_by_the_command(
    bench: Bench, taprobe: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    forget(bench, "activation_shards", "activations", "fits", "probe_fits")
    before = bench.committed()
    monkeypatch.setattr("shutil.disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    ended = taprobe("run", bench.study)
    assert ended.code == 2
    assert "1 bytes free" in ended.err
    assert "activation_shards" in ended.err
    assert "Traceback" not in ended.err
    assert before.items() <= bench.committed().items()
