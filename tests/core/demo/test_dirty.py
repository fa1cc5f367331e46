"""The dirty copy: what it writes, that it is the same each time, and that the clean one stays."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import pytest

from taprobe_core.demo import DemoWorld, write_policy_world
from taprobe_core.demo.writer import MANIFEST, Damage, write_dirty_copy
from taprobe_core.errors import ConfigError, NotEnoughDataError
from taprobe_core.labels import Rollout, published_measures, trigram_masked_dissimilar
from taprobe_core.labels.audit import Kind
from taprobe_core.study import PolicySource

SETTINGS = ["correct_base_solution", "incorrect_base_solution"]


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    source = PolicySource(kind="policy", n_problems=12, n_rollouts=10)
    write_policy_world(folder, source, ["tiny"], "temperature_1.0_top_p_1.0", SETTINGS)
    return DemoWorld.at(folder).rollouts_folder


@pytest.fixture(scope="module")
def dirty(clean: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dirty")
    write_dirty_copy(clean, folder)
    return folder


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def load(path: Path) -> Any:
    return json.loads(path.read_text(encoding="ascii"))


def damages(folder: Path) -> list[Damage]:
    return [Damage(**row) for row in load(folder / MANIFEST)["damages"]]


def one(folder: Path, kind: str) -> Damage:
    (found,) = [damage for damage in damages(folder) if damage.kind == kind]
    return found


def test_equal_arguments_give_equal_bytes_and_the_clean_folder_stays(
    clean: Path, dirty: Path, tmp_path: Path
) -> None:
    before = digests(clean)
    returned = write_dirty_copy(clean, tmp_path / "again")
    assert digests(tmp_path / "again") == digests(dirty)
    assert digests(clean) == before
    assert returned == damages(dirty)
    write_dirty_copy(clean, tmp_path / "other", seed=1)
    assert damages(tmp_path / "other") != returned


def test_the_manifest_has_every_kind_that_one_damage_can_be(dirty: Path) -> None:
    listed = damages(dirty)
    # No single damage of a file with rollouts breaks the identity alone, and a value that nothing
    # reads damages nothing.
    harmless = {"broken_identity", "unusable_values"}
    assert {damage.kind for damage in listed} == set(get_args(Kind)) - harmless
    assert len({damage.problem_id for damage in listed}) == len(listed) == 11
    assert load(dirty / MANIFEST)["seed"] == 0
    for damage in listed:
        assert damage.file.startswith(f"tiny/temperature_1.0_top_p_1.0/{damage.setting}/problem_")
        assert damage.done
        assert damage.n >= 1
        assert asdict(damage) in load(dirty / MANIFEST)["damages"]


def test_nothing_changes_but_what_the_manifest_lists(clean: Path, dirty: Path) -> None:
    before, after = digests(clean), digests(dirty)
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    changed.remove(MANIFEST)
    for damage in damages(dirty):
        place = damage.file[: damage.file.index("/problem_")] + f"/problem_{damage.problem_id}/"
        own = {name for name in changed if name.startswith(place)}
        assert own
        changed -= own
        if damage.kind in {"error_rows", "empty_answers", "ungraded_rows"}:
            assert own == {damage.file, place + "chunks_labeled.json"}
        elif damage.kind in {"gap", "missing_block"}:
            first = int(damage.file.rpartition("_")[2])
            folders = [f"{place}chunk_{index}/" for index in range(first, first + damage.n)]
            assert own == {name for name in before if name.startswith(tuple(folders))}
        else:
            assert own == {damage.file}
    assert changed == set()


def test_rows_are_damaged_as_the_published_ones(clean: Path, dirty: Path) -> None:
    rows = {
        damage.kind: (load(clean / damage.file), load(dirty / damage.file))
        for damage in damages(dirty)
        if damage.kind in {"error_rows", "empty_answers", "ungraded_rows"}
    }
    for was, now in rows.values():
        assert len(now) == len(was)
        assert sum(a != b for a, b in zip(was, now, strict=True)) == 4
    failed = [row for row in rows["error_rows"][1] if "error" in row]
    assert [set(row) for row in failed] == [{"chunk_removed", "prefix_without_chunk", "error"}] * 4
    empty = [row for row in rows["empty_answers"][1] if row["answer"] == ""]
    assert [("boxed" in row["rollout"], row["is_correct"]) for row in empty] == [(False, False)] * 4
    assert sum(row["is_correct"] is None for row in rows["ungraded_rows"][1]) == 4


def test_a_corrupted_prefix_lacks_every_copy(clean: Path, dirty: Path) -> None:
    damage = one(dirty, "corrupted_prefix")
    for was, now in zip(load(clean / damage.file), load(dirty / damage.file), strict=True):
        text = was["chunk_removed"]
        assert text in was["prefix_without_chunk"]
        assert text not in now["prefix_without_chunk"]
        assert now == was | {"prefix_without_chunk": now["prefix_without_chunk"]}


def test_older_labels_are_those_of_the_first_rollouts(dirty: Path) -> None:
    damage = one(dirty, "label_mismatch")
    rows = load(dirty / damage.file)
    place = (dirty / damage.file).parent
    banks = [
        [
            Rollout(row["answer"], row["is_correct"], row["chunk_resampled"])
            for row in load(place / f"chunk_{index}" / "solutions.json")[:6]
        ]
        for index in range(len(rows))
    ]
    texts = [row["chunk"] for row in rows]
    older = published_measures(texts, banks, trigram_masked_dissimilar)
    assert [{name: row[name] for name in older[0]} for row in rows] == older


def test_a_copy_goes_into_an_empty_folder_outside_the_clean_one(
    clean: Path, tmp_path: Path
) -> None:
    (tmp_path / "own.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not empty"):
        write_dirty_copy(clean, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["own.txt"]
    with pytest.raises(ConfigError, match="would lie in the clean folder"):
        write_dirty_copy(clean, clean / "dirty")
    assert not (clean / "dirty").exists()


def test_too_few_problems_are_refused(clean: Path, tmp_path: Path) -> None:
    places = sorted(clean.glob(f"*/*/{SETTINGS[0]}/problem_*"))[:4]
    for place in places:
        shutil.copytree(place, tmp_path / "few" / place.relative_to(clean))
    with pytest.raises(NotEnoughDataError, match="no undamaged problem is left"):
        write_dirty_copy(tmp_path / "few", tmp_path / "dirty")


def test_ids_repeat_where_there_are_fewer_ids_than_damages(clean: Path, tmp_path: Path) -> None:
    ids = sorted(path.name for path in clean.glob(f"*/*/{SETTINGS[0]}/problem_*"))[:7]
    for setting in SETTINGS:
        for name in ids:
            place = next(clean.glob(f"*/*/{setting}/{name}"))
            shutil.copytree(place, tmp_path / "seven" / place.relative_to(clean))
    found = write_dirty_copy(tmp_path / "seven", tmp_path / "dirty")
    assert len({damage.problem_id for damage in found}) == 7
    assert len({(damage.problem_id, damage.setting) for damage in found}) == 11
