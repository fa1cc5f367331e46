"""`taprobe run` and its kin, through Dagster, on stores that are whole, damaged or empty."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from taprobe_core import pipeline
from taprobe_core.errors import ConfigError
from taprobe_core.pipeline import STAGES, cells_of, open_plan, stages_of
from taprobe_core.store import Artifact, Store

CORRECT = "correct_base_solution"
Command = Callable[..., Any]


def counts(said: Any) -> tuple[int, int, int, int]:
    """Artifacts, computed, reused, Dagster runs: the last line of a run."""
    match = re.search(
        r"(\d+) artifacts: (\d+) computed, (\d+) reused;\s+(\d+) Dagster run", said.err
    )
    assert match is not None, said
    total, computed, reused, runs = map(int, match.groups())
    return total, computed, reused, runs


@pytest.fixture
def empty(built: Any, tmp_path: Path) -> Path:
    """A data folder with the demo world and nothing else."""
    return Path(shutil.copytree(built.data / "demo", tmp_path / "data" / "demo")).parent


def flip_byte(artifact: Artifact, name: str) -> None:
    raw = bytearray((artifact.path / name).read_bytes())
    raw[len(raw) // 2] ^= 1
    (artifact.path / name).write_bytes(bytes(raw))


DAMAGED = {
    "spans": "spans.parquet",
    "activation_shards": "activations.safetensors",
    "fits": "scores.parquet",
    "leaderboard": "leaderboard.parquet",
}


@pytest.mark.slow
def test_a_fresh_event_log_adopts_the_store_and_flipped_bytes_are_mended_alone(
    built: Any, taprobe: Command, copied: Path
) -> None:
    study = open_plan(built.study, copied).study
    n_cells = sum(len(cells_of(study, stage)) for stage in stages_of(study))
    said = taprobe("run", built.study)
    assert said.code == 0
    assert counts(said) == (n_cells, 0, n_cells, 5)
    assert "linear_probe" in said.out
    page = Path(said.out.rsplit("report: ", 1)[1].strip())
    assert page.is_file()
    assert page.is_relative_to(copied)
    assert counts(taprobe("run", built.study)) == (n_cells, 0, n_cells, 0)

    store = Store(copied / "artifacts")
    sound = {key: store.inspect(key).manifest for key in store.keys(None)}
    damaged = {next(iter(store.keys(stage))): name for stage, name in DAMAGED.items()}
    for key, name in damaged.items():
        flip_byte(store.inspect(key), name)
    said = taprobe("verify", built.study, "--discard")
    assert said.code == 3
    assert said.out.count("unsound") == len(damaged)
    said = taprobe("run", built.study)
    assert said.code == 0
    # The lost fit is a part of one cell, the lost text of one cell at each of two layers.
    assert counts(said) == (n_cells, 5, n_cells - 5, 4)
    assert taprobe("verify", built.study).code == 0
    again = {key: store.inspect(key).manifest for key in store.keys(None)}
    assert again.keys() == sound.keys()
    assert {key for key in again if again[key] != sound[key]} == damaged.keys()


def test_a_part_of_the_study_runs_alone(built: Any, taprobe: Command, empty: Path) -> None:
    trial = f"{CORRECT}@s01"
    words = ("run", built.study, "--site", "tiny@L01", "--trial", trial)
    said = taprobe(*words, "--select", "rollouts", "--select", "labels")
    assert said.code == 0
    assert counts(said) == (2, 2, 0, 1)
    assert said.out == ""
    keys = list(Store(empty / "artifacts").keys())
    assert [key[:2] for key in keys] == [
        (each, ("tiny", CORRECT)) for each in ("labels", "rollouts")
    ]

    # No selection: all that a part can have, so neither evaluation nor leaderboard nor report.
    said = taprobe(*words)
    assert counts(said)[:2] == (6, 4)
    assert said.out == ""
    sites = {key.partition[0] for key in Store(empty / "artifacts").keys("activations")}
    assert sites == {"tiny@L01"}


@pytest.mark.parametrize(
    ("words", "found", "known"),
    [
        (["--select", "lables"], "no stage 'lables'", "rollouts, labels"),
        (["--select", "receiver_heads"], "no stage 'receiver_heads'", "set attention.mode to full"),
        (["--site", "tiny@L07"], "no site tiny@L07", "tiny@L00, tiny@L01"),
        (["--trial", "x", "--trial", "y"], "no trial x, y", f"{CORRECT}@s00"),
        (["--select", "evaluation"], "never built", "run the stage again"),
    ],
)
def test_what_cannot_run_is_one_message_with_a_fix(
    built: Any, taprobe: Command, empty: Path, words: list[str], found: str, known: str
) -> None:
    said = taprobe("run", built.study, *words)
    assert (said.code, said.out) == (2, "")
    assert said.err.count("error: ") == said.err.count("Fix: ") == 1
    assert "Traceback" not in said.err
    assert found in said.err
    assert known in said.err.split("Fix: ")[1]
    assert list(Store(empty / "artifacts").keys()) == []


def test_an_interrupted_run_keeps_what_is_finished(
    built: Any, taprobe: Command, empty: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(STAGES, "labels", replace(STAGES["labels"], make=interrupted))
    said = taprobe("run", built.study, "--select", "rollouts", "--select", "labels")
    assert said.code == 130
    assert "everything finished is kept" in said.err
    assert "Traceback" not in said.err
    assert len(list(Store(empty / "artifacts").keys("rollouts"))) == 2


def test_the_demo_is_the_shipped_study_whatever_the_environment_says(
    taprobe: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[object] = []

    def stop(study: object) -> None:
        opened.append((study, os.environ.get("TAPROBE_STUDY")))
        raise ConfigError("far enough", None, "none")

    monkeypatch.setenv("TAPROBE_STUDY", "/another.yaml")
    monkeypatch.setattr(pipeline, "open_plan", stop)
    assert taprobe("demo").code == 2
    assert opened == [(None, None)]


def test_the_ui_serves_the_study_that_it_is_given(
    built: Any, taprobe: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    served: list[tuple[int, str, bool]] = []

    def serve(port: int, token: str, *, is_read_only: bool) -> None:
        served.append((port, token, is_read_only))

    monkeypatch.setattr("taprobe_dagster.serve.serve", serve)
    monkeypatch.setenv("TAPROBE_STUDY", "")
    monkeypatch.delenv("TAPROBE_UI_TOKEN", raising=False)
    monkeypatch.chdir(built.study.parent)
    assert taprobe("ui", built.study.name, "--port", "3111").code == 0
    assert taprobe("ui", built.study.name, "--port", "3111").code == 0
    assert os.environ["TAPROBE_STUDY"] == str(built.study)
    assert {(port, is_read_only) for port, _, is_read_only in served} == {(3111, False)}
    # A new token each start.
    assert len({token for _, token, _ in served if len(token) > 40}) == 2

    chosen = "chosen-by-somebody"
    assert taprobe("ui", built.study.name, "--read-only", "--token", chosen).code == 0
    monkeypatch.setenv("TAPROBE_UI_TOKEN", chosen)
    assert taprobe("ui", built.study.name).code == 0
    assert served[2:] == [(3000, chosen, True), (3000, chosen, False)]
    for bad in ("brief", "with a blank in it", "semicolon;in;a;cookie", "long" * 100):
        said = taprobe("ui", built.study.name, "--token", bad)
        assert said.code == 2
        assert "--token or TAPROBE_UI_TOKEN" in said.err
        assert bad not in said.err
    assert taprobe("ui", "gone.yaml").code == 2
    assert len(served) == 4
