"""Several bad problems of different kinds in one study: each costs itself, and nothing else.

They go through every stage of a study whose model takes short texts only. What is left of the study
must be what it would be had the bad problems never been there.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from taprobe_core.errors import LabelError, NotEnoughDataError, PlanError, SpanError
from taprobe_core.keys import Site, Trial
from taprobe_core.pipeline import (
    STAGES,
    Plan,
    cells_of,
    open_plan,
    read_scores,
    run_stage,
    stages_of,
)
from taprobe_core.pipeline.skips import foreseen_skips, stored_skips

SAMPLING, SETTING, CELL = "t1", "correct", ("m", "correct")
LIMIT = 400
WORDS = (
    "so", "then", "we", "add", "two", "and", "four", "wait", "check", "the", "result", "gives",
    "plan", "first",
)  # fmt: skip


def write_problem(root: Path, problem_id: int, n_sentences: int = 8, **row: Any) -> Path:
    """Write one problem; `row` changes its third sentence's row."""
    rng = random.Random(problem_id)
    sentences = [" ".join(rng.choices(WORDS, k=5)).capitalize() + "." for _ in range(n_sentences)]
    rows = [
        {
            "chunk": text,
            "chunk_idx": index,
            "accuracy": 0.5,
            "different_trajectories_fraction": 0.5,
            "overdeterminedness": 0.25,
            "counterfactual_importance_accuracy": rng.choice([0.0, 0.02, -0.24, 0.3]),
        }
        for index, text in enumerate(sentences)
    ]
    rows[2].update(row)
    base = {
        "prompt": "Write <think> and </think>. 2 + 2? <think>\n",
        "solution": "\n".join(sentences) + "\n</think>4",
        "error": None,
    }
    folder = root / "tiny" / SAMPLING / SETTING / f"problem_{problem_id}"
    folder.mkdir(parents=True)
    for name, value in (
        ("problem.json", {"problem": "2 + 2"}),
        ("base_solution.json", base),
        ("chunks_labeled.json", rows),
    ):
        (folder / name).write_text(json.dumps(value))
    return folder


def cut(folder: Path) -> None:
    path = folder / "chunks_labeled.json"
    path.write_bytes(path.read_bytes()[:99])


BAD: dict[int, tuple[str, str]] = {
    21: ("spans", "tokens, but the model takes 400"),
    22: ("labels", "1 of 7 sentences have no counterfactual_importance_accuracy, first sentence 2"),
    23: ("rollouts", "breaks off"),
    24: ("rollouts", "$[2].accuracy: found 1.2, want a number in [0, 1]"),
    25: ("spans", "sentence 2 differs from the text"),
    26: ("rollouts", "failed upstream"),
}


def write_bad(root: Path) -> None:
    write_problem(root, 21, n_sentences=90)
    write_problem(root, 22, counterfactual_importance_accuracy=None)
    cut(write_problem(root, 23))
    write_problem(root, 24, accuracy=1.2)
    write_problem(root, 25, chunk="Never said.")
    path = write_problem(root, 26) / "base_solution.json"
    path.write_text('{"error": "503"}')


def write_good(root: Path, n_problems: int = 6) -> None:
    for problem_id in range(1, n_problems + 1):
        odd = {"overdeterminedness": -1e-16, "summary": {"by": 7}} if problem_id == 3 else {}
        write_problem(root, problem_id, **odd)


@pytest.fixture(autouse=True)
def _short_context(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("taprobe_core.checkpoints.stand_in._MAX_POSITIONS", LIMIT)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<s>"], initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator([" ".join(WORDS)] * 8, trainer)
    core.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<s>"}')
    return folder


def study_file(root: Path, tokenizer: Path, **rollouts: Any) -> Path:
    values = {
        "name": "bad",
        "rollouts": {
            "source": {"kind": "mirror", "folder": str(root)},
            "sampling": SAMPLING,
            **rollouts,
        },
        "models": {
            "m": {
                "rollouts_dir": "tiny",
                "checkpoint": {
                    "kind": "stand_in", "architecture": "llama", "n_layers": 2, "d_model": 16},
                "n_layers": 2,
                "dtype": "float32",
                "tokenizer": str(tokenizer),
                "layers": [1],
            }
        },
        "settings": [SETTING],
        "attention": {"mode": "full"},
        "probes": {
            "recipes": [
                {"name": "position_baseline", "features": ["position"]},
                {"name": "linear_probe", "features": ["activations"]},
            ]
        },
        "splits": {"protocols": ["lopo"]},
        "evaluation": {"baselines": ["position_baseline"], "n_bootstrap": 10},
    }  # fmt: skip
    path = root.parent / f"{root.name}.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def run(plan: Plan, *stages: str) -> Plan:
    for stage in stages or stages_of(plan.study):
        cells = cells_of(plan.study, stage)
        assert len(list(run_stage(plan, stage, cells))) == len(cells)
    return plan


def test_bad_problems_of_every_kind_cost_themselves_alone(tmp_path: Path, tokenizer: Path) -> None:
    mixed, sound = tmp_path / "mixed", tmp_path / "sound"
    write_good(mixed)
    write_good(sound)
    write_bad(mixed)

    plan = run(open_plan(study_file(mixed, tokenizer), tmp_path / "data"))
    clean = open_plan(study_file(sound, tokenizer), tmp_path / "clean")
    run(clean, "rollouts", "labels", "spans")

    found = {row["problem_id"]: row for row in stored_skips(plan).to_dicts()}
    assert {problem_id: row["stage"] for problem_id, row in found.items()} == {
        problem_id: stage for problem_id, (stage, _) in BAD.items()
    }
    for problem_id, (_, said) in BAD.items():
        assert said in found[problem_id]["what"]
        assert found[problem_id]["fix"]
    for stage, name in (
        ("rollouts", "problems"), ("rollouts", "sentences"), ("rollouts", "notes"),
        ("labels", "labels"), ("spans", "texts"), ("spans", "spans"),
    ):  # fmt: skip
        mine, alone = (each.read(stage, CELL, name) for each in (plan, clean))
        assert mine.filter(~pl.col("problem_id").is_in([*BAD])).equals(alone)
        assert alone["problem_id"].n_unique() == (1 if name == "notes" else 6)
    scores = read_scores(plan, Site("m", 1), Trial(SETTING, 0))
    assert set(scores["problem_id"]) == set(range(1, 7))
    for stage in stages_of(plan.study):
        for name, check in STAGES[stage].checks.items():
            if name == "passages_differ_across_problems":
                continue  # these sentences are drawn from few words
            for cell in cells_of(plan.study, stage):
                assert check(plan, cell) == [], name
    page = plan.open("study_report").path / "report.html"
    assert all(str(problem_id) in page.read_text() for problem_id in BAD)


def test_what_a_run_will_leave_out_is_known_before_it(tmp_path: Path, tokenizer: Path) -> None:
    root = tmp_path / "mixed"
    write_good(root)
    write_bad(root)
    path = study_file(root, tokenizer)
    plan = open_plan(path, tmp_path / "data")

    before, notes = foreseen_skips(plan)
    assert stored_skips(plan).is_empty()
    run(plan, "rollouts")
    between, _ = foreseen_skips(plan)
    run(plan, "labels", "spans")

    order = ["stage", "problem_id"]
    assert notes == []
    assert before.sort(order).equals(stored_skips(plan).sort(order))
    assert between.sort(order).equals(before.sort(order))
    assert foreseen_skips(plan).skipped.equals(stored_skips(plan))


@pytest.mark.parametrize(
    ("stage", "kind", "said", "write"),
    [
        ("spans", SpanError, "tokens, but the model takes 400 in problem 21",
         lambda root: write_problem(root, 21, n_sentences=90)),
        ("labels", LabelError, "in problem 22, sentence 2",
         lambda root: write_problem(root, 22, counterfactual_importance_accuracy=None)),
    ],
)  # fmt: skip
def test_a_study_that_fails_on_a_bad_problem_says_so(
    tmp_path: Path,
    tokenizer: Path,
    stage: str,
    kind: type[Exception],
    said: str,
    write: Callable[[Path], Path],
) -> None:
    root = tmp_path / "mixed"
    write_good(root)
    write(root)
    plan = open_plan(study_file(root, tokenizer, on_bad_problem="fail"), tmp_path / "data")
    run(plan, "rollouts")

    with pytest.raises(kind, match=said) as caught:
        run(plan, stage)

    # The advice is true: with the problem excluded the stage goes through.
    problem_id = int(write(tmp_path / "again").name.removeprefix("problem_"))
    assert f"rollouts.exclude_ids: [{problem_id}]" in str(caught.value)
    advised = study_file(root, tokenizer, on_bad_problem="fail", exclude_ids=[problem_id])
    run(open_plan(advised, tmp_path / "data"), "rollouts", stage)


def test_too_few_problems_left_says_how_many_and_why(tmp_path: Path, tokenizer: Path) -> None:
    root = tmp_path / "mixed"
    write_good(root, n_problems=2)
    write_bad(root)
    plan = open_plan(study_file(root, tokenizer), tmp_path / "data")
    run(plan, "rollouts", "labels", "spans", "activations", "vertical_attention")

    with pytest.raises(PlanError) as caught:
        run(plan, "probe_fits")

    assert "2 of 8 problems are left" in caught.value.what
    assert "left out of m, correct: problem 23: the file breaks off" in caught.value.what
    assert caught.value.what.endswith("and 3 more")
    # Recipes that fail alike are told together.
    assert caught.value.what.count("2 of 8 problems are left") == 1


def test_nothing_short_enough_gives_the_reasons(tmp_path: Path, tokenizer: Path) -> None:
    root = tmp_path / "long"
    for problem_id in range(5):
        write_problem(root, problem_id, n_sentences=90)
    plan = open_plan(study_file(root, tokenizer), tmp_path / "data")
    run(plan, "rollouts")

    with pytest.raises(NotEnoughDataError, match=r"none of 5 .*takes 400.* and 2 more\)"):
        run(plan, "spans")


def test_the_commands_say_what_is_left_out(
    tmp_path: Path, tokenizer: Path, taprobe: Callable[..., Any]
) -> None:
    root = tmp_path / "mixed"
    write_good(root)
    write_bad(root)
    path = study_file(root, tokenizer)

    checked = taprobe("check", path, "--no-measure")
    listed = json.loads(taprobe("check", path, "--no-measure", "--json").out)["skipped"]
    ran = taprobe("run", path, "--select", "rollouts", "--select", "labels", "--select", "spans")
    strict = taprobe("check", study_file(root, tokenizer, on_bad_problem="fail"), "--no-measure")

    assert (checked.code, ran.code, strict.code) == (0, 0, 0)
    assert "6 problem(s) left out" in checked.out
    assert "6 problem(s) left out" in ran.err
    assert "6 problem(s) stop the run" in strict.out
    for problem_id, (stage, said) in BAD.items():
        line = f"m, correct, problem {problem_id} ({stage}): "
        assert line in checked.out
        assert line in ran.err
        assert any(said in row["what"] for row in listed if row["problem_id"] == problem_id)
