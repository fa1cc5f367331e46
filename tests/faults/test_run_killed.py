"""A run killed with SIGKILL, wherever: the same command finishes it and redoes next to nothing."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from taprobe_core.pipeline import Plan, cells_of, open_plan, run_stage, stages_of
from taprobe_core.store import Manifest, Store

CHILD = Path(__file__).with_name("run_steps.py")
# A shell may have started the tests in the background, where the signal is ignored.
COMMAND = (
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "from taprobe_dagster.cli import main; main()"
)

SMALLEST = """
name: smallest
rollouts:
  source: {kind: policy, n_problems: 4, n_rollouts: 4}
models:
  tiny:
    rollouts_dir: tiny
    checkpoint: {kind: stand_in, architecture: llama, n_layers: 2, d_model: 16}
    n_layers: 2
    dtype: float32
settings: [correct_base_solution]
labels: {percentile: 70}
probes:
  recipes:
    - {name: position_baseline, features: [position]}
    - {name: text_only_baseline, features: [text]}
    - {name: linear_probe, features: [activations]}
splits: {protocols: [lopo]}
evaluation: {n_bootstrap: 10}
"""

CAMPAIGN = """
name: campaign
rollouts:
  source: {kind: policy, n_problems: 4, n_rollouts: 4}
models:
  tiny:
    rollouts_dir: tiny
    checkpoint: {kind: stand_in, architecture: llama, n_layers: 2, d_model: 16}
    n_layers: 2
    dtype: float32
    layers: [1]
settings: [correct_base_solution]
labels: {percentile: 70, drop_last_sentence: false}
attention: {mode: light}
probes:
  keep: scores
  recipes:
    - {name: position_baseline, features: [position]}
    - {name: text_only_baseline, features: [text]}
    - {name: linear_probe, features: [activations]}
    - {name: mlp_probe, features: [activations], estimator: mlp, hidden: [4], max_iter: 5}
    - {name: vertical_attention_plus_position, features: [vertical_attention, position]}
splits: {protocols: [lopo]}
evaluation: {n_bootstrap: 10, n_null: 0}
sweep:
  targets: [anchor_binary, importance_abs]
  percentiles: [70]
  drop_last_sentence: [true]
  poolings: [mean]
  residualize: [none, position]
  tuning: {regularization: [0.1, 1.0], hidden: [[4], [8]], early_stopping: [false]}
  shortlists: {to_stage2: 2, to_stage3: 2}
  stability_draws: 5
"""

KILLED_AT = [(1, "in"), (2, "after"), (3, "in"), (1, "in"), (4, "after"), (3, "in"), (5, "in")]
"""The n-th artifact of each attempt, and the moment; the attempts after these go by chance."""


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("study") / "smallest.yaml"
    path.write_text(SMALLEST)
    return path


def environment(**more: str) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"} | more


class Forks:
    """The process that runs studies in forks."""

    def __init__(self, study: Path, log: Path) -> None:
        self.study, self.log = study, log
        self.process = subprocess.Popen(
            [sys.executable, str(CHILD)],
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def run(self, data: Path, kill: tuple[int, str] | None = None) -> int:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        order = {"study": str(self.study), "data": str(data), "log": str(self.log), "kill": kill}
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def begun(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []


@pytest.fixture
def forks(study: Path, tmp_path: Path) -> Iterator[Forks]:
    made = Forks(study, tmp_path / "log")
    yield made
    made.process.kill()
    made.process.communicate()


def manifests(data: Path) -> dict[str, Manifest]:
    """Manifests of all artifacts, each of which must be sound."""
    store = Store(data / "artifacts")
    assert [verdict for verdict in store.verify() if not verdict.is_sound] == []
    return {str(key): store.inspect(key).manifest for key in store.keys(None)}


@pytest.mark.slow
def test_killed_at_many_points_nothing_finished_is_lost_or_redone(
    forks: Forks, tmp_path: Path
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert forks.run(whole) == 0
    undisturbed = manifests(whole)
    assert len(forks.begun()) == len(undisturbed)
    forks.log.unlink()

    chance = random.Random(20)
    n_redone = 0
    kept: dict[str, Manifest] = {}
    for kill in [*KILLED_AT, *((chance.randint(1, 3), "in") for _ in range(2))]:
        assert forks.run(killed, kill) == -signal.SIGKILL, kill
        found = manifests(killed)
        assert kept.items() <= found.items()
        # Killed in the middle of its writing, an artifact does not show at all.
        n_cut = len(forks.begun()) - n_redone - len(found)
        assert n_cut == int(kill[1] == "in")
        n_redone += n_cut
        kept = found
    assert forks.run(killed) == 0

    found = manifests(killed)
    assert kept.items() <= found.items()
    assert len(forks.begun()) == len(undisturbed) + n_redone
    assert list(killed.rglob(".tmp-*")) == []
    assert found.keys() == undisturbed.keys()
    assert {
        key
        for key in found
        if {name: each.sha256 for name, each in found[key].files.items()}
        != {name: each.sha256 for name, each in undisturbed[key].files.items()}
    } == set()
    n_before = len(forks.begun())
    assert forks.run(killed) == 0
    assert len(forks.begun()) == n_before


def start(study: Path, folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", COMMAND, "run", str(study)],
        env=environment(TAPROBE_DATA=str(folder / "data"), DAGSTER_HOME=str(folder / "dagster")),
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def stop(child: subprocess.Popen[str], data: Path, n: int, delay_s: float, how: int) -> None:
    """Send a signal some time after the store has n artifacts."""
    deadline = time.monotonic() + 90
    while len(list((data / "artifacts").rglob("manifest.json"))) < n:
        assert child.poll() is None, child.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(delay_s)
    child.send_signal(how)


@pytest.mark.slow
def test_the_command_killed_and_interrupted_through_dagster_then_finishes(
    study: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    chance = random.Random(3)
    kept: dict[str, Any] = {}
    errors = []
    for n, how, code in ((3, signal.SIGKILL, -signal.SIGKILL), (7, signal.SIGINT, 130)):
        child = start(study, tmp_path)
        stop(child, data, n, chance.uniform(0, 0.2), how)
        errors.append(child.communicate(timeout=60)[1])
        assert child.returncode == code, errors[-1]
        found = manifests(data)
        assert kept.items() <= found.items()
        kept = found

    child = start(study, tmp_path)
    out, last = child.communicate(timeout=90)
    assert child.returncode == 0, last
    assert "report: " in out
    assert "1 run(s) whose process is gone" in errors[1]
    assert "everything finished is kept" in errors[1]
    assert "Traceback" not in errors[1] + last
    found = manifests(data)
    assert kept.items() <= found.items()
    assert list(data.rglob(".tmp-*")) == []
    plan = open_plan(study, data)
    n_cells = sum(len(cells_of(plan.study, stage)) for stage in stages_of(plan.study))
    assert f"{n_cells} artifacts: " in last


def board(plan: Plan) -> pl.DataFrame:
    return plan.read("sweep_leaderboard", (), "leaderboard")


@pytest.mark.slow
def test_a_campaign_killed_twice_ends_as_an_undisturbed_one(tmp_path: Path) -> None:
    study = tmp_path / "campaign.yaml"
    study.write_text(CAMPAIGN)
    disturbed, calm = tmp_path / "disturbed", tmp_path / "calm"
    disturbed.mkdir()
    undisturbed = open_plan(study, calm / "data")
    for stage in stages_of(undisturbed.study):
        list(run_stage(undisturbed, stage, cells_of(undisturbed.study, stage)))
    n_all = len(manifests(calm / "data"))

    kept: dict[str, object] = {}
    for share in (0.5, 0.8):
        child = start(study, disturbed)
        stop(child, disturbed / "data", int(n_all * share), 0.05, signal.SIGKILL)
        child.communicate(timeout=60)
        assert child.returncode == -signal.SIGKILL
        found = manifests(disturbed / "data")
        assert kept.items() <= found.items()
        kept = dict(found)
    assert len(kept) < n_all
    child = start(study, disturbed)
    out, error = child.communicate(timeout=120)
    assert child.returncode == 0, error
    assert "report: " in out

    boards = [board(plan) for plan in (undisturbed, open_plan(study, disturbed / "data"))]
    assert boards[0].equals(boards[1])
    assert set(boards[0]["stage"]) == {"stage1", "stage2", "stage3"}
    assert boards[0]["rank"].is_not_null().any()
    assert manifests(calm / "data").keys() == manifests(disturbed / "data").keys()
