"""What a start loads: help, completion, a check and the definitions wait for no heavy library."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

HEAVY = {"torch", "transformers", "sklearn", "scipy", "matplotlib", "triton"}
TABLES = {"polars", "pandas", "pyarrow"}

START = """
import atexit, json, sys
from pathlib import Path

told = Path(sys.argv.pop(1))
sys.argv[0] = "taprobe"
atexit.register(
    lambda: told.write_text(json.dumps(sorted({name.split(".")[0] for name in sys.modules})))
)
"""
COMMAND = START + "from taprobe_dagster.cli import main\nmain()\n"
DEFINITIONS = START + "from taprobe_dagster.definitions import defs\nassert list(defs.assets)\n"

Loaded = Callable[..., tuple[set[str], str]]


@pytest.fixture
def loaded(tmp_path: Path) -> Loaded:
    """Run a program in a process of its own; return what it loaded, by package, and its output."""

    def run(program: str, *words: str, data: Path | None = None, **variables: str) -> Any:
        told = tmp_path / "told.json"
        done = subprocess.run(
            [sys.executable, "-c", program, str(told), *words],
            env={
                **{name: value for name, value in os.environ.items() if name != "TAPROBE_STUDY"},
                "PYTHONPATH": os.pathsep.join(sys.path),
                "TAPROBE_DATA": str(data or tmp_path / "data"),
                **variables,
            },
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return set(json.loads(told.read_text())), done.stdout

    return run


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--help",), "audit-rollouts"),
        (("--version",), "taprobe 0."),
        (("run", "--help"), "--select"),
        (("storage", "--help"), "--tokens-per-sentence"),
    ],
)
def test_help_and_version_load_no_library_of_the_work(
    loaded: Loaded, words: tuple[str, ...], said: str
) -> None:
    packages, out = loaded(COMMAND, *words)
    assert said in out
    assert packages & {*HEAVY, *TABLES, "dagster", "numpy"} == set()
    assert "typer" in packages


def test_completion_in_a_shell_loads_no_library_of_the_work(loaded: Loaded) -> None:
    packages, out = loaded(
        COMMAND, _TAPROBE_COMPLETE="complete_bash", COMP_WORDS="taprobe demo", COMP_CWORD="1"
    )
    assert out.split() == ["demo"]
    assert packages & {*HEAVY, *TABLES, "dagster"} == set()


@pytest.mark.parametrize("words", ["taprobe run --select sp", "taprobe lineage sp"])
def test_names_of_stages_are_completed(loaded: Loaded, words: str) -> None:
    packages, out = loaded(
        COMMAND,
        _TAPROBE_COMPLETE="complete_bash",
        COMP_WORDS=words,
        COMP_CWORD=str(words.count(" ")),
    )
    assert out.split() == ["spans"]
    assert packages & {*HEAVY, "dagster"} == set()


def test_a_check_of_the_demo_reads_texts_with_a_tokenizer_and_no_model(loaded: Loaded) -> None:
    packages, out = loaded(COMMAND, "check", "--no-measure")
    assert "is valid" in out
    assert packages & (HEAVY | {"dagster"}) == {"transformers"}  # of which only the tokenizer


def test_a_check_of_what_is_there_loads_nothing_that_computes(
    loaded: Loaded, built: Any, copied: Path
) -> None:
    packages, out = loaded(COMMAND, "check", str(built.study), "--no-measure", data=copied)
    assert "is valid" in out
    assert packages & (HEAVY | {"dagster"}) == set()


def test_definitions_load_dagster_and_nothing_that_computes(loaded: Loaded) -> None:
    packages, _ = loaded(DEFINITIONS)
    assert "dagster" in packages
    assert packages & HEAVY == set()
