"""Every way a rollouts folder can be wrong, through the one call that a study makes.

Each case breaks one thing in a sound folder. The message must name the place, what was found and a
fix; under `skip` the other problems must come through untouched.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from taprobe_core.errors import DataError, NotEnoughDataError, TaprobeError
from taprobe_core.rollouts import RolloutTables, open_source, read_rollouts
from taprobe_core.study.config import MirrorSource, Model, Rollouts, StandInCheckpoint

SAMPLING, SETTING = "temperature_0.6_top_p_0.95", "correct_base_solution"
BAD, GOOD = 330, 1591
Break = Callable[[Path], object]


def write_problem(folder: Path) -> None:
    folder.mkdir(parents=True)
    prompt, sentences = "Solve. \n<think>\n", ["First one.", "Then two.", "So three."]
    solution = " ".join(sentences) + "\n</think>\n\\boxed{3}"
    base = {"prompt": prompt, "solution": solution, "full_cot": prompt + solution}
    chunks = [
        {
            "chunk": text,
            "chunk_idx": index,
            "function_tags": ["plan_generation"],
            "depends_on": [],
            "accuracy": 0.5,
            "counterfactual_importance_accuracy": 0.1,
        }
        for index, text in enumerate(sentences)
    ]
    for name, value in (
        ("problem.json", {"problem": "1 + 2"}),
        ("base_solution.json", base),
        ("chunks_labeled.json", chunks),
    ):
        (folder / name).write_text(json.dumps(value))


@pytest.fixture
def mirror(tmp_path: Path) -> Path:
    for problem_id in (BAD, GOOD):
        write_problem(tmp_path / "llama" / SAMPLING / SETTING / f"problem_{problem_id}")
    return tmp_path


def read(folder: Path, rollouts_dir: str = "llama", **changes: Any) -> RolloutTables:
    options = Rollouts(source=MirrorSource(kind="mirror", folder=str(folder)), **changes)
    checkpoint = StandInCheckpoint(kind="stand_in", architecture="llama")
    model = Model(rollouts_dir=rollouts_dir, checkpoint=checkpoint, n_layers=4)
    return read_rollouts(open_source(options), model, options, SETTING)


def edit(name: str, change: Callable[[Any], Any]) -> Break:
    def apply(folder: Path) -> None:
        value = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(change(value)))

    return apply


def raw(name: str, change: Callable[[bytes], bytes]) -> Break:
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def row(index: int, **values: Any) -> Break:
    def change(chunks: list[dict[str, Any]]) -> list[dict[str, Any]]:
        chunks[index].update(values)
        return chunks

    return edit("chunks_labeled.json", change)


CHUNKS, BASE, PROBLEM = "chunks_labeled.json", "base_solution.json", "problem.json"

CASES: dict[str, tuple[Break, str, str]] = {
    "absent file": (lambda f: (f / CHUNKS).unlink(), "problem_330", "has no chunks_labeled.json"),
    "folder for a file": (
        lambda f: ((f / PROBLEM).unlink(), (f / PROBLEM).mkdir()), PROBLEM, "a folder"),
    "dangling link": (
        lambda f: ((f / BASE).unlink(), (f / BASE).symlink_to("gone")), "problem_330",
        "has no base_solution.json"),
    "empty": (raw(BASE, lambda _: b""), BASE, "the file is empty"),
    "cut": (raw(CHUNKS, lambda data: data[:200]), CHUNKS, "breaks off"),
    "cut in a character": (
        raw(PROBLEM, lambda _: '{"problem": "Zähl'.encode()[:-1] + b"\xc3"), PROBLEM, "not UTF-8"),
    "latin-1": (raw(PROBLEM, lambda _: b'{"problem": "\xe4"}'), PROBLEM, "byte 0xe4 at offset 13"),
    "nul bytes": (raw(BASE, lambda data: b"\0" * len(data)), BASE, "not JSON"),
    "web page": (raw(CHUNKS, lambda _: b"<!DOCTYPE html><html>"), CHUNKS, "a web page"),
    "lfs pointer": (
        raw(CHUNKS, lambda _: b"version https://git-lfs.github.com/spec/v1\n"), CHUNKS, "Git LFS"),
    "nan": (
        raw(CHUNKS, lambda data: data.replace(b"0.5", b"NaN")), CHUNKS, "the token NaN"),
    "overflow": (raw(CHUNKS, lambda data: data.replace(b"0.5", b"1e400")), CHUNKS, "1e400"),
    "repeated key": (
        raw(PROBLEM, lambda _: b'{"problem": "a", "problem": "b"}'), PROBLEM, "'problem' twice"),
    "nesting bomb": (raw(CHUNKS, lambda _: b"[" * 10**6), CHUNKS, "nested too deeply"),
    "list for object": (edit(BASE, lambda value: [value]), BASE, "$: found"),
    "object for list": (
        edit(CHUNKS, lambda value: {"chunks": value}), CHUNKS, "$: found an object"),
    "no sentences": (edit(CHUNKS, lambda _: []), CHUNKS, "at least one sentence"),
    "null file": (edit(PROBLEM, lambda _: None), PROBLEM, "$: found null"),
    "missing key": (
        edit(BASE, lambda v: {k: v[k] for k in v if k != "prompt"}), BASE,
        "$.prompt: found nothing"),
    "wrong type": (row(1, accuracy="0.5"), CHUNKS, "$[1].accuracy: found '0.5'"),
    "truth for number": (row(1, accuracy=True), CHUNKS, "$[1].accuracy: found True"),
    "out of range": (row(2, accuracy=1.25), CHUNKS, "$[2].accuracy: found 1.25"),
    "percent": (
        row(0, counterfactual_importance_accuracy=-37.5), CHUNKS,
        "$[0].counterfactual_importance_accuracy: found -37.5, want a number in [-1, 1]"),
    "index gap": (row(2, chunk_idx=3), CHUNKS, "$[2].chunk_idx: found 3, want 2"),
    "index repeats": (row(2, chunk_idx=1), CHUNKS, "$[2].chunk_idx: found 1, want 2"),
    "blank sentence": (row(1, chunk=" \n"), CHUNKS, "$[1].chunk: found ' \\n'"),
    "half a surrogate": (row(1, chunk="\ud83d"), CHUNKS, "$[1].chunk"),
    "text was edited": (
        edit(BASE, lambda v: {**v, "full_cot": v["full_cot"] + "."}), BASE, "$.full_cot: found"),
    "no reasoning": (
        edit(BASE, lambda v: {"prompt": "Solve.", "solution": "3"}), BASE, "no <think>"),
    "links in a circle": (
        lambda f: ((f / BASE).unlink(), (f / BASE).symlink_to(f / BASE)), BASE,
        "cannot be reached (Too many levels"),
    "a pipe": (lambda f: ((f / BASE).unlink(), os.mkfifo(f / BASE)), BASE, "special file"),
    "huge": (
        lambda f: os.truncate(f / CHUNKS, 65 * 2**20), CHUNKS, "larger than 67,108,864 bytes"),
    "no files": (
        lambda f: [path.unlink() for path in f.iterdir()], "problem_330", "has no problem.json"),
    "a label twice": (
        raw(CHUNKS, lambda data: data.replace(b'"accuracy": 0.5', b'"accuracy": 1, "accuracy": 0')),
        CHUNKS, "$[0].accuracy: found the key 'accuracy' twice"),
    "30 digits": (row(1, overdeterminedness=10**30), CHUNKS, "$[1].overdeterminedness: found 1000"),
    "a text of lists": (row(1, chunk=[["First"]]), CHUNKS, "$[1].chunk: found [['First']]"),
    "failed upstream": (
        edit(BASE, lambda _: {"error": "API timeout"}), BASE, "failed upstream: 'API timeout'"),
}  # fmt: skip


@pytest.mark.parametrize(("break_it", "place", "found"), CASES.values(), ids=CASES.keys())
def test_a_broken_problem_says_where_what_and_how_to_fix(
    mirror: Path, break_it: Break, place: str, found: str
) -> None:
    sound = read(mirror, problem_ids=(GOOD,))
    break_it(mirror / "llama" / SAMPLING / SETTING / f"problem_{BAD}")

    tables = read(mirror)
    with pytest.raises(DataError) as caught:
        read(mirror, on_bad_problem="fail")

    text = str(caught.value)
    assert f"problem_{BAD}" in text
    assert place in text
    assert found in text
    assert "\nFix: " in text
    assert len(text) < 1000
    assert tables.skipped["problem_id"].to_list() == [BAD]
    shown = tables.skipped.select("what", "where").row(0)
    assert found in " ".join(shown)
    assert tables.problems.equals(sound.problems)
    assert tables.sentences.equals(sound.sentences)


def test_one_error_lists_all_faults_of_the_file(mirror: Path) -> None:
    folder = mirror / "llama" / SAMPLING / SETTING / f"problem_{BAD}"
    for break_it in (row(0, accuracy=2), row(1, chunk=None), row(2, function_tags={})):
        break_it(folder)

    with pytest.raises(DataError) as caught:
        read(mirror, on_bad_problem="fail")

    for fault in ("$[0].accuracy", "$[1].chunk", "$[2].function_tags"):
        assert f"\n  - {fault}: found " in str(caught.value)


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda f: read(f / "gone"), DataError, "no such folder in .*gone\nFix: .*source.folder"),
        (lambda f: read(f / "llama"), DataError,
         r"no folder 'llama' \(there is: temperature_0\.6_top_p_0\.95\)"),
        (lambda f: read(f, "lama"), DataError, "did you mean 'llama'"),
        (lambda f: read(f, sampling="temperature_0.6"), DataError,
         "no folder 'temperature_0.6' .*\nFix: correct rollouts.sampling"),
        (lambda f: read(f, problem_ids=(7, 8)), NotEnoughDataError,
         r"none of 2 problem\(s\) could be read \(problem 7: no problem 7 \(there is: 330, 1591\)"),
    ],
)  # fmt: skip
def test_a_wrong_path_says_which_part_is_wrong(
    mirror: Path, call: Callable[[Path], object], kind: type[TaprobeError], message: str
) -> None:
    with pytest.raises(kind, match=message) as caught:
        call(mirror)

    assert type(caught.value) is kind
    assert caught.value.fix


def test_every_problem_broken_is_not_enough_data(mirror: Path) -> None:
    for path in mirror.rglob("chunks_labeled.json"):
        path.write_bytes(path.read_bytes()[:50])

    with pytest.raises(NotEnoughDataError) as caught:
        read(mirror)

    assert "none of 2 problem(s) could be read (problem 330: the file breaks off" in str(
        caught.value
    )
    assert "problem_330/chunks_labeled.json, line 1" in str(caught.value)


def test_a_folder_emptied_of_problems_is_not_enough_data(mirror: Path) -> None:
    for problem_id in (BAD, GOOD):
        shutil.rmtree(mirror / "llama" / SAMPLING / SETTING / f"problem_{problem_id}")

    with pytest.raises(NotEnoughDataError, match="no problem_<id> folder in llama/"):
        read(mirror)


UNREAD = (
    b'"loss": NaN, "author": "\\ud800", "tags": {"a": 1, "a": 2}, "seed": ' + b"7" * 5000,
    b'"counterfactual_importance_kl": -Infinity',
    b'"resampling_importance_accuracy": 1e400',
    b'"forced_importance_kl": "none"',
    b'"summary": {"by": [NaN]}, "summary": 2',
    b'"depends_on": ["the first"]',
)


@pytest.mark.parametrize("unread", UNREAD)
def test_what_nothing_reads_costs_no_problem(mirror: Path, unread: bytes) -> None:
    sound = read(mirror)
    path = mirror / "llama" / SAMPLING / SETTING / f"problem_{BAD}" / CHUNKS
    path.write_bytes(path.read_bytes().replace(b'"accuracy"', unread + b', "accuracy"'))

    tables = read(mirror, on_bad_problem="fail")

    assert tables.skipped.is_empty()
    assert tables.sentences.drop("depends_on").equals(sound.sentences.drop("depends_on"))
    assert set(tables.notes["problem_id"]) <= {BAD}
    n_noted = 0 if b"loss" in unread else 3
    assert len(tables.notes) == n_noted


def test_a_folder_that_may_not_be_searched_costs_its_problem(
    mirror: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Path.stat

    def stat(self: Path, **options: Any) -> os.stat_result:
        if f"problem_{BAD}/" in str(self):
            raise PermissionError(13, "Permission denied", str(self))
        return real(self, **options)

    monkeypatch.setattr(Path, "stat", stat)

    (row,) = read(mirror).skipped.iter_rows(named=True)

    assert row["what"] == "the file cannot be reached (Permission denied)"
    assert f"rollouts.exclude_ids: [{BAD}]" in row["fix"]


def test_an_excluded_problem_is_not_read_whatever_names_it(mirror: Path) -> None:
    (mirror / "llama" / SAMPLING / SETTING / f"problem_{BAD}" / CHUNKS).unlink()

    for more in ({}, {"problem_ids": (BAD, GOOD)}, {"max_problems": 1}):
        tables = read(mirror, exclude_ids=(BAD,), on_bad_problem="fail", **more)
        assert tables.problems["problem_id"].to_list() == [GOOD]
    with pytest.raises(NotEnoughDataError, match=r"not excluded .*\nFix: .*rollouts.exclude_ids"):
        read(mirror, exclude_ids=(BAD, GOOD))
