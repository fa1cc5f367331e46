"""Who changes what a stage computes raises its code version, or says that results are the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tools import code_versions


def test_no_stage_changed_without_its_code_version_or_a_line() -> None:
    record = json.loads(code_versions.RECORD.read_text())
    unexplained = code_versions.unexplained(record, code_versions.today())
    assert unexplained == [], "see `python -m tools.code_versions --help`"


def test_a_change_concerns_the_stages_that_import_the_module_until_they_raise_their_version() -> (
    None
):
    now = code_versions.today()
    module = "taprobe_core.deferral.plans"
    record = {**now, "modules": {**now["modules"], module: "another digest"}}  # type: ignore[dict-item]
    lines = code_versions.unexplained(record, now)  # type: ignore[arg-type]
    assert [line.split(" ")[0] for line in lines] == ["deferral_plans"]
    assert module in lines[0]
    raised = {**now, "code_versions": {**now["code_versions"], "deferral_plans": "2"}}  # type: ignore[dict-item]
    record["code_versions"] = {**raised["code_versions"], "deferral_plans": "1"}
    assert code_versions.unexplained(record, raised) == []  # type: ignore[arg-type]


def test_a_stage_s_modules_are_those_that_decide_its_result() -> None:
    modules = code_versions.stage_modules("labels")
    assert "taprobe_core.labels.make" in modules
    assert not any(each.startswith("taprobe_core.store") for each in modules)
    assert "taprobe_core.solvers.linear.ridge" in code_versions.stage_modules("probe_fits")
    assert "taprobe_core.solvers.linear.ridge" not in code_versions.stage_modules("deferral_plans")
    assert "taprobe_core.sweep.boards" in code_versions.stage_modules("sweep_leaderboard")


def test_docstrings_and_comments_are_no_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(code_versions, "ROOT", tmp_path)
    path = tmp_path / "module.py"
    digests = []
    for text in ('"""One."""\nx = 1\n', '"""Two."""\n\nx = 1  # why\n', '"""Two."""\nx = 2\n'):
        path.write_text(text)
        digests.append(code_versions.digest("module"))
    assert digests[0] == digests[1] != digests[2]
