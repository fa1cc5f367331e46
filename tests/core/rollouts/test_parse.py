from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from taprobe_core.errors import DataError, SchemaError
from taprobe_core.rollouts.parse import MEASURES, ProblemRecord, parse_problem
from taprobe_core.rollouts.sources import FILE_NAMES

PROMPT = "Problem: 1 + 1. Solution: \n<think>\n"
SOLUTION = "First one.\n\nThen two.\n</think>\n\\boxed{2}"
STATEMENT = {
    "problem": "1 + 1",
    "level": "Level 5",
    "type": "Algebra",
    "gt_solution": "2",
    "gt_answer": "2",
    "nickname": "Sum",
}
BASE = {
    "prompt": PROMPT,
    "solution": SOLUTION,
    "full_cot": PROMPT + SOLUTION,
    "answer": "2",
    "is_correct": True,
}


def chunk(index: int, text: str, **changes: Any) -> dict[str, Any]:
    row = {
        "chunk": text,
        "chunk_idx": index,
        "function_tags": ["active_computation"],
        "depends_on": [str(i) for i in range(index)],
        **dict.fromkeys(MEASURES, 0.25),
        "summary": "add",
    }
    return {key: value for key, value in {**row, **changes}.items() if value is not ...}


CHUNKS = [chunk(0, "First one."), chunk(1, "Then two.")]


def parse(
    folder: Path, statement: Any = STATEMENT, base: Any = BASE, chunks: Any = CHUNKS
) -> ProblemRecord:
    folder.mkdir(exist_ok=True)
    files = {name: folder / name for name in FILE_NAMES}
    for path, value in zip(files.values(), (statement, base, chunks), strict=True):
        path.write_text(json.dumps(value))
    return parse_problem(files, 7)


def faults(folder: Path, **files: Any) -> list[str]:
    with pytest.raises(SchemaError) as caught:
        parse(folder, **files)
    assert "Fix: " in str(caught.value)
    return list(caught.value.faults)


def test_a_whole_problem(tmp_path: Path) -> None:
    record = parse(tmp_path)

    row = record.problem
    thinking = row["base_text"][row["thinking_start_char"] : row["thinking_end_char"]]
    assert thinking == "\nFirst one.\n\nThen two.\n"
    assert row["prompt"] == PROMPT
    assert (row["problem_id"], row["n_sentences"], row["subject"]) == (7, 2, "Algebra")
    assert (row["answer"], row["is_correct"], row["nickname"]) == ("2", True, "Sum")
    assert [s["sentence"] for s in record.sentences] == ["First one.", "Then two."]
    assert [s["depends_on"] for s in record.sentences] == [[], [0]]
    assert record.sentences[1]["counterfactual_importance_accuracy"] == 0.25


def test_what_may_be_absent(tmp_path: Path) -> None:
    bare = [{"chunk": "First one.", "chunk_idx": 0}]
    base = {"prompt": PROMPT, "solution": SOLUTION, "error": None}

    record = parse(tmp_path, {"problem": "1 + 1", "extra": [1]}, base, bare)

    assert record.problem["nickname"] is None
    assert record.problem["gt_answer"] is None
    assert record.problem["is_correct"] is None
    assert record.problem["base_text"] == PROMPT + SOLUTION
    row = record.sentences[0]
    assert (row["function_tag"], row["depends_on"], row["summary"]) == ("unknown", [], None)
    assert all(row[name] is None for name in MEASURES)


def test_an_empty_tag_list_is_unknown(tmp_path: Path) -> None:
    record = parse(tmp_path, chunks=[chunk(0, "First one.", function_tags=[])])

    assert record.sentences[0]["function_tag"] == "unknown"


def test_the_text_may_come_from_full_cot_alone(tmp_path: Path) -> None:
    record = parse(tmp_path, base={"prompt": PROMPT, "full_cot": PROMPT + SOLUTION})

    assert record.problem["base_text"] == PROMPT + SOLUTION


def test_a_trace_that_never_closes_its_thinking_reaches_to_the_end(tmp_path: Path) -> None:
    record = parse(tmp_path, base={"prompt": PROMPT, "solution": "Cut of"})

    row = record.problem
    assert row["base_text"][row["thinking_start_char"] : row["thinking_end_char"]] == "\nCut of"


def test_all_faults_of_a_file_come_at_once_with_their_path(tmp_path: Path) -> None:
    chunks = [
        chunk(0, "First one.", accuracy=1.5, overdeterminedness=[0.5]),
        chunk(2, "Then two.", function_tags="plan", counterfactual_importance_accuracy=-1.1),
        chunk(2, " ", chunk=7, accuracy=True),
        "a sentence",
        chunk(4, "Last.", different_trajectories_fraction=10**400),
    ]

    found = faults(tmp_path, chunks=chunks)

    assert found[:8] == [
        "$[0].accuracy: found 1.5, want a number in [0, 1] or null",
        "$[0].overdeterminedness: found [0.5], want a number in [0, 1] or null",
        "$[1].chunk_idx: found 2, want 1, the row's place",
        "$[1].function_tags: found 'plan', want a list of texts or null",
        "$[1].counterfactual_importance_accuracy: found -1.1, want a number in [-1, 1] or null",
        "$[2].chunk: found 7, want a text that is not blank",
        "$[2].accuracy: found True, want a number in [0, 1] or null",
        "$[3]: found 'a sentence', want an object",
    ]
    assert len(found) == 9
    assert found[-1].startswith("$[4].different_trajectories_fraction: found 1000")


def test_many_faults_are_counted_not_listed(tmp_path: Path) -> None:
    found = faults(tmp_path, chunks=[{"chunk": "Text."}] * 25)

    assert found[0] == "$[0].chunk_idx: found nothing, want 0, the row's place"
    assert found[-1] == "... and 5 more"
    assert len(found) == 21


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"prompt": None}, "$.prompt: found null, want a text that is not blank"),
        ({"solution": "Other"}, "$.full_cot: found '...First one."),
        ({"solution": SOLUTION + "!"}, f"prompt + solution (char {len(PROMPT + SOLUTION)})"),
        ({"solution": None, "full_cot": "x"}, "want prompt + solution (char 0)"),
        ({"solution": None, "full_cot": None}, "$.solution: found nothing, want a text (or full"),
        (
            {"prompt": "No tag.", "solution": "2", "full_cot": None},
            "$.prompt: found no <think> that opens the reasoning",
        ),
        ({"solution": "\n</think>", "full_cot": None}, "$.solution: found no text behind <think>"),
    ],
)
def test_faults_of_the_base_solution(tmp_path: Path, changes: dict[str, Any], fault: str) -> None:
    found = faults(tmp_path, base={**BASE, **changes})

    assert any(fault in line for line in found), found


@pytest.mark.parametrize(
    ("files", "fault"),
    [
        ({"statement": [STATEMENT]}, "$: found [{'problem': '1 + 1'"),
        ({"statement": {**STATEMENT, "problem": " "}}, "$.problem: found ' '"),
        ({"base": None}, "$: found null, want an object"),
        ({"chunks": []}, "$: found [], want a list of at least one sentence"),
        ({"chunks": {"0": {}}}, "$: found an object, want a list"),
        ({"chunks": [chunk(0, "A \udc00.")]}, "$[0].chunk: found 'A \\udc00.'"),
        ({"chunks": [chunk(0, "A.", function_tags=["\udc00"])]}, "$[0].function_tags"),
    ],
)
def test_faults_of_the_other_files(tmp_path: Path, files: dict[str, Any], fault: str) -> None:
    assert any(line.startswith(fault) for line in faults(tmp_path, **files))


def test_what_nothing_reads_costs_nothing_and_is_noted(tmp_path: Path) -> None:
    chunks = [
        chunk(0, "First one.", depends_on=["the start"], resampling_importance_kl=-math.inf),
        chunk(1, "Then two.", summary=3, forced_importance_accuracy=True, reviewer={"ok": [{}]}),
    ]
    statement = {**STATEMENT, "level": 5, "note": math.nan}

    record = parse(tmp_path, statement, {**BASE, "answer": 2, "is_correct": "yes"}, chunks)

    assert record.notes == [
        "problem.json: $.level: found 5, want a text or null",
        "base_solution.json: $.answer: found 2, want a text or null",
        "base_solution.json: $.is_correct: found 'yes', want true, false or null",
        "chunks_labeled.json: $[0].depends_on: found ['the start'], want a list of sentence "
        "indices or null",
        "chunks_labeled.json: $[0].resampling_importance_kl: found the token -Infinity, which is "
        "not a number, want a number of at least 0 or null",
        "chunks_labeled.json: $[1].forced_importance_accuracy: found True, want a number in "
        "[-1, 1] or null",
        "chunks_labeled.json: $[1].summary: found 3, want a text or null",
    ]
    first, second = record.sentences
    assert (first["depends_on"], first["resampling_importance_kl"]) == ([], None)
    assert (second["summary"], second["forced_importance_accuracy"]) == (None, None)
    assert first["accuracy"] == second["forced_importance_kl"] == 0.25


def test_the_measure_that_becomes_the_label_is_read(tmp_path: Path) -> None:
    parse(tmp_path, chunks=[chunk(0, "First one.", forced_importance_accuracy=1.3), CHUNKS[1]])
    files = {name: tmp_path / name for name in FILE_NAMES}

    with pytest.raises(SchemaError) as caught:
        parse_problem(files, 7, "forced_importance_accuracy")

    (fault,) = caught.value.faults
    assert fault == "$[0].forced_importance_accuracy: found 1.3, want a number in [-1, 1] or null"


@pytest.mark.parametrize(
    ("name", "stated", "read"),
    [
        ("accuracy", 1.0000001, 1.0),
        ("overdeterminedness", -3e-17, 0.0),
        ("different_trajectories_fraction", 1 + 2**-52, 1.0),
        ("counterfactual_importance_accuracy", -1.0000000000000002, -1.0),
        ("counterfactual_importance_kl", -1e-8, 0.0),
        ("accuracy", 0.9999999, 0.9999999),
    ],
)
def test_rounding_beyond_a_bound_is_the_bound(
    tmp_path: Path, name: str, stated: float, read: float
) -> None:
    record = parse(tmp_path, chunks=[chunk(0, "First one.", **{name: stated}), CHUNKS[1]])

    assert record.sentences[0][name] == read
    assert record.notes == []


@pytest.mark.parametrize("value", [1.00001, -0.3, 1.2, -1e-5])
def test_what_is_more_than_rounding_is_a_fault(tmp_path: Path, value: float) -> None:
    (found,) = faults(tmp_path, chunks=[CHUNKS[0], chunk(1, "Then two.", accuracy=value)])

    assert found == f"$[1].accuracy: found {value}, want a number in [0, 1] or null"


@pytest.mark.parametrize("nothing", [None, "", "  ", False, [], {}, math.nan])
def test_an_error_that_says_nothing_is_none(tmp_path: Path, nothing: Any) -> None:
    assert parse(tmp_path, base={**BASE, "error": nothing}).problem["n_sentences"] == 2


@pytest.mark.parametrize("error", ["timeout", {"code": 503}, ["a"], True, 1, math.inf])
def test_an_error_that_says_something_fails_the_problem(tmp_path: Path, error: Any) -> None:
    with pytest.raises(DataError, match="failed upstream"):
        parse(tmp_path, base={**BASE, "error": error})


def test_a_repeated_key_matters_where_it_is_read(tmp_path: Path) -> None:
    parse(tmp_path)
    path = tmp_path / "chunks_labeled.json"
    text = path.read_text()
    files = {name: tmp_path / name for name in FILE_NAMES}
    path.write_text(text.replace('"summary": "add"', '"summary": "a", "summary": "b"', 1))
    record = parse_problem(files, 7)
    assert [note.split(": ", 1)[1] for note in record.notes] == [
        "$[0].summary: found the key 'summary' twice, want a text or null"
    ]

    path.write_text(text.replace('"chunk_idx": 1', '"chunk_idx": 1, "chunk_idx": 1', 1))
    with pytest.raises(SchemaError, match="the key 'chunk_idx' twice"):
        parse_problem(files, 7)


EXPLAINED = "Reason between <think> and </think>. Solve 1 + 1.\n"


@pytest.mark.parametrize(
    ("prompt", "solution", "thinking"),
    [
        (EXPLAINED + "<think>\n", SOLUTION, "\nFirst one.\n\nThen two.\n"),
        (EXPLAINED, "<think>" + SOLUTION, "First one.\n\nThen two.\n"),
        (EXPLAINED, SOLUTION, "First one.\n\nThen two.\n"),
        ("Solve.", SOLUTION, "First one.\n\nThen two.\n"),
        ("Solve.", "First one. Then two.", "First one. Then two."),
        ("Solve. <THINK>", "First one. Then two.</Think>2", "First one. Then two."),
        (PROMPT, "<think>\n" + SOLUTION, "\nFirst one.\n\nThen two.\n"),
        (PROMPT + "First", " one. Then two.</think>", "\nFirst one. Then two."),
        (PROMPT, SOLUTION + "<think>And</think>", "\nFirst one.\n\nThen two.\n"),
        ("E.g. <think>First one. Then two.</think>2. <think>", "First one. Then two.", None),
    ],
)
def test_the_reasoning_is_where_the_sentences_are(
    tmp_path: Path, prompt: str, solution: str, thinking: str | None
) -> None:
    row = parse(tmp_path, base={"prompt": prompt, "solution": solution}).problem

    start, end = row["thinking_start_char"], row["thinking_end_char"]
    assert row["base_text"][start:end] == (solution if thinking is None else thinking)
    assert start >= len(prompt.rstrip()) or prompt.endswith("First") or "<think>\n" in prompt


def test_tags_that_the_reasoner_writes_belong_to_the_reasoning(tmp_path: Path) -> None:
    said = ["Use </think> to stop.", "Or <think> to go on."]
    solution = " ".join(said) + "\n</think>\nSo </think> it is."

    row = parse(
        tmp_path,
        base={"prompt": PROMPT, "solution": solution},
        chunks=[chunk(index, text) for index, text in enumerate(said)],
    ).problem

    found = row["base_text"][row["thinking_start_char"] : row["thinking_end_char"]]
    assert found == "\n" + " ".join(said) + "\n"


def test_a_base_solution_that_failed_upstream_says_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"failed upstream: 'timeout' in .*base_solution\.json, \$"):
        parse(tmp_path, base={"prompt": PROMPT, "error": "timeout"})


@given(texts=st.lists(st.text("ab ", min_size=1).filter(str.strip), min_size=1, max_size=4))
def test_the_text_hash_tells_the_sentences_apart(
    texts: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp() / "hashed"

    def digest(sentences: list[str]) -> str:
        chunks = [chunk(i, text) for i, text in enumerate(sentences)]
        return str(parse(folder, chunks=chunks).problem["text_sha256"])

    assert digest(texts) == digest(list(texts))
    assert digest(texts) != digest([*texts, "a"])
    assert digest(["".join(texts), "b"]) != digest(["".join(texts) + "b"])
