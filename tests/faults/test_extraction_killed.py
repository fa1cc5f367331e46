"""Extraction of real rollouts killed with SIGKILL, whenever: it resumes, redoing one problem."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from taprobe_core.pipeline import cells_of, open_plan, run_stage
from taprobe_core.store import Manifest, Store

CHILD = Path(__file__).with_name("extraction_steps.py")
N_KILLS = 10
N_TEXTS = 24
N_LAYERS = 3

STUDY = """
name: killed
rollouts:
  source: {{kind: mirror, folder: {rollouts}}}
models:
  llama:
    rollouts_dir: deepseek-r1-distill-llama-8b
    checkpoint: {{kind: stand_in, architecture: llama, n_layers: 3, d_model: 32}}
    n_layers: 3
    tokenizer: {tokenizers}/deepseek-r1-distill-llama-8b
    dtype: float32
  qwen:
    rollouts_dir: deepseek-r1-distill-qwen-14b
    checkpoint: {{kind: stand_in, architecture: qwen2, n_layers: 3, d_model: 32}}
    n_layers: 3
    tokenizer: {tokenizers}/deepseek-r1-distill-qwen-14b
    dtype: float32
settings: [correct_base_solution, incorrect_base_solution]
"""


class Forks:
    """The process that extracts in forks."""

    def __init__(self, study: Path) -> None:
        self.server = subprocess.Popen(
            [sys.executable, str(CHILD), str(study)],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def start(self, data: Path, log: Path) -> int:
        """Start a fork and return its process id."""
        assert self.server.stdin is not None
        order = {"data": str(data), "log": str(log)}
        self.server.stdin.write(json.dumps(order) + "\n")
        self.server.stdin.flush()
        return self.hear()

    def hear(self) -> int:
        assert self.server.stdout is not None
        return int(self.server.stdout.readline())


@pytest.fixture
def forks(real_rollouts: Path, real_tokenizers: Path, tmp_path: Path) -> Iterator[Forks]:
    study = tmp_path / "study.yaml"
    study.write_text(STUDY.format(rollouts=real_rollouts, tokenizers=real_tokenizers))
    made = Forks(study)
    yield made
    made.server.kill()
    made.server.communicate()


def begun(log: Path) -> list[str]:
    """Texts of the passes that began."""
    return log.read_text().splitlines() if log.exists() else []


def wait_for_a_pass(pid: int, log: Path) -> None:
    """Wait until a first pass began, or the fork has ended without any."""
    deadline = time.monotonic() + 60
    while not begun(log) and Path(f"/proc/{pid}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def sound(data: Path) -> dict[str, Manifest]:
    """Manifests of all artifacts, each of which must be sound."""
    store = Store(data / "artifacts")
    assert [verdict for verdict in store.verify() if not verdict.is_sound] == []
    return {str(key): store.inspect(key).manifest for key in store.keys(None)}


def hashes(found: dict[str, Manifest]) -> dict[str, dict[str, str]]:
    return {
        key: {name: record.sha256 for name, record in manifest.files.items()}
        for key, manifest in found.items()
    }


def extract_killed(forks: Forks, data: Path, delays: list[float]) -> list[list[str]]:
    """Extract, killed that long after each run's first pass began; return what each run began.

    A delay is taken off the list when a run was killed by it, and not when it had ended before.
    """
    runs: list[list[str]] = []
    kept: dict[str, Manifest] = {}
    while True:
        log = data.with_suffix(f".{len(runs)}")
        pid = forks.start(data, log)
        if delays:
            wait_for_a_pass(pid, log)
            time.sleep(delays[0])
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        code = forks.hear()
        runs.append(begun(log))
        found = sound(data)
        assert kept.items() <= found.items()
        kept = found
        if code == 0:
            return runs
        assert code == -signal.SIGKILL
        delays.pop(0)


@pytest.mark.slow
@pytest.mark.real_data
def test_killed_at_ten_random_times_it_resumes_and_redoes_at_most_one_problem(
    forks: Forks, tmp_path: Path
) -> None:
    whole, log = tmp_path / "whole", tmp_path / "log"
    wait_for_a_pass(forks.start(whole, log), log)
    start = time.monotonic()
    assert forks.hear() == 0
    extraction_s = time.monotonic() - start
    assert len(set(begun(log))) == len(begun(log)) == N_TEXTS
    undisturbed = sound(whole)
    shards = [each for each in undisturbed.values() if each.stage == "activation_shards"]
    assert len(shards) == N_TEXTS
    for stage in ("activations", "activation_shards"):
        shutil.rmtree(whole / "artifacts" / stage)

    chance = random.Random(6)
    delays = [chance.uniform(0, 1.5 * extraction_s / N_KILLS) for _ in range(N_KILLS)]
    while delays:
        # A run that is done before its time leaves the kills that remain to another.
        killed = Path(shutil.copytree(whole, tmp_path / f"killed{len(delays)}"))
        runs = extract_killed(forks, killed, delays)
        for n, texts in enumerate(runs, 1):
            later = {text for run in runs[n:] for text in run}
            # Nothing but the text that was in hand: what ended before it is committed.
            assert later.intersection(texts) <= set(texts[-1:])
        assert {text for run in runs for text in run} == set(begun(log))
        assert hashes(sound(killed)) == hashes(undisturbed)
        assert list(killed.rglob(".tmp-*")) == []


def test_killed_between_the_name_and_the_pointer_a_rerun_sets_the_pointer(
    built: Any, copied: Path
) -> None:
    store = Store(copied / "artifacts")
    key = next(store.keys("activation_shards"))
    partition = store.open(key).path.parent
    (partition / "CURRENT").rename(partition / ".tmp-CURRENT-1-00000000")
    plan = open_plan(built.study, copied)
    outcomes = list(run_stage(plan, "activations", cells_of(plan.study, "activations")))
    assert all(outcome.is_reused for _, outcome in outcomes)
    assert store.current(key.stage, key.partition) == key
    assert list(copied.rglob(".tmp-*")) == []
