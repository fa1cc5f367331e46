"""The verbs that need no Dagster, on a store that has everything and on one that is damaged."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from taprobe_core import pipeline
from taprobe_core.cli import EXIT_FIXABLE, EXIT_INTERRUPTED, EXIT_UNSOUND, guarded
from taprobe_core.pipeline import open_plan, stages_of
from taprobe_core.store import Artifact, ArtifactKey, write_json

# The package has an attribute of the module's name: the application itself.
CORRECT = "correct_base_solution"
Command = Callable[..., Any]


def flip_byte(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(bytes(raw))


def spans_of(built: Any, data: Path) -> Artifact:
    plan = open_plan(built.study, data)
    return plan.open("spans", ("tiny", CORRECT))


def is_one_message(text: str) -> bool:
    """One error with a fix, and nothing else of the kind."""
    return text.count("error: ") == 1 and text.count("Fix: ") == 1 and "Traceback" not in text


def test_check_says_what_a_run_would_do(built: Any, taprobe: Command, copied: Path) -> None:
    said = taprobe("check", built.study)
    assert said.code == 0
    assert f"study small is valid; data folder {copied}" in said.out
    for stage in stages_of(open_plan(built.study, copied).study):
        assert stage in said.out
    for stage in ("vertical_attention", "receiver_heads"):
        assert stage not in said.out
    assert "tiny: stand-in of random weights\nall 2 layers, 16 wide, float32 on " in said.out
    assert "FLOP/s measured\n" in said.out
    assert "under 1 s" in said.out
    assert "expected: of the passes alone, at " in said.out
    assert "~" not in said.out


def test_check_without_a_measurement_expects_no_time(built: Any, taprobe: Command) -> None:
    said = taprobe("check", built.study, "--no-measure")
    assert said.code == 0
    assert "expected" not in said.out
    assert "measured" not in said.out
    assert "~: assumed, 150 sentences a text and 22 tokens a sentence" in said.out
    assert "~19,800" in said.out


def test_check_for_a_script(built: Any, taprobe: Command, tmp_path: Path) -> None:
    found = json.loads(taprobe("check", built.study, "--json").out)
    assert found["study"] == "small"
    assert found["data_root"] == str(tmp_path / "data")
    stages = stages_of(open_plan(built.study, tmp_path).study)
    assert {row["stage"]: row["n_present"] for row in found["stages"]} == dict.fromkeys(stages, 0)
    assert [row["basis"] for row in found["forecast"]] == ["assumed", "assumed"]
    assert found["models"][0]["is_present"] is True
    assert found["speed"]["gemm_rates"]["tiny"] > 0
    assert all(row["expected_compute_s"] > 0 for row in found["forecast"])
    assert not (tmp_path / "data" / "artifacts").exists()


def test_check_where_hardly_anything_is_known(built: Any, taprobe: Command, tmp_path: Path) -> None:
    study = yaml.safe_load(built.study.read_text())
    study["models"]["tiny"] |= {
        "checkpoint": {"kind": "pretrained", "path": str(tmp_path / "gone")},
        "n_layers": 48,
        "layers": [3, 24],
    }
    study["models"]["wide"] = study["models"]["tiny"] | {"d_model": 128, "layers": [7]}
    file = tmp_path / "unknown.yaml"
    file.write_text(yaml.safe_dump(study))
    said = taprobe("check", file, "--no-measure")
    assert f"tiny: {tmp_path / 'gone'}, not here\n2 of 48 layers (to 24), float32 on" in said.out
    assert "layer 7 of 48, 128 wide, float32" in said.out
    assert "in all: not known without the checkpoints" in said.out
    assert "operations: of unknown blocks, 12 · width² weights" in said.out
    assert said.out.count("note: no such folder") == 1


def test_storage_takes_its_assumptions_from_the_command(built: Any, taprobe: Command) -> None:
    assumed = ("--sentences-per-problem", 10, "--tokens-per-sentence", 3)
    rows = json.loads(taprobe("storage", built.study, *assumed, "--json").out)
    assert [(row["n_sentences"], row["n_tokens"]) for row in rows] == [(60, 180)] * 2
    said = taprobe("storage", built.study, *assumed)
    assert said.out.startswith("storage forecast: mean\n")
    # 60 sentences, 2 layers of 16 values in float16; every token three times that.
    assert "~60  3.8 KiB  (12 KiB)  3.8 KiB" in said.out
    assert "in all: 7.5 KiB" in said.out
    assert "(tokens): the states of all tokens, not kept by this study" in said.out


def test_storage_of_all_that_can_be_kept(built: Any, taprobe: Command, tmp_path: Path) -> None:
    study = yaml.safe_load(built.study.read_text())
    study["activations"] = {"poolings": ["mean", "last", "tokens"]}
    study["attention"] = {"mode": "full"}
    file = tmp_path / "all.yaml"
    file.write_text(yaml.safe_dump(study))
    said = taprobe("storage", file)
    assert said.out.startswith("storage forecast: mean, last, tokens; attention, full\n")
    head = next(line for line in said.out.splitlines() if line.startswith("setting"))
    assert head.split()[1:] == ["sentences", "2", "poolings", "tokens", "attention", "in", "all"]
    assert "not kept" not in said.out


def test_verify_of_a_sound_store(built: Any, taprobe: Command, copied: Path) -> None:
    n = len(list(open_plan(built.study, copied).store.keys()))
    said = taprobe("verify", built.study)
    assert (said.code, said.out) == (0, f"{n} artifacts, {n} sound\n")
    assert json.loads(taprobe("verify", built.study, "--json").out) == {
        "n_artifacts": n,
        "unsound": [],
    }


def test_verify_names_a_flipped_byte_and_discards_that_artifact_alone(
    built: Any, taprobe: Command, copied: Path
) -> None:
    spans = spans_of(built, copied)
    before = set(open_plan(built.study, copied).store.keys())
    flip_byte(spans.path / "spans.parquet")

    said = taprobe("verify", built.study)
    assert said.code == EXIT_UNSOUND
    assert said.out.count("unsound") == 1
    assert str(spans.key) in said.out
    assert "spans.parquet" in said.out
    assert "Fix: " in said.out
    assert f"{len(before)} artifacts, {len(before) - 1} sound" in said.out
    (row,) = json.loads(taprobe("verify", built.study, "--json").out)["unsound"]
    assert row["artifact"] == str(spans.key)
    assert spans.path.exists()

    assert taprobe("verify", built.study, "--discard").code == EXIT_UNSOUND
    assert before - set(open_plan(built.study, copied).store.keys()) == {spans.key}
    # What was made from it lacks an input now, but is sound in itself and stays.
    said = taprobe("verify", built.study, "--discard")
    assert said.code == EXIT_UNSOUND
    assert "missing upstream" in said.out
    assert before - set(open_plan(built.study, copied).store.keys()) == {spans.key}


def test_lineage_reaches_the_rollouts(built: Any, taprobe: Command, copied: Path) -> None:
    plan = open_plan(built.study, copied)
    said = taprobe("lineage", "activations", "tiny@L01", CORRECT, "--study", built.study)
    lines = said.out.splitlines()
    assert said.code == 0
    assert lines[0].startswith(f"activations/tiny@L01/{CORRECT}/")
    assert any(
        line.strip().startswith(str(plan.key("rollouts", ("tiny", CORRECT)))) for line in lines
    )
    assert sum("activation_shards" in line for line in lines) == 6
    said = taprobe("lineage", "leaderboard", "--study", built.study)
    assert said.out.startswith("leaderboard/small/")


def test_du_counts_what_is_there(built: Any, taprobe: Command, copied: Path) -> None:
    rows = json.loads(taprobe("du", built.study, "--json").out)
    counts = {row["stage"]: row["n_artifacts"] for row in rows}
    assert counts["activation_shards"] == 2 * 6
    assert counts["leaderboard"] == 1
    n_bytes = sum(
        path.stat().st_size
        for path in (copied / "artifacts").rglob("*")
        if path.is_file() and path.name not in {".lock", ".lock.owner", "CURRENT"}
    )
    assert sum(row["size_bytes"] for row in rows) == n_bytes
    assert "disk use by stage" in taprobe("du", built.study).out


def test_prune_says_first_and_then_removes(built: Any, taprobe: Command, copied: Path) -> None:
    store = open_plan(built.study, copied).store
    old, newer = (ArtifactKey("study_report", ("small",), digit * 20) for digit in "01")
    for key in (old, newer):
        store.commit(key, lambda folder: write_json(folder / "v.json", 1), provenance={})
    store.adopt(open_plan(built.study, copied).key("study_report"))
    before = set(store.keys())

    said = taprobe("prune", built.study, "--keep", 1, "--dry-run")
    assert said.out == f"{old}\n1 artifacts would be removed\n"
    assert set(store.keys()) == before
    said = taprobe("prune", built.study, "--keep", 1)
    assert said.out == f"{old}\n1 artifacts removed\n"
    assert set(store.keys()) == before - {old}
    assert taprobe("prune", built.study).out == "0 artifacts removed\n"


def test_plan_shows_thresholds_and_the_runs_to_relabel(
    built: Any, taprobe: Command, copied: Path
) -> None:
    plan = open_plan(built.study, copied)
    cell = ("tiny@L01", f"{CORRECT}@s01")
    words = ("plan", *cell, "--study", built.study, "--protocol", "lopo")
    rows = json.loads(taprobe(*words, "--json").out)
    assert {row["recipe"] for row in rows} == {each.name for each in plan.study.probes.recipes}
    said = taprobe(*words, "--recipe", "linear_probe", "--json")
    runs = json.loads(said.out)
    decisions = plan.store.open(
        next(key for key in plan.store.keys("deferral_plans") if key.partition == cell)
    ).read_table("decisions.parquet")
    deferred = decisions.filter(recipe="linear_probe", protocol="lopo", decision="defer")
    assert sum(run["n_sentences"] for run in runs) == deferred.height
    assert (
        "sentences to relabel: linear_probe (lopo)"
        in taprobe(*words, "--recipe", "linear_probe").out
    )


def test_report_prints_where_the_page_is(built: Any, taprobe: Command, copied: Path) -> None:
    said = taprobe("report", built.study)
    page = Path(said.out.strip())
    assert said.code == 0
    assert page.is_relative_to(copied)
    assert page.read_text().startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("words", "found", "fix"),
    [
        (["check", "demoo"], "no such study in demoo", "did you mean `demo`?"),
        (["check", "."], "a folder, where a study file is expected", "name a study file"),
        (["lineage", "label"], "no stage 'label'", "use one of rollouts, labels"),
        (["lineage", "rollouts", "tiny"], "1 keys of a cell of rollouts", "give 2: model, setting"),
        (["lineage", "leaderboard", "x"], "1 keys of a cell", "one artifact per study"),
        (["lineage", "rollouts", "tiny", "wrong"], "no setting 'wrong'", CORRECT),
        (["lineage", "activations", "tiny@L07", CORRECT], "no site 'tiny@L07'", "tiny@L00"),
        (["plan", "tiny@L00", "s00"], "no trial 's00'", f"{CORRECT}@s00"),
        (["report"], "never built", "run the stage again"),
        (["plan", "tiny@L00", f"{CORRECT}@s00"], "never built", "run the stage again"),
    ],
)
def test_a_wrong_word_is_one_message_with_a_fix(
    built: Any,
    taprobe: Command,
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    found: str,
    fix: str,
) -> None:
    if words[0] != "check":
        monkeypatch.setenv("TAPROBE_STUDY", str(built.study))
    said = taprobe(*words)
    assert (said.code, said.out) == (EXIT_FIXABLE, "")
    assert is_one_message(said.err)
    assert found in said.err
    assert fix in said.err.split("Fix: ")[1]


def test_an_unknown_recipe_names_the_known_ones(built: Any, taprobe: Command, copied: Path) -> None:
    words = ("plan", "tiny@L00", f"{CORRECT}@s00", "--study", built.study, "--recipe", "linear")
    said = taprobe(*words, "--protocol", "lopo")
    assert said.code == EXIT_FIXABLE
    assert is_one_message(said.err)
    assert "no plan of recipe 'linear' under 'lopo'" in said.err
    assert "linear_probe" in said.err.split("Fix: ")[1]


@pytest.mark.parametrize("words", [["verify", "--nosuch"], ["nosuch"], ["prune", "--keep", "0"]])
def test_a_wrong_option_is_said_without_a_traceback(taprobe: Command, words: list[str]) -> None:
    said = taprobe(*words)
    assert said.code == EXIT_FIXABLE
    assert f"taprobe {words[0]} --help" in said.err or "No such command" in said.err
    assert "Traceback" not in said.err


def test_help_lists_every_verb_and_the_exit_codes(taprobe: Command) -> None:
    said = taprobe("--help")
    assert said.code == 0
    for word in ("check", "storage", "verify", "lineage", "du", "prune", "plan", "report", "run"):
        assert word in said.out
    assert "3 unsound" in " ".join(said.out.split())


def test_an_interruption_has_its_own_code(
    built: Any, taprobe: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "open_plan", interrupted)
    said = taprobe("du", built.study)
    assert said.code == EXIT_INTERRUPTED
    assert "everything finished is kept" in said.err


def test_a_defect_keeps_its_traceback() -> None:
    def defect() -> None:
        raise ZeroDivisionError("ours")

    with pytest.raises(ZeroDivisionError):
        guarded(defect)
    assert guarded(lambda: None) == 0


def test_markup_in_a_message_is_shown_as_it_is(taprobe: Command, tmp_path: Path) -> None:
    study = tmp_path / "[bold]x[/].yaml"
    said = taprobe("check", study)
    assert "[bold]x[/].yaml" in said.err
