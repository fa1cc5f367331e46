"""What the command line prints commands no terminal."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.logging import RichHandler
from rich.markup import escape
from rich.table import Table

from taprobe_core.cli.app import print_frame
from taprobe_core.cli.console import VisibleConsole, print_defect
from taprobe_core.errors import ConfigError, SchemaError, TaprobeError, visible

Command = Callable[..., Any]
ESC = "\x1b]0;owned\x07\x1b[2J"
HOSTILE = ["\x1b[31m", "\x9b31m", "\x1b]8;;http://x\x1b\\", "a\rb", "a\x08b", "\x7f", "\x00"]
HOSTILE += ["\u202eabc", "\u2066x\u2069", "\u200f", "\u061c", "\u2028", "\x85", "\udcff"]


def obeyed(text: str) -> list[str]:
    """The characters of a text that a terminal would not just show."""
    allowed = {"\n", "\t", "\u200c", "\u200d"}
    return [each for each in text if not (each.isprintable() or each in allowed)]


@pytest.mark.parametrize("text", HOSTILE)
def test_control_characters_and_marks_of_direction_are_shown(text: str) -> None:
    assert obeyed(visible(text)) == []
    assert visible(text) != text
    assert visible(visible(text)) == visible(text)
    error = ConfigError(f"found {text}", text, f"write {text}")
    assert obeyed(str(error)) == obeyed(error.args[0]) == []
    assert obeyed(str(SchemaError("two faults", text, None, [text]))) == []
    # What a program reads of it stays as it is.
    assert (error.what, error.where) == (f"found {text}", text)


@given(st.text(st.characters(exclude_categories=["Cc", "Cf", "Cs", "Zl", "Zp"])))
def test_texts_of_all_scripts_stay(text: str) -> None:
    assert visible(text + "\n\t") == text + "\n\t"


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("is_terminal", [False, True])
def test_a_console_shows_whatever_it_prints(text: str, is_terminal: bool) -> None:
    file = io.StringIO()
    console = VisibleConsole(
        file=file, force_terminal=is_terminal, color_system=None, width=200, soft_wrap=True
    )
    table = Table(title=text)
    table.add_column(escape(text))
    table.add_row(escape(text))
    console.print(escape(text), text, table, markup=False)
    console.print(f"[bold]{escape(text)}[/]")
    console.print_json(json.dumps({"a": text}))
    logger = logging.Logger("of-this-test")
    logger.addHandler(RichHandler(console=console, show_path=False))
    logger.warning("a text: %s", text)
    said = file.getvalue()
    assert obeyed(said.replace("\x1b[1m", "").replace("\x1b[0m", "")) == []
    assert visible(text) in said


def test_colours_of_its_own_stay() -> None:
    file = io.StringIO()
    console = VisibleConsole(
        file=file, force_terminal=True, color_system="standard", highlight=False
    )
    console.print("[red]unsound[/] \x1b[32m")
    assert file.getvalue() == "\x1b[31munsound\x1b[0m \\u001b[32m\n"


def test_json_stays_json(capsys: pytest.CaptureFixture[str]) -> None:
    row = {"a": "\x1b[1m\u202e\x9b\x7f\n"}
    print_frame(pl.DataFrame([row]), "", as_json=True)
    said = capsys.readouterr().out
    assert obeyed(said) == []
    assert json.loads(said) == [row]


STUDY = """
name: small
rollouts:
  source: {kind: policy, n_problems: 6, n_rollouts: 12}
models:
  tiny:
    rollouts_dir: tiny
    checkpoint: {kind: stand_in, architecture: qwen2, n_layers: 2, d_model: 16}
    n_layers: 2
settings: [good]
seeds: [0]
"""


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("seeds: [0]", 'seeds: [0]\n"ESC": 1'),
        ("  tiny:", '  "tiny ESC":'),
        ("    n_layers: 2", '    "n_layers ESC": 2'),
        ("settings: [good]", 'settings: ["ESC"]'),
        ("name: small", 'name: "ESC"'),
        ("    n_layers: 2", '    n_layers: 2\n    tokenizer: "/no/ESC"'),
        ("rollouts_dir: tiny", 'rollouts_dir: "ESC"'),
        ("kind: policy, n_problems: 6, n_rollouts: 12", 'kind: mirror, folder: "/no/ESC"'),
        (
            "kind: stand_in, architecture: qwen2, n_layers: 2, d_model: 16",
            'kind: pretrained, path: "/no/ESC"',
        ),
        ("seeds: [0]", 'seeds: ["ESC"]'),
        ("seeds: [0]", "seeds: [0]\nx: &a !ESC 1"),
    ],
)
def test_no_message_about_a_study_commands_the_terminal(
    taprobe: Command, tmp_path: Path, old: str, new: str
) -> None:
    quoted = "\\x1b]0;owned\\x07\\x1b[2J\\u202e" if '"' in new else ESC
    study = tmp_path / "s.yaml"
    study.write_text(STUDY.replace(old, new.replace("ESC", quoted)))
    for words in (("check", "--no-measure"), ("lineage", "spans", "x", "--study"), ("report",)):
        said = taprobe(*words, study)
        assert obeyed(said.out + said.err) == []
        assert "Traceback" not in said.err
    assert said.code == 2


@pytest.mark.parametrize(
    "words",
    [
        ("check", f"gone-{ESC}.yaml"),
        ("run", "demo", "--site", ESC),
        ("run", "demo", "--select", ESC),
        ("lineage", ESC),
        (ESC,),
        ("check", f"--{ESC}"),
        ("prune", "--keep", ESC),
        ("check", "a\udcff.yaml"),
        ("ui", "--token", ESC),
    ],
)
def test_no_argument_comes_back_as_a_command(taprobe: Command, words: tuple[str, ...]) -> None:
    said = taprobe(*words)
    assert said.code == 2
    assert obeyed(said.out + said.err) == []
    assert said.err.count("error: ") == said.err.count("Fix: ") == 1


def test_a_data_folder_of_a_hostile_name_is_shown(
    built: Any, taprobe: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TAPROBE_DATA", str(tmp_path / f"a{ESC.replace('/', '')}"))
    for words in (("check", built.study, "--no-measure"), ("report", built.study)):
        said = taprobe(*words)
        assert obeyed(said.out + said.err) == []
        assert "\\u001b]0;owned" in said.out + said.err


def test_a_defect_is_shown_with_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        raise ZeroDivisionError(ESC)
    print_defect(caught.type, caught.value, caught.tb)
    said = capsys.readouterr().err
    assert "Traceback" in said
    assert obeyed(said) == []


def test_an_error_within_an_error_is_shown() -> None:
    with pytest.raises(TaprobeError) as caught:
        raise TaprobeError(str(ConfigError(ESC, ESC)), ESC)
    assert obeyed(str(caught.value)) == []
