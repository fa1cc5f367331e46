"""The demo's files: the dataset's layout, labels that the files themselves give, equal bytes."""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from taprobe_core.demo import SETTINGS, demo_world, write_demo_rollouts
from taprobe_core.demo.policy import PolicySampler
from taprobe_core.demo.task import Problem
from taprobe_core.demo.trace import Continuation, Sentence, Trace
from taprobe_core.errors import ConfigError, NotEnoughDataError
from taprobe_core.importance import parse_solutions, published_measures, trigram_masked_dissimilar
from taprobe_core.study.config import DemoSource

SOURCE = DemoSource(kind="demo", n_problems=4, n_rollouts=20, seed=5)
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


@pytest.fixture(scope="module")
def rollouts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "rollouts"
    write_demo_rollouts(folder, SOURCE, MODELS, SAMPLING, list(SETTINGS))
    return folder


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*.json"))
    }


def load(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def problem_folders(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/*/*/problem_*"))


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


def test_stored_labels_are_recomputed_exactly_from_the_files(rollouts: Path) -> None:
    for folder in problem_folders(rollouts):
        labeled = load(folder / "chunks_labeled.json")
        banks = []
        for index in range(len(labeled)):
            path = folder / f"chunk_{index}" / "solutions.json"
            solutions = parse_solutions(path.read_text(encoding="utf-8"), str(path))
            assert (solutions.n_errors, solutions.n_ungraded) == (0, 0)
            assert len(solutions.rollouts) == SOURCE.n_rollouts
            banks.append(solutions.rollouts)
        sentences = load(folder / "chunks.json")["chunks"]
        measures = published_measures(sentences, banks, trigram_masked_dissimilar)
        assert measures == [{key: row[key] for key in MEASURES} for row in labeled]
        for row, following in pairwise(labeled):
            assert row["resampling_importance_accuracy"] == following["accuracy"] - row["accuracy"]


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
    rollouts: Path, tmp_path: Path
) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from taprobe_core.demo.writer import SETTINGS, write_demo_rollouts\n"
        "from taprobe_core.study.config import DemoSource\n"
        f"source = DemoSource(kind='demo', n_problems=4, n_rollouts=20, seed=5)\n"
        f"write_demo_rollouts(Path(sys.argv[1]), source, {MODELS}, {SAMPLING!r}, list(SETTINGS))\n"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "again")],
        check=True,
        env=os.environ | {"PYTHONHASHSEED": "4711"},
    )
    assert digests(tmp_path / "again") == digests(rollouts)


def test_files_do_not_depend_on_what_else_is_written(rollouts: Path, tmp_path: Path) -> None:
    larger = SOURCE.model_copy(update={"n_problems": 5})
    setting = "incorrect_base_solution"
    write_demo_rollouts(tmp_path, larger, ["tiny-b", "tiny-b"], SAMPLING, [setting])
    alone = digests(tmp_path)
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
    write_demo_rollouts(tmp_path / "fewer", fewer, ["tiny-a"], SAMPLING, list(SETTINGS))
    for path in (tmp_path / "fewer").rglob("solutions.json"):
        same = rollouts / path.relative_to(tmp_path / "fewer")
        assert load(path) == load(same)[:3]
    other = SOURCE.model_copy(update={"seed": 6})
    write_demo_rollouts(tmp_path / "other", other, ["tiny-a"], SAMPLING, list(SETTINGS))
    assert not digests(tmp_path / "other").keys() >= digests(tmp_path / "fewer").keys()


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
        write_demo_rollouts(tmp_path / "new", SOURCE, models, sampling, settings)
    assert not (tmp_path / "new").exists()


def test_refuses_a_folder_that_is_not_empty(tmp_path: Path) -> None:
    (tmp_path / "kept.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(ConfigError, match="not empty"):
        write_demo_rollouts(tmp_path, SOURCE, MODELS, SAMPLING, list(SETTINGS))
    assert [path.name for path in tmp_path.iterdir()] == ["kept.txt"]


class Guesser:
    """Says one sentence and guesses: a reasoner that is no policy."""

    def __init__(self, right: bool) -> None:
        self.right = right

    def trace(self, problem: Problem, rng: random.Random) -> Trace:
        answer = str(problem.answer + (not self.right))
        sentence = Sentence("I just guess the number.", "", "unknown", (), "guess")
        return Trace((sentence,), f"\n</think>\n\n\\boxed{{{answer}}}", answer, self.right)

    def continuations(
        self, problem: Problem, prefix: Sequence[str], n: int, rng: random.Random
    ) -> list[Continuation]:
        assert list(prefix) == []
        return [Continuation("No idea, sorry.\n</think>", "No idea, sorry.", "", False)] * n


def test_another_sampler_can_write_the_rollouts(tmp_path: Path) -> None:
    asked: list[str] = []

    def sampler_of(model_dir: str) -> Guesser | PolicySampler:
        asked.append(model_dir)
        return Guesser(right=True) if model_dir == "tiny-a" else PolicySampler()

    setting = "correct_base_solution"
    write_demo_rollouts(tmp_path, SOURCE, MODELS, SAMPLING, [setting], sampler_of=sampler_of)
    assert asked == MODELS
    for path in (tmp_path / "tiny-a").rglob("chunks_labeled.json"):
        (row,) = load(path)
        assert row["chunk"] == "I just guess the number."
        assert row["accuracy"] == 0.0


def test_a_sampler_that_never_has_the_wanted_grade(tmp_path: Path) -> None:
    with pytest.raises(NotEnoughDataError, match=r"no correct base trace in 1000 tries"):
        write_demo_rollouts(
            tmp_path,
            SOURCE,
            ["m"],
            SAMPLING,
            ["correct_base_solution"],
            sampler_of=lambda _: Guesser(right=False),
        )


def test_world_has_rollouts_and_tokenizer(tmp_path: Path) -> None:
    small = SOURCE.model_copy(update={"n_rollouts": 2})
    world = demo_world(tmp_path / "world", small, ["m"], SAMPLING, ["correct_base_solution"])
    assert len(problem_folders(world.rollouts_folder)) == 4
    assert (world.tokenizer_folder / "tokenizer.json").is_file()


@pytest.mark.real_data
def test_keys_and_types_are_those_of_the_published_files(
    rollouts: Path, real_rollouts: Path
) -> None:
    ours, real = problem_folders(rollouts)[0], problem_folders(real_rollouts)[0]
    for name in ("problem.json", "base_solution.json", "chunks_labeled.json"):
        mine, published = load(ours / name), load(real / name)
        if name == "chunks_labeled.json":
            mine, published = mine[1], published[1]
        assert {key: type(value) for key, value in mine.items()} == {
            key: type(value) for key, value in published.items() if not key.startswith("forced_")
        }
        assert [key for key in published if key in mine] == list(mine)
