from __future__ import annotations

import json
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
        chunk(0, "First one.", accuracy=1.5, depends_on=["x"]),
        chunk(2, "Then two.", function_tags="plan", resampling_importance_kl=-0.1),
        chunk(2, " ", chunk=7, accuracy=True),
        "a sentence",
        chunk(4, "Last.", summary=3, depends_on=[True], forced_importance_kl=10**400),
    ]

    found = faults(tmp_path, chunks=chunks)

    assert found[:8] == [
        "$[0].depends_on: found ['x'], want a list of sentence indices or null",
        "$[0].accuracy: found 1.5, want a number in [0, 1] or null",
        "$[1].chunk_idx: found 2, want 1, the row's place",
        "$[1].function_tags: found 'plan', want a list of texts or null",
        "$[1].resampling_importance_kl: found -0.1, want a number of at least 0 or null",
        "$[2].chunk: found 7, want a text that is not blank",
        "$[2].accuracy: found True, want a number in [0, 1] or null",
        "$[3]: found 'a sentence', want an object",
    ]
    assert len(found) == 11
    assert found[-1].startswith("$[4].summary: found 3")


def test_many_faults_are_counted_not_listed(tmp_path: Path) -> None:
    found = faults(tmp_path, chunks=[{"chunk": "Text."}] * 25)

    assert found[0] == "$[0].chunk_idx: found nothing, want 0, the row's place"
    assert found[-1] == "... and 5 more"
    assert len(found) == 21


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"prompt": None}, "$.prompt: found null, want a text that is not blank"),
        ({"is_correct": "yes"}, "$.is_correct: found 'yes', want true, false or null"),
        ({"answer": 2}, "$.answer: found 2, want a text or null"),
        ({"solution": "Other"}, "$.full_cot: found '...First one."),
        ({"solution": SOLUTION + "!"}, f"prompt + solution (char {len(PROMPT + SOLUTION)})"),
        ({"solution": None, "full_cot": "x"}, "want prompt + solution (char 0)"),
        ({"solution": None, "full_cot": None}, "$.solution: found nothing, want a text (or full"),
        ({"prompt": "No tag.", "full_cot": None}, "$.prompt: found no <think>"),
        ({"solution": "\n</think>", "full_cot": None}, "$.solution: found no text behind <think>"),
        ({"answer": "\ud800"}, "$.answer: found '\\ud800', want whole characters"),
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
        ({"statement": {**STATEMENT, "level": {"a": 1}}}, "$.level: found an object"),
        ({"base": None}, "$: found null, want an object"),
        ({"chunks": []}, "$: found [], want a list of at least one sentence"),
        ({"chunks": {"0": {}}}, "$: found an object, want a list"),
        ({"chunks": [chunk(0, "A \udc00.")]}, "$[0].chunk: found 'A \\udc00.'"),
        ({"chunks": [chunk(0, "A.", function_tags=["\udc00"])]}, "$[0].function_tags"),
    ],
)
def test_faults_of_the_other_files(tmp_path: Path, files: dict[str, Any], fault: str) -> None:
    assert any(line.startswith(fault) for line in faults(tmp_path, **files))


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
