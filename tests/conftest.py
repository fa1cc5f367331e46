"""Fixtures shared by all tests: a small study, built once, and the optional real files."""

from __future__ import annotations

import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

if TYPE_CHECKING:
    from taprobe_core.pipeline import Cell, Outcome

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"

SMALL = """
name: small
rollouts:
  source: {kind: policy, n_problems: 6, n_rollouts: 12}
models:
  tiny:
    rollouts_dir: tiny
    checkpoint: {kind: stand_in, architecture: qwen2, n_layers: 2, d_model: 16}
    n_layers: 2
    dtype: float32
  other:
    rollouts_dir: other
    checkpoint: {kind: stand_in, architecture: llama, n_layers: 3, d_model: 16}
    n_layers: 3
    dtype: float32
    layers: [0, 2]
settings: [correct_base_solution, incorrect_base_solution]
seeds: [0, 1]
probes:
  recipes:
    - {name: position_baseline, features: [position]}
    - {name: text_only_baseline, features: [text]}
    - {name: linear_probe, features: [activations]}
splits: {protocols: [lopo]}
evaluation: {n_bootstrap: 50}
"""


def _folder(variable: str, default: Path) -> Path:
    folder = Path(os.environ.get(variable, default))
    if not folder.is_dir():
        pytest.skip(f"{variable} is not set and there is no such folder beside the checkout")
    return folder.resolve()


@pytest.fixture(scope="session", autouse=True)
def encode_png() -> Iterator[Callable[..., bytes]]:
    """Let stages store one dot for every figure: drawing is a fifth of a small study's time.

    Returns what draws them, for the tests of figures.
    """
    from taprobe_core.report import canvas, plots

    drawn = canvas.encode_png
    dot = drawn(canvas.Figure(figsize=(0.01, 0.01)))
    with pytest.MonkeyPatch.context() as patch:
        for module in (canvas, plots):
            patch.setattr(module, "encode_png", lambda _figure: dot)
        yield drawn


@pytest.fixture(scope="session", autouse=True)
def each_world_is_written_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Copy a policy's world where a test of this process has written the same one before."""
    from taprobe_core.pipeline import demo_data

    written = tmp_path_factory.mktemp("worlds")
    draw = demo_data.write_policy_world

    def copy(folder: Path, *of: Any) -> None:
        kept = written / sha256(repr(of).encode()).hexdigest()
        if not kept.exists():
            draw(kept, *of)
        shutil.copytree(kept, folder, dirs_exist_ok=True)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo_data, "write_policy_world", copy)
        yield


@pytest.fixture(scope="session")
def real_rollouts() -> Path:
    """A mirror folder of the published dataset's layout."""
    return _folder("TAPROBE_ROLLOUTS", SHARED / "math-rollouts")


@pytest.fixture(scope="session")
def real_tokenizers() -> Path:
    """A folder of fast tokenizers, one sub-folder per model of the real rollouts."""
    return _folder("TAPROBE_TOKENIZERS", SHARED / "tokenizers")


@pytest.fixture(scope="session")
def small_text() -> str:
    """A study of two tiny models, two settings and two seeds on the demo world, as YAML."""
    return SMALL


@dataclass(frozen=True)
class Built:
    """A study that has run: its file, its data folder, and what each stage left behind."""

    study: Path
    data: Path
    outcomes: dict[str, list[tuple[Cell, Outcome]]] = field(default_factory=dict)


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The small study with its first model alone, run without Dagster; read it, do not change it.

    Every stage runs once here; imports are local because few tests pay for torch.
    """
    from taprobe_core.pipeline import cells_of, open_plan, run_stage, stages_of

    values = yaml.safe_load(SMALL)
    del values["models"]["other"]
    folder = tmp_path_factory.mktemp("built")
    made = Built(folder / "one_model.yaml", folder / "data")
    made.study.write_text(yaml.safe_dump(values))
    plan = open_plan(made.study, made.data)
    for stage in stages_of(plan.study):
        made.outcomes[stage] = list(run_stage(plan, stage, cells_of(plan.study, stage)))
    return made


@pytest.fixture
def copied(built: Built, tmp_path: Path) -> Path:
    """A data folder with everything that `built` holds, free to be damaged."""
    return Path(shutil.copytree(built.data, tmp_path / "data"))


@dataclass(frozen=True)
class Said:
    """How a command ended."""

    code: int
    out: str
    err: str


@pytest.fixture
def taprobe(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Iterator[Callable[..., Said]]:
    """The `taprobe` command in this process, on `tmp_path / "data"`."""
    from taprobe_dagster.cli import main

    monkeypatch.setenv("TAPROBE_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path / "dagster"))
    monkeypatch.setenv("DAGSTER_DISABLE_TELEMETRY", "1")
    monkeypatch.delenv("TAPROBE_STUDY", raising=False)
    loggers = [logging.getLogger(name) for name in ("taprobe_core", "dagster")]
    before = [(each, each.level, each.propagate, list(each.handlers)) for each in loggers]

    def command(*words: object) -> Said:
        monkeypatch.setattr(sys, "argv", ["taprobe", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        return Said(int(ended.value.code or 0), said.out, said.err)

    yield command
    for logger, level, propagate, handlers in before:
        logger.setLevel(level)
        logger.propagate, logger.handlers = propagate, handlers


@dataclass(frozen=True)
class Mirror:
    """A study on a folder of rollouts, in one of whose settings a trace can stand twice."""

    study: Path
    data: Path
    folder: Path

    @property
    def _problems(self) -> tuple[Path, Path]:
        setting = next(self.folder.glob("tiny/*/correct_base_solution"))
        one, two = sorted(each for each in setting.iterdir() if each.is_dir())[1:3]
        return one, two

    def copy_trace(self) -> tuple[str, str]:
        """Let a problem hold another's rollouts; returns the ids of the two."""
        one, two = self._problems
        two.rename(self.folder / "kept")
        shutil.copytree(one, two)
        return one.name.removeprefix("problem_"), two.name.removeprefix("problem_")

    def mend(self) -> None:
        """Put the problem's own rollouts back."""
        two = self._problems[1]
        shutil.rmtree(two)
        (self.folder / "kept").rename(two)

    def accept(self) -> None:
        """Accept the change, as `taprobe check --accept` does."""
        from taprobe_core.pipeline import open_plan
        from taprobe_core.pipeline.input_faults import input_faults

        plan = open_plan(self.study, self.data)
        plan.pins.is_accepting = True
        assert input_faults(plan) == []

    def waive(self, *waived: tuple[str, str]) -> None:
        """Let the study go on in spite of failed checks: (check, cell) each."""
        values = yaml.safe_load(self.study.read_text())
        waivers = [
            {"check": check, "cell": cell, "reason": "both are <kept> on purpose"}
            for check, cell in waived
        ]
        self.study.write_text(yaml.safe_dump({**values, "waivers": waivers}))


@pytest.fixture
def mirror(built: Built, tmp_path: Path) -> Mirror:
    """The small study's first model on a copy of its rollouts, with nothing computed yet."""
    from taprobe_core.pipeline import open_plan

    world = open_plan(built.study, built.data).demo
    assert world is not None
    folder = Path(shutil.copytree(world.rollouts_folder, tmp_path / "rollouts"))
    values = yaml.safe_load(built.study.read_text())
    values["rollouts"] = {"source": {"kind": "mirror", "folder": str(folder)}}
    values["models"]["tiny"]["tokenizer"] = str(world.tokenizer_folder)
    values["seeds"] = [0]
    made = Mirror(tmp_path / "mirror.yaml", tmp_path / "data", folder)
    made.study.write_text(yaml.safe_dump(values))
    return made
