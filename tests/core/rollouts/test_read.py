from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from taprobe_core.errors import DataError, NotEnoughDataError, SourceUnavailableError
from taprobe_core.rollouts import (
    FolderRollouts,
    choose_problems,
    content_digest,
    open_source,
    read_rollouts,
)
from taprobe_core.study.config import MirrorSource, Model, Rollouts, StandInCheckpoint

CHECKPOINT = StandInCheckpoint(kind="stand_in", architecture="qwen2")
MODEL = Model(rollouts_dir="tiny", checkpoint=CHECKPOINT, n_layers=4)
SETTING = "correct"
PROMPT, SOLUTION = "Sum. \n<think>\n", "One. Two.\n</think>\n2"
PUBLISHED = [
    330,
    1591,
    2050,
    2137,
    2189,
    2236,
    2238,
    2870,
    3360,
    3448,
    3550,
    3916,
    3935,
    4019,
    4164,
    4605,
    4682,
    6481,
    6596,
    6998,
]
MODELS = ("deepseek-r1-distill-llama-8b", "deepseek-r1-distill-qwen-14b")
SETTINGS = ("correct_base_solution", "incorrect_base_solution")


def write_problem(root: Path, problem_id: int) -> Path:
    folder = root / "tiny" / "t1" / SETTING / f"problem_{problem_id}"
    folder.mkdir(parents=True)
    chunks = [{"chunk": text, "chunk_idx": i} for i, text in enumerate(("One.", "Two."))]
    for name, value in (
        ("problem.json", {"problem": f"sum {problem_id}"}),
        ("base_solution.json", {"prompt": PROMPT, "solution": SOLUTION}),
        ("chunks_labeled.json", chunks),
    ):
        folder.joinpath(name).write_text(json.dumps(value))
    return folder


@pytest.fixture
def mirror(tmp_path: Path) -> FolderRollouts:
    for problem_id in (30, 4, 100):
        write_problem(tmp_path, problem_id)
    return FolderRollouts(tmp_path)


def study(**changes: object) -> Rollouts:
    source = MirrorSource(kind="mirror", folder="unused")
    return Rollouts.model_validate({"source": source, "sampling": "t1", **changes})


# --- choosing


@given(
    available=st.sets(st.integers(0, 999), min_size=1).map(list),
    wanted=st.integers(1, 40),
    seed=st.integers(0, 5),
)
def test_a_sample_does_not_depend_on_the_order_of_the_listing(
    available: list[int], wanted: int, seed: int
) -> None:
    options = study(max_problems=wanted, sample_seed=seed)

    chosen = choose_problems(available, options)

    assert chosen == choose_problems(available[::-1], options)
    assert chosen == sorted(set(chosen) & set(available))
    assert len(chosen) == min(wanted, len(available))


def test_the_sample_is_the_one_that_users_know() -> None:
    chosen = choose_problems(PUBLISHED[::-1], study(max_problems=5, sample_seed=0))

    assert chosen == sorted(random.Random(0).sample(PUBLISHED, 5)) == [1591, 3360, 3935, 4019, 4605]


def test_requested_problems_stay_in_even_when_absent() -> None:
    assert choose_problems([1, 2, 3], study(problem_ids=(9, 2))) == [2, 9]


# --- reading


def test_tables_are_ordered_and_complete(mirror: FolderRollouts) -> None:
    tables = read_rollouts(mirror, MODEL, study(), SETTING)

    assert tables.problems["problem_id"].to_list() == [4, 30, 100]
    assert tables.sentences.select("problem_id", "sentence_idx").rows() == [
        (p, i) for p in (4, 30, 100) for i in (0, 1)
    ]
    assert tables.skipped.height == 0


def test_a_bad_problem_is_skipped_with_its_reason_or_fails(mirror: FolderRollouts) -> None:
    folder = mirror.folder / "tiny" / "t1" / SETTING
    folder.joinpath("problem_30", "problem.json").write_text('{"problem": 3}')
    folder.joinpath("problem_4", "chunks_labeled.json").unlink()
    options = study(problem_ids=(4, 30, 77, 100))

    tables = read_rollouts(mirror, MODEL, options, SETTING)

    assert tables.problems["problem_id"].to_list() == [100]
    skipped = tables.skipped.select("problem_id", "stage", "error", "what").rows()
    assert skipped == [
        (4, "rollouts", "DataError", "problem 4 has no chunks_labeled.json"),
        (
            30,
            "rollouts",
            "SchemaError",
            "1 field(s) break the dataset's layout: $.problem: found 3, want a text that is not "
            "blank",
        ),
        (77, "rollouts", "DataError", "no problem 77 (there is: 4, 30, 100)"),
    ]
    assert "problem_30/problem.json" in tables.skipped["where"][1]
    assert "$.problem: found 3" in tables.skipped["where"][1]
    assert tables.skipped["fix"].null_count() == 0
    with pytest.raises(DataError, match="problem 4 has no"):
        read_rollouts(mirror, MODEL, options.model_copy(update={"on_bad_problem": "fail"}), SETTING)


def test_nothing_readable_gives_the_first_reasons(mirror: FolderRollouts) -> None:
    for path in mirror.folder.rglob("base_solution.json"):
        path.write_text("")

    with pytest.raises(NotEnoughDataError) as caught:
        read_rollouts(mirror, MODEL, study(), SETTING)

    assert "none of 3 problem(s) could be read (problem 4: the file is empty" in caught.value.what
    assert "problem_4/base_solution.json" in caught.value.what
    assert caught.value.fix


def test_a_setting_without_problems_is_not_enough(mirror: FolderRollouts) -> None:
    shutil.rmtree(mirror.folder / "tiny" / "t1" / SETTING)
    mirror.folder.joinpath("tiny", "t1", SETTING).mkdir()

    with pytest.raises(NotEnoughDataError, match="no problem_<id> folder in tiny/t1/correct"):
        read_rollouts(mirror, MODEL, study(), SETTING)


class CutOff(FolderRollouts):
    """A source whose connection is lost after the listing."""

    def fetch(
        self, rollouts_dir: str, sampling: str, setting: str, problem_id: int, name: str
    ) -> Path:
        if problem_id == 100:
            raise SourceUnavailableError("cannot fetch", "somewhere", "check the connection")
        return super().fetch(rollouts_dir, sampling, setting, problem_id, name)


def test_a_lost_connection_is_never_a_bad_problem(mirror: FolderRollouts) -> None:
    source = CutOff(mirror.folder)

    with pytest.raises(SourceUnavailableError, match="check the connection"):
        read_rollouts(source, MODEL, study(on_bad_problem="skip"), SETTING)
    with pytest.raises(SourceUnavailableError):
        content_digest(source, MODEL, study(), SETTING)


# --- digest


def test_the_digest_follows_the_bytes_and_not_the_place(
    mirror: FolderRollouts, tmp_path_factory: pytest.TempPathFactory
) -> None:
    digest = content_digest(mirror, MODEL, study(), SETTING)
    moved = tmp_path_factory.mktemp("moved") / "mirror"
    shutil.copytree(mirror.folder, moved)
    assert content_digest(FolderRollouts(moved), MODEL, study(), SETTING) == digest

    seen = {digest}
    path = moved / "tiny" / "t1" / SETTING / "problem_4" / "problem.json"
    for change in (
        lambda: path.write_text(path.read_text() + " "),
        path.unlink,
        path.mkdir,
        lambda: write_problem(moved, 5),
    ):
        change()
        seen.add(content_digest(FolderRollouts(moved), MODEL, study(), SETTING))
    assert len(seen) == 5


def test_the_digest_covers_the_chosen_problems_only(mirror: FolderRollouts) -> None:
    options = study(problem_ids=(4, 30))
    digest = content_digest(mirror, MODEL, options, SETTING)

    shutil.rmtree(mirror.folder / "tiny" / "t1" / SETTING / "problem_100")

    assert content_digest(mirror, MODEL, options, SETTING) == digest
    assert content_digest(mirror, MODEL, study(problem_ids=(4,)), SETTING) != digest


# --- the published dataset


@pytest.mark.real_data
def test_reads_every_published_problem(real_rollouts: Path) -> None:
    options = Rollouts(source=MirrorSource(kind="mirror", folder=str(real_rollouts)))
    source = open_source(options)
    sizes = {}
    for name in MODELS:
        model = MODEL.model_copy(update={"rollouts_dir": name})
        for setting in SETTINGS:
            tables = read_rollouts(source, model, options, setting)
            assert tables.skipped.height == 0
            assert tables.problems["problem_id"].to_list() == [330, 1591, 2189, 2236, 3448, 6998]
            is_correct = setting == "correct_base_solution"
            assert set(tables.problems["is_correct"]) == {is_correct}
            sizes[name, setting] = tables.sentences.height
            for row in tables.problems.iter_rows(named=True):
                thinking = row["base_text"][row["thinking_start_char"] : row["thinking_end_char"]]
                own = tables.sentences.filter(problem_id=row["problem_id"])
                blind = "".join("".join(own["sentence"]).split())
                assert blind == "".join(thinking.split())
    assert list(sizes.values()) == [824, 549, 701, 891]
