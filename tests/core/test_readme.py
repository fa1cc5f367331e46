"""The README keeps its promises: its example runs, its files exist, it stays short."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = Path(__file__).resolve().parents[2] / "README.md"


def test_the_library_example_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    shipped = (README.parent / "studies" / "demo.yaml").read_text()
    small = shipped.replace(
        "    kind: demo\n  sampling",
        "    kind: demo\n    n_problems: 6\n    n_rollouts: 10\n  sampling",
    )
    assert small != shipped
    (tmp_path / "demo.yaml").write_text(small)
    monkeypatch.setenv("TAPROBE_STUDY", str(tmp_path / "demo.yaml"))
    monkeypatch.setenv("TAPROBE_DATA", str(tmp_path / "data"))
    exec(compile(code, str(README), "exec"), {})  # noqa: S102
    printed = capsys.readouterr().out
    assert "linear_probe" in printed
    assert "pr_auc" in printed


def test_every_linked_file_exists() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", README.read_text())
    assert links
    assert [link for link in links if not (README.parent / link).exists()] == []


def test_it_has_at_most_120_lines() -> None:
    assert len(README.read_text().splitlines()) <= 120
