"""The dirty copy of the demo: all of its damage is found, nothing else is, the loader reads on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple, get_args

import pytest

from taprobe_core.demo import DemoWorld, write_policy_world
from taprobe_core.demo.writer import Damage, write_dirty_copy
from taprobe_core.errors import DataError
from taprobe_core.labels import trigram_masked_dissimilar
from taprobe_core.labels.audit import Kind, RolloutAudit, audit_rollouts
from taprobe_core.rollouts import FILE_NAMES, FolderRollouts, RolloutTables, read_rollouts
from taprobe_core.study import PolicySource
from taprobe_core.study.config import MirrorSource, Model, Rollouts, StandInCheckpoint

SAMPLING = "temperature_1.0_top_p_1.0"
SETTINGS = ["correct_base_solution", "incorrect_base_solution"]
MODEL = "tiny"

SAYS = {
    "gap": ("no rollouts in chunk_",),
    "missing_block": ("no rollouts in chunk_", "although labels exist"),
    "error_rows": ("4 of 10 rows failed",),
    "ungraded_rows": ("4 of 10 rows have null",),
    "empty_answers": ("4 of 10 rows gave no answer",),
    "corrupted_prefix": ("10 of 10 rows continue a prefix without any '",),
    "label_mismatch": ("accuracy of", "counterfactual_importance_accuracy of"),
}


class Copies(NamedTuple):
    clean: Path
    dirty: Path
    damages: list[Damage]


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory) -> Copies:
    folder = tmp_path_factory.mktemp("copies")
    source = PolicySource(kind="policy", n_problems=12, n_rollouts=10)
    write_policy_world(folder / "world", source, [MODEL], SAMPLING, SETTINGS)
    clean = DemoWorld.at(folder / "world").rollouts_folder
    return Copies(clean, folder / "dirty", write_dirty_copy(clean, folder / "dirty"))


def options(folder: Path, **changes: Any) -> Rollouts:
    source = MirrorSource(kind="mirror", folder=str(folder))
    return Rollouts(source=source, sampling=SAMPLING, **changes)


def audit(folder: Path, **changes: Any) -> RolloutAudit:
    chosen = options(folder, **changes)
    source = FolderRollouts(folder)
    return audit_rollouts(source, chosen, [MODEL], SETTINGS, trigram_masked_dissimilar)


def read(folder: Path, setting: str, **changes: Any) -> RolloutTables:
    checkpoint = StandInCheckpoint(kind="stand_in", architecture="llama")
    model = Model(rollouts_dir=MODEL, checkpoint=checkpoint, n_layers=4)
    return read_rollouts(FolderRollouts(folder), model, options(folder, **changes), setting)


def test_the_clean_folder_has_no_finding(copies: Copies) -> None:
    findings, coverage = audit(copies.clean)
    assert findings.to_dicts() == []
    assert coverage["n_problems"].to_list() == coverage["n_readable"].to_list() == [12, 12]
    assert coverage["n_banks"].to_list() == coverage["n_sentences"].to_list()
    assert coverage["n_rollouts"].sum() == 10 * coverage["n_banks"].sum()
    assert coverage["n_repeated"].min() > 0  # a repeated text alone is no damage


def test_every_damage_is_found_and_nothing_else(copies: Copies) -> None:
    stated = json.loads((copies.dirty / "damage.json").read_text())["damages"]
    names = ("kind", "problem_id", "setting", "model", "file", "n")
    found = audit(copies.dirty).findings
    assert len(found) == len(stated) == 11
    assert {tuple(row[name] for name in names) for row in found.to_dicts()} == {
        tuple(row[name] for name in names) for row in stated
    }
    for row in found.to_dicts():
        for part in SAYS.get(row["kind"], ()):
            assert part in row["detail"]


def test_an_unreadable_file_is_found_in_the_loader_s_words(copies: Copies) -> None:
    reasons = audit(copies.dirty).findings.filter(kind="unreadable")
    assert sorted(Path(file).name for file in reasons["file"]) == sorted(
        [*FILE_NAMES, "solutions.json"]
    )
    for setting in SETTINGS:
        for row in read(copies.dirty, setting).skipped.iter_rows(named=True):
            (reason,) = reasons.filter(problem_id=row["problem_id"])["detail"]
            assert reason.startswith(row["what"])


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_loader_skips_what_it_cannot_read_and_reads_the_rest(
    copies: Copies, setting: str
) -> None:
    broken = {
        damage.problem_id: Path(damage.file).name
        for damage in copies.damages
        if damage.setting == setting and Path(damage.file).name in FILE_NAMES
        if damage.kind == "unreadable"
    }
    assert broken
    tables, sound = read(copies.dirty, setting), read(copies.clean, setting)

    assert dict(tables.skipped.select("problem_id", "stage").iter_rows()) == dict.fromkeys(
        broken, "rollouts"
    )
    for row in tables.skipped.iter_rows(named=True):
        assert f"problem_{row['problem_id']}" in row["where"]
        assert broken[row["problem_id"]] in row["where"] + row["what"]
        assert row["fix"]

    wanted = set(sound.problems["problem_id"]) - set(broken)
    assert set(tables.problems["problem_id"]) == wanted
    texts = ("problem_id", "sentence_idx", "sentence")
    kept = sound.sentences.filter(~sound.sentences["problem_id"].is_in(list(broken)))
    assert tables.sentences.select(texts).equals(kept.select(texts))


def test_a_study_that_wants_no_gaps_fails_on_the_first_unreadable_problem(copies: Copies) -> None:
    with pytest.raises(DataError, match="problem_"):
        read(copies.dirty, SETTINGS[0], on_bad_problem="fail")


def test_leaving_out_the_damaged_problems_leaves_nothing_to_find(copies: Copies) -> None:
    damaged = {damage.problem_id for damage in copies.damages}
    everything = {int(path.name[8:]) for path in copies.clean.glob("*/*/*/problem_*")}
    left = audit(copies.dirty, problem_ids=tuple(sorted(everything - damaged)))
    assert left.findings.is_empty()
    assert left.coverage["n_problems"].to_list() == [len(everything - damaged)] * 2


def test_the_page_on_bad_data_shows_what_is_found(copies: Copies) -> None:
    page = (Path(__file__).parents[2] / "docs" / "bad-data.md").read_text(encoding="utf-8")
    chosen = options(copies.dirty)
    found = audit_rollouts(FolderRollouts(copies.dirty), chosen, [MODEL], SETTINGS).findings
    shown = [f"{row['kind']} {row['file']}\n  {row['detail']}\n" for row in found.to_dicts()]
    assert [block for block in shown if block not in page] == []
    headings = "".join(line for line in page.splitlines() if line.startswith("## "))
    assert [kind for kind in get_args(Kind) if kind not in headings] == []


def test_real_labels_without_rollouts_are_sound(real_rollouts: Path) -> None:
    models = sorted(path.name for path in real_rollouts.iterdir())
    chosen = Rollouts(source=MirrorSource(kind="mirror", folder=str(real_rollouts)))
    findings, coverage = audit_rollouts(FolderRollouts(real_rollouts), chosen, models, SETTINGS)
    assert findings.is_empty()
    assert coverage["n_readable"].to_list() == coverage["n_problems"].to_list()
    assert coverage["n_banks"].sum() == 0
    # A generator that deletes by text would have corrupted this share of the prefixes.
    share = coverage["n_repeated"].sum() / coverage["n_sentences"].sum()
    assert 0.02 < share < 0.1
