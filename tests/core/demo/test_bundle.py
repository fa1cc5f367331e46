"""Bundles: what is written is read, what is broken is named, and what is shipped keeps its word."""

from __future__ import annotations

import json
import lzma
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from taprobe_core.demo import (
    BUNDLE,
    SAMPLING,
    SETTINGS,
    DemoWorld,
    choose_problems,
    write_demo_world,
)
from taprobe_core.demo.bundle import (
    ROLLOUTS,
    Record,
    first_rollouts,
    read_manifest,
    read_records,
    verify_files,
    write_records,
)
from taprobe_core.demo.policy import drawn_answers, drawn_rollouts, drawn_trace
from taprobe_core.demo.task import Reasoned, seeded
from taprobe_core.demo.tokenizer import train_tokenizer
from taprobe_core.demo.truth import exact_importance, measures
from taprobe_core.errors import ConfigError, DataError, PlanError
from taprobe_core.labels import trigram_masked_dissimilar
from taprobe_core.study.config import DemoSource
from tools.demo.audit import figures, split_half
from tools.demo.training import failed_gates

REASONERS = ["tiny-qwen2", "tiny-llama"]
CF = "counterfactual_importance_accuracy"

FloatArray = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]


def load(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


# The form of a bundle, on one that the policy said.


def told(name: str, n_rollouts: int) -> list[Record]:
    found = []
    for setting, grade in SETTINGS.items():
        for asked in choose_problems(5, seed=0):
            rng = seeded(name, setting, asked.id)
            trace = next(
                trace
                for trace in iter(lambda: drawn_trace(asked, rng), None)  # noqa: B023
                if trace.is_correct == grade
            )
            texts = [sentence.text for sentence in trace.sentences]
            at = range(len(texts))
            reasoned = Reasoned(
                asked,
                trace,
                [drawn_rollouts(asked, texts[:i], n_rollouts, rng) for i in at],
                [drawn_answers(asked, texts[:i], 3, rng) for i in at],
            )
            found.append(Record(setting, reasoned, measures(reasoned)))
    return found


@pytest.fixture(scope="module")
def records() -> dict[str, list[Record]]:
    return {name: told(name, 6) for name in ("one", "two")}


@pytest.fixture(scope="module")
def bundle(records: dict[str, list[Record]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle")
    for name, of_one in records.items():
        train_tokenizer(folder / name, 0)
        write_records(folder / name / ROLLOUTS, iter(of_one))
    recipe = {"reasoners": {name: {} for name in records}, "n_problems": 5, "n_rollouts": 6}
    (folder / "manifest.json").write_text(json.dumps({"recipe": recipe, "sha256": {}}))
    return folder


def test_records_are_read_as_they_were_written(
    records: dict[str, list[Record]], bundle: Path, tmp_path: Path
) -> None:
    for name, of_one in records.items():
        assert list(read_records(bundle, name)) == of_one
    write_records(tmp_path / ROLLOUTS, iter(records["one"]))
    assert (tmp_path / ROLLOUTS).read_bytes() == (bundle / "one" / ROLLOUTS).read_bytes()
    assert (tmp_path / ROLLOUTS).read_bytes() != (bundle / "two" / ROLLOUTS).read_bytes()


def test_first_rollouts_are_the_first(records: dict[str, list[Record]]) -> None:
    reasoned = records["one"][0].reasoned
    few = first_rollouts(reasoned, 2)
    assert few.rollouts == [bank[:2] for bank in reasoned.rollouts]
    assert (few.trace, few.forced) == (reasoned.trace, reasoned.forced)


def rows(bundle: Path) -> list[dict[str, Any]]:
    with lzma.open(bundle / "one" / ROLLOUTS, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"solution": "I guess.\n</think>\n\n\\boxed{7}."}, "the policy could not have said"),
        ({"problem_id": 10**6}, "problem ids are"),
        ({"problem_id": "7"}, "cannot be read"),
        ({"rollouts": None}, "cannot be read"),
        ({"rollouts": [[7]]}, "cannot be read"),
    ],
)
def test_a_line_that_no_build_wrote(
    bundle: Path, tmp_path: Path, damage: dict[str, Any], message: str
) -> None:
    (tmp_path / "one").mkdir()
    with lzma.open(tmp_path / "one" / ROLLOUTS, "wt", encoding="utf-8") as lines:
        lines.write(json.dumps({**rows(bundle)[0], **damage}) + "\n")
    with pytest.raises(DataError, match=message):
        list(read_records(tmp_path, "one"))


def test_a_file_that_is_no_archive_any_more(bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "one" / ROLLOUTS
    with pytest.raises(DataError, match=r"rollouts cannot be read .*one"):
        list(read_records(tmp_path, "one"))
    path.parent.mkdir()
    whole = (bundle / "one" / ROLLOUTS).read_bytes()
    for content in (b"", b"text", whole[: len(whole) // 2], whole[:200] + b"?" + whole[201:]):
        path.write_bytes(content)
        with pytest.raises(DataError, match="rollouts cannot be read"):
            assert list(read_records(tmp_path, "one"))


def test_a_manifest_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="manifest cannot be read"):
        read_manifest(tmp_path)
    (tmp_path / "manifest.json").write_text("{", encoding="utf-8")
    with pytest.raises(DataError, match="manifest cannot be read"):
        read_manifest(tmp_path)


# The world that is unpacked from it.


def world(folder: Path, bundle: Path, n_problems: int, n_rollouts: int) -> DemoWorld:
    source = DemoSource(kind="demo", n_problems=n_problems, n_rollouts=n_rollouts)
    write_demo_world(folder, source, bundle)
    return DemoWorld.at(folder)


@pytest.fixture(scope="module")
def whole(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> DemoWorld:
    return world(tmp_path_factory.mktemp("whole") / "world", bundle, 5, 6)


def labeled_files(of: DemoWorld) -> list[Path]:
    return sorted(of.rollouts_folder.glob("*/*/*/*/chunks_labeled.json"))


def test_the_world_has_all_that_was_bundled(
    records: dict[str, list[Record]], bundle: Path, whole: DemoWorld
) -> None:
    for name, of_one in records.items():
        for setting, reasoned, measured in of_one:
            below = whole.rollouts_folder / name / SAMPLING
            folder = below / setting / f"problem_{reasoned.problem.id}"
            labeled = load(folder / "chunks_labeled.json")
            assert [{key: row[key] for key in measured[0]} for row in labeled] == measured
            assert [row["true_importance"] for row in labeled] == exact_importance(reasoned)
            base = load(folder / "base_solution.json")
            assert base["solution"] == reasoned.trace.thinking + reasoned.trace.ending
            forced = below / f"{setting}_forced_answer" / folder.name
            for at, banks in ((folder, reasoned.rollouts), (forced, reasoned.forced)):
                for i, bank in enumerate(banks):
                    stored = load(at / f"chunk_{i}" / "solutions.json")
                    assert [row["rollout"] for row in stored] == [rest.text for rest in bank]
    assert len(labeled_files(whole)) == 20
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (whole.tokenizer_folder / name).read_bytes() == (bundle / "one" / name).read_bytes()


def test_a_smaller_world_is_a_part_of_the_larger(
    bundle: Path, whole: DemoWorld, tmp_path: Path
) -> None:
    small = world(tmp_path, bundle, 4, 3)
    problems = sorted(some.id for some in choose_problems(5, seed=0))[:4]
    files = labeled_files(small)
    assert len(files) == 16
    assert {int(path.parent.name.removeprefix("problem_")) for path in files} == set(problems)
    for path in files:
        larger = whole.rollouts_folder / path.parent.relative_to(small.rollouts_folder)
        for name in ("problem.json", "base_solution.json", "chunks.json"):
            assert (path.parent / name).read_bytes() == (larger / name).read_bytes()
        for i in range(len(load(path))):
            name = f"chunk_{i}/solutions.json"
            assert load(path.parent / name) == load(larger / name)[:3]
        mine, theirs = load(path), load(larger / path.name)
        assert [row["true_importance"] for row in mine] == [
            row["true_importance"] for row in theirs
        ]
        assert mine != theirs


@pytest.mark.parametrize(
    ("size", "message"),
    [((6, 6), "n_problems 5, not 6"), ((5, 7), "n_rollouts 6, not 7")],
)
def test_a_larger_world_than_was_bundled(
    bundle: Path, tmp_path: Path, size: tuple[int, int], message: str
) -> None:
    with pytest.raises(PlanError, match=message):
        world(tmp_path / "new", bundle, *size)
    assert not (tmp_path / "new").exists()


def test_a_folder_that_is_not_empty(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "kept.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(ConfigError, match="not empty"):
        world(tmp_path, bundle, 4, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["kept.txt"]


# What is shipped. These fail where it is missing.


@cache
def shipped(name: str) -> list[Record]:
    return list(read_records(BUNDLE, name))


def of_setting(name: str, setting: str) -> list[Record]:
    return [record for record in shipped(name) if record.setting == setting]


def test_shipped_files_are_those_that_were_built() -> None:
    verify_files(BUNDLE)
    manifest = read_manifest(BUNDLE)
    stored = {path.relative_to(BUNDLE).as_posix() for path in BUNDLE.glob("*/*")}
    assert set(manifest["sha256"]) == stored
    assert list(manifest["recipe"]["reasoners"]) == REASONERS
    size = sum(path.stat().st_size for path in BUNDLE.rglob("*") if path.is_file())
    assert size < 10e6


@pytest.mark.parametrize("name", REASONERS)
def test_shipped_reasoners_passed_their_gates(name: str) -> None:
    manifest = read_manifest(BUNDLE)
    assert failed_gates(manifest["gates"][name]) == []
    assert manifest["gates"][name] == load(BUNDLE / name / "gates.json")


@pytest.mark.parametrize("name", REASONERS)
@pytest.mark.parametrize("setting", SETTINGS)
def test_shipped_sizes_and_identities(name: str, setting: str) -> None:
    recipe = read_manifest(BUNDLE)["recipe"]
    found = of_setting(name, setting)
    problems = choose_problems(recipe["n_problems"], recipe["seed"])
    assert [record.reasoned.problem for record in found] == problems
    assert len(problems) >= 16
    for record in found:
        reasoned = record.reasoned
        assert reasoned.trace.is_correct is SETTINGS[setting]
        assert {len(bank) for bank in reasoned.rollouts} == {recipe["n_rollouts"]} == {100}
        assert {len(bank) for bank in reasoned.forced} == {recipe["n_forced"]} == {20}
        for row, following in pairwise(record.measures):
            assert row["resampling_importance_accuracy"] == following["accuracy"] - row["accuracy"]
    for record in found[:2]:
        assert measures(record.reasoned) == record.measures


def counts_of(record: Record) -> Counts:
    """[sentence, (similar wrong, similar right, dissimilar wrong, dissimilar right)]."""
    counts = np.zeros((len(record.measures), 4), dtype=np.int64)
    for i, (text, bank) in enumerate(
        zip(record.reasoned.texts, record.reasoned.rollouts, strict=True)
    ):
        for rest in bank:
            if rest.answer:
                is_other = trigram_masked_dissimilar(text, rest.first_sentence)
                counts[i, 2 * is_other + rest.is_correct] += 1
    return counts


def importance(counts: Counts) -> FloatArray:
    n_other, n_all = counts[:-1, 2:].sum(axis=1), counts[1:].sum(axis=1)
    accuracy = counts[1:, [1, 3]].sum(axis=1) / np.maximum(n_all, 1)
    found = counts[:-1, 3] / np.maximum(n_other, 1) - accuracy
    return np.where((n_other > 0) & (n_all > 0), found, 0.0)


def test_importance_from_counts_is_the_stored_one() -> None:
    for record in of_setting(REASONERS[0], "incorrect_base_solution"):
        stored = [row[CF] for row in record.measures[:-1]]
        assert importance(counts_of(record)) == pytest.approx(stored, abs=1e-12)


def hypergeometric_halves(counts: list[Counts], n_draws: int) -> FloatArray:
    """Correlations of halves that are drawn from the counts alone."""
    rng = np.random.default_rng(1)
    found = []
    for _ in range(n_draws):
        halves: tuple[list[FloatArray], list[FloatArray]] = ([], [])
        for of_trace in counts:
            size = of_trace.sum(axis=1) // 2
            drawn = np.array(
                [
                    rng.multivariate_hypergeometric(row, n)
                    for row, n in zip(of_trace, size, strict=True)
                ]
            )
            rest = of_trace - drawn
            # An odd rollout belongs to no half.
            rest = np.array(
                [rng.multivariate_hypergeometric(row, n) for row, n in zip(rest, size, strict=True)]
            )
            halves[0].append(importance(drawn))
            halves[1].append(importance(rest))
        found.append(np.corrcoef(*(np.concatenate(half) for half in halves))[0, 1])
    return np.array(found)


@pytest.mark.parametrize("name", REASONERS)
@pytest.mark.parametrize("setting", SETTINGS)
def test_halves_of_rollouts_correlate_as_halves_of_counts(name: str, setting: str) -> None:
    found = of_setting(name, setting)
    n_splits = 20
    from_rollouts = split_half(found, 2, n_splits=n_splits)
    from_counts = hypergeometric_halves([counts_of(record) for record in found], 60)
    # Both are means of draws of one distribution.
    error = from_counts.std(ddof=1) * (1 / n_splits + 1 / len(from_counts)) ** 0.5
    assert abs(from_rollouts - from_counts.mean()) < 4 * error
    half = float(from_counts.mean())
    assert 2 * half / (1 + half) >= 0.8


@pytest.mark.parametrize("name", REASONERS)
def test_shipped_figures_are_measured_again(name: str) -> None:
    stored = read_manifest(BUNDLE)["figures"][name]
    for setting, found in figures(BUNDLE, name).items():
        assert found == pytest.approx(stored[setting], abs=1e-9)
        assert 0.10 <= found["share_large"] <= 0.25
        assert found["reliability"] >= 0.8
        assert found["reliability_25"] < found["reliability"]
        assert found["n_sentences"] > 200
