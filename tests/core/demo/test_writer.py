"""The policy's world: the dataset's layout, labels that its files give, equal bytes, a truth."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from taprobe_core.demo import SETTINGS, DemoWorld, true_importance, write_policy_world
from taprobe_core.demo.task import problem
from taprobe_core.demo.world import N_FORCED
from taprobe_core.errors import ConfigError
from taprobe_core.labels import published_measures, read_solutions, trigram_masked_dissimilar
from taprobe_core.study.config import PolicySource

SOURCE = PolicySource(kind="policy", n_problems=4, n_rollouts=24, seed=5)
MODELS = ["tiny-a", "tiny-b"]
SAMPLING = "temperature_1.0_top_p_1.0"
MEASURES = [
    "accuracy",
    "resampling_importance_accuracy",
    "resampling_importance_kl",
    "counterfactual_importance_accuracy",
    "counterfactual_importance_kl",
    "different_trajectories_fraction",
    "overdeterminedness",
]
FORCED_MEASURES = {
    "forced_importance_accuracy": "resampling_importance_accuracy",
    "forced_importance_kl": "resampling_importance_kl",
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> DemoWorld:
    folder = tmp_path_factory.mktemp("demo") / "world"
    write_policy_world(folder, SOURCE, MODELS, SAMPLING, list(SETTINGS))
    return DemoWorld.at(folder)


@pytest.fixture(scope="module")
def rollouts(world: DemoWorld) -> Path:
    return world.rollouts_folder


def write(folder: Path, source: PolicySource, models: list[str], settings: list[str]) -> Path:
    write_policy_world(folder, source, models, SAMPLING, settings)
    return DemoWorld.at(folder).rollouts_folder


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*.json"))
    }


def load(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def problem_folders(folder: Path) -> list[Path]:
    return [
        path for setting in SETTINGS for path in sorted(folder.glob(f"*/*/{setting}/problem_*"))
    ]


def test_every_model_and_setting_has_the_same_problems(rollouts: Path) -> None:
    found = [
        sorted(path.name for path in (rollouts / model / SAMPLING / setting).iterdir())
        for model in MODELS
        for setting in SETTINGS
    ]
    assert len(found[0]) == 4
    assert all(names == found[0] for names in found)
    statements = {
        path.parent.name: load(path)["problem"] for path in rollouts.rglob("problem.json")
    }
    assert len(statements) == 4


def recomputed(folder: Path, sentences: list[str], n_rollouts: int) -> list[dict[str, float]]:
    banks = []
    for index in range(len(sentences)):
        path = folder / f"chunk_{index}" / "solutions.json"
        solutions = read_solutions(json.loads(path.read_text(encoding="utf-8")), str(path))
        assert (solutions.n_errors, solutions.n_ungraded) == (0, 0)
        assert len(solutions.rollouts) == n_rollouts
        banks.append(solutions.rollouts)
    return published_measures(sentences, banks, trigram_masked_dissimilar)


def test_stored_labels_are_recomputed_exactly_from_the_files(rollouts: Path) -> None:
    for folder in problem_folders(rollouts):
        labeled = load(folder / "chunks_labeled.json")
        sentences = load(folder / "chunks.json")["chunks"]
        measures = recomputed(folder, sentences, SOURCE.n_rollouts)
        assert measures == [{key: row[key] for key in MEASURES} for row in labeled]
        for row, following in pairwise(labeled):
            assert row["resampling_importance_accuracy"] == following["accuracy"] - row["accuracy"]


def test_forced_labels_are_recomputed_exactly_from_the_forced_branch(rollouts: Path) -> None:
    sizes = []
    for folder in problem_folders(rollouts):
        labeled = load(folder / "chunks_labeled.json")
        sentences = load(folder / "chunks.json")["chunks"]
        branch = folder.parents[1] / f"{folder.parent.name}_forced_answer" / folder.name
        measures = recomputed(branch, sentences, N_FORCED)
        assert [{key: row[key] for key in FORCED_MEASURES} for row in labeled] == [
            {key: row[source] for key, source in FORCED_MEASURES.items()} for row in measures
        ]
        sizes += [abs(row["forced_importance_accuracy"]) for row in labeled]
        for row in load(branch / "chunk_1" / "solutions.json"):
            assert row["chunk_resampled"] == ""
            assert row["rollout"] == f"{row['answer']}}}."
    assert max(sizes) > 0.3


def test_labels_stand_beside_the_exact_truth(rollouts: Path) -> None:
    distances = []
    for folder in problem_folders(rollouts):
        labeled = load(folder / "chunks_labeled.json")
        asked = problem(int(folder.name.removeprefix("problem_")))
        texts = [row["chunk"] for row in labeled]
        exact = true_importance(asked, texts, trigram_masked_dissimilar)
        assert [row["true_importance"] for row in labeled] == exact
        distances += [
            row["counterfactual_importance_accuracy"] - true
            for row, true in zip(labeled, exact, strict=True)
        ]
    assert abs(sum(distances)) / len(distances) < 0.02
    assert sum(abs(each) > 0.5 for each in distances) < 0.02 * len(distances)


def test_base_traces_have_the_settings_grade_and_consistent_texts(rollouts: Path) -> None:
    n_views_differ = 0
    for folder in problem_folders(rollouts):
        problem, base = load(folder / "problem.json"), load(folder / "base_solution.json")
        chunks, labeled = load(folder / "chunks.json"), load(folder / "chunks_labeled.json")
        assert base["is_correct"] is SETTINGS[folder.parent.name]
        assert base["is_correct"] is (base["answer"] == problem["gt_answer"])
        assert base["full_cot"] == base["prompt"] + base["solution"] == chunks["source_text"]
        assert base["prompt"].endswith(f"Problem: {problem['problem']} Solution: \n<think>\n")
        assert base["solution"].startswith(chunks["solution_text"] + "\n</think>\n\n")
        assert base["solution"].endswith(f"\\boxed{{{base['answer']}}}.")
        assert [row["chunk"] for row in labeled] == chunks["chunks"]
        assert [row["chunk_idx"] for row in labeled] == list(range(len(labeled)))
        flattened = " ".join(chunks["chunks"])
        assert " ".join(chunks["solution_text"].split()) == flattened
        n_views_differ += chunks["solution_text"] != flattened
    assert n_views_differ > 12


def test_rollout_rows_continue_their_prefix(rollouts: Path) -> None:
    folder = problem_folders(rollouts)[0]
    sentences = load(folder / "chunks.json")["chunks"]
    for index, removed in enumerate(sentences):
        for row in load(folder / f"chunk_{index}" / "solutions.json"):
            assert list(row) == [
                "chunk_removed",
                "prefix_without_chunk",
                "chunk_resampled",
                "rollout",
                "answer",
                "is_correct",
            ]
            assert row["chunk_removed"] == removed
            assert row["prefix_without_chunk"] == " ".join(sentences[:index])
            assert row["rollout"].startswith((" " if index else "") + row["chunk_resampled"])
            assert row["rollout"].endswith(f"\\boxed{{{row['answer']}}}.")


def test_equal_arguments_give_equal_bytes_in_another_process(
    world: DemoWorld, tmp_path: Path
) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from taprobe_core.demo import SETTINGS, write_policy_world\n"
        "from taprobe_core.study.config import PolicySource\n"
        "source = PolicySource(kind='policy', n_problems=4, n_rollouts=24, seed=5)\n"
        f"write_policy_world(Path(sys.argv[1]), source, {MODELS}, {SAMPLING!r}, list(SETTINGS))\n"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "again")],
        check=True,
        env=os.environ | {"PYTHONHASHSEED": "4711"},
    )
    assert digests(tmp_path / "again") == digests(world.rollouts_folder.parent)


def test_files_do_not_depend_on_what_else_is_written(rollouts: Path, tmp_path: Path) -> None:
    larger = SOURCE.model_copy(update={"n_problems": 5})
    setting = "incorrect_base_solution"
    alone = digests(write(tmp_path, larger, ["tiny-b", "tiny-b"], [setting]))
    common = {name: digest for name, digest in digests(rollouts).items() if name in alone}
    assert {Path(name).parts[0] for name in common} == {"tiny-b"}
    assert common.items() < alone.items()
    assert len({Path(name).parts[3] for name in common}) == 4


def test_models_and_seeds_differ_and_fewer_rollouts_are_the_first_ones(
    rollouts: Path, tmp_path: Path
) -> None:
    found = digests(rollouts)
    pairs = [
        (found[name], found[name.replace("tiny-a", "tiny-b")])
        for name in found
        if name.startswith("tiny-a") and name.endswith("base_solution.json")
    ]
    assert sum(a != b for a, b in pairs) == len(pairs) == 8
    fewer = SOURCE.model_copy(update={"n_rollouts": 3})
    first = write(tmp_path / "fewer", fewer, ["tiny-a"], list(SETTINGS))
    solutions = list(first.rglob("solutions.json"))
    assert len(solutions) > 200
    for path in solutions:
        assert load(path) == load(rollouts / path.relative_to(first))[:3]
    other = SOURCE.model_copy(update={"seed": 6, "n_rollouts": 2})
    second = write(tmp_path / "other", other, ["tiny-a"], list(SETTINGS))
    assert not digests(second).keys() >= digests(first).keys()


@pytest.mark.parametrize(
    ("models", "sampling", "settings", "message"),
    [
        (["m"], "s", ["correct_base_solution", "forced"], r"no setting \['forced'\]"),
        (["../m"], "s", ["correct_base_solution"], r"'\.\./m' cannot be a folder"),
        (["m"], "..", ["correct_base_solution"], r"'\.\.' cannot be a folder"),
    ],
)
def test_names_that_the_demo_cannot_write(
    tmp_path: Path, models: list[str], sampling: str, settings: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        write_policy_world(tmp_path / "new", SOURCE, models, sampling, settings)
    assert not (tmp_path / "new").exists()


def test_refuses_a_folder_that_is_not_empty(tmp_path: Path) -> None:
    (tmp_path / "kept.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(ConfigError, match="not empty"):
        write_policy_world(tmp_path, SOURCE, MODELS, SAMPLING, list(SETTINGS))
    assert [path.name for path in tmp_path.iterdir()] == ["kept.txt"]


def test_the_world_has_a_tokenizer(world: DemoWorld) -> None:
    names = sorted(path.name for path in world.tokenizer_folder.iterdir())
    assert names == ["tokenizer.json", "tokenizer_config.json"]


@pytest.mark.real_data
def test_keys_and_types_are_those_of_the_published_files(
    rollouts: Path, real_rollouts: Path
) -> None:
    ours, real = problem_folders(rollouts)[0], problem_folders(real_rollouts)[0]
    for name in ("problem.json", "base_solution.json", "chunks_labeled.json"):
        mine, published = load(ours / name), load(real / name)
        if name == "chunks_labeled.json":
            mine, published = mine[1], published[1]
        assert mine.pop("true_importance", None) is None or name == "chunks_labeled.json"
        assert {key: type(value) for key, value in mine.items()} == {
            key: type(value) for key, value in published.items()
        }
        assert list(published) == list(mine)
