"""Findings of one problem, kind by kind; then folders; then the command."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from taprobe_core.cli import EXIT_FIXABLE, EXIT_UNSOUND
from taprobe_core.errors import ConfigError, DataError, SchemaError
from taprobe_core.labels import Rollout, Solutions, published_measures
from taprobe_core.labels.audit import (
    INFORMATIONAL,
    Finding,
    audit_problem,
    audit_rollouts,
    cut_prefix,
)
from taprobe_core.labels.audit.findings import ALWAYS_RECOMPUTED, Bank, unreadable
from taprobe_core.rollouts import FolderRollouts, open_source
from taprobe_core.study.config import HubSource, MirrorSource, Rollouts

SAMPLING, SETTING = "temperature_0.6_top_p_0.95", "correct_base_solution"
TEXTS = ["Let me see.", "I will add first.", "That gives 5.", "I will add first.", "So it is 5."]
Rows = list[dict[str, Any]]


def differs(a: str, b: str) -> bool:
    return a != b


def solutions(texts: Sequence[str], index: int, answers: str, **counts: int) -> Solutions:
    """A bank with one rollout per letter of `answers`: 5 is right, a blank is no answer."""
    rollouts = [
        Rollout(letter.strip(), letter == "5", texts[index] if letter == "5" else "Another one.")
        for letter in answers
    ]
    prefix = " ".join(texts[:index])
    given = {"n_errors": 0, "n_ungraded": 0} | counts
    return Solutions(rollouts, **given, prefixes={prefix: len(rollouts) + sum(counts.values())})


def labeled(texts: Sequence[str], banks: Sequence[Bank]) -> Rows:
    """Sentences with the labels that these banks give."""
    known = [bank.rollouts if isinstance(bank, Solutions) else [] for bank in banks]
    return [
        {"problem_id": 7, "sentence_idx": index, "sentence": text, **measures}
        for index, (text, measures) in enumerate(
            zip(texts, published_measures(texts, known, differs), strict=True)
        )
    ]


@pytest.fixture
def banks() -> list[Bank]:
    answers = ["5534", "5553", "5555", "3355", "5555"]
    return [solutions(TEXTS, index, given) for index, given in enumerate(answers)]


def kinds(found: Sequence[Finding]) -> list[tuple[str, str, int]]:
    return [(finding.kind, finding.file, finding.n) for finding in found]


def test_a_sound_problem_has_no_finding(banks: list[Bank]) -> None:
    assert audit_problem(labeled(TEXTS, banks), banks, differs) == []
    assert audit_problem(labeled(TEXTS, banks), banks) == []
    assert audit_problem(labeled(TEXTS, banks), None) == []


def test_rows_without_answer_or_grade_are_counted(banks: list[Bank]) -> None:
    banks[1] = solutions(TEXTS, 1, "55 3 ", n_errors=2, n_ungraded=1)
    found = audit_problem(labeled(TEXTS, banks), banks, differs)
    file = "chunk_1/solutions.json"
    assert found == [
        Finding("error_rows", file, "2 of 8 rows failed: `error` instead of an answer", 2),
        Finding("ungraded_rows", file, "1 of 8 rows have null for `is_correct`", 1),
        Finding("empty_answers", file, "2 of 8 rows gave no answer", 2),
    ]


def test_one_absent_bank_is_a_gap_and_several_are_a_block(banks: list[Bank]) -> None:
    rows = labeled(TEXTS, banks)
    gap, block = [*banks[:1], None, *banks[2:]], [*banks[:2], None, None, None]
    assert kinds(audit_problem(rows, gap, differs)) == [("gap", "chunk_1", 1)]
    (found,) = audit_problem(rows, block, differs)
    assert found[:2] == ("missing_block", "chunk_2")
    assert (found.n, "chunk_2 to chunk_4" in found.detail) == (3, True)
    nothing = audit_problem(rows, [None] * 5, differs)
    assert kinds(nothing) == [("missing_block", "chunk_0", 5)]


def test_a_sentence_too_short_for_rollouts_misses_none(banks: list[Bank]) -> None:
    texts = [*TEXTS[:4], "Ok."]
    found = audit_problem(labeled(texts, [*banks[:4], None]), [*banks[:4], None], differs)
    assert found == []


def test_a_bank_that_cannot_be_read_is_named_with_its_reason(banks: list[Bank]) -> None:
    rows = labeled(TEXTS, banks)
    banks[2] = DataError("the file is empty", "x/chunk_2/solutions.json", "fetch it again")
    found = audit_problem(rows, banks, differs)
    assert found == [Finding("unreadable", "chunk_2/solutions.json", "the file is empty", 1)]


def test_a_schema_error_shows_its_first_faults() -> None:
    faults = [f"row {index}: answer is int" for index in range(9)]
    found = unreadable("problem.json", SchemaError("unreadable rows", "here", "fix it", faults))
    assert found.detail == "unreadable rows; " + "; ".join(faults[:3])


def prefixed(index: int, *prefixes: str) -> Solutions:
    rollouts = [Rollout("5", True, TEXTS[index])] * len(prefixes)
    return Solutions(rollouts, 0, 0, {each: prefixes.count(each) for each in prefixes})


def test_a_deletion_of_every_copy_is_told_from_another_prefix(banks: list[Bank]) -> None:
    whole, cut = " ".join(TEXTS[:3]), cut_prefix(TEXTS, 3)
    assert cut == "Let me see.  That gives 5."
    file = "chunk_3/solutions.json"
    for prefixes, detail in (
        ([cut] * 4, "4 of 4 rows continue a prefix without any 'I will add first.'"),
        ([cut, cut, whole, whole], "2 of 4 rows continue a prefix without any 'I will add first.'"),
        ([whole, "Let me see.", cut], "2 of 3 rows continue something else than the earlier"),
    ):
        banks[3] = prefixed(3, *prefixes)
        (found,) = audit_problem(labeled(TEXTS, banks), banks, differs)
        assert found[:2] == ("corrupted_prefix", file)
        assert found.detail.startswith(detail)
    banks[3] = prefixed(3)  # rows that do not state a prefix cannot be judged
    assert audit_problem(labeled(TEXTS, banks), banks, differs) == []


@given(st.lists(st.sampled_from(["One is two.", "Add them all.", "them all."]), min_size=1))
def test_a_cut_prefix_differs_exactly_where_the_text_occurs_earlier(texts: list[str]) -> None:
    for index, text in enumerate(texts):
        whole = " ".join(texts[:index])
        assert (cut_prefix(texts, index) != whole) == (text in whole)


def test_labels_of_other_rollouts_differ(banks: list[Bank]) -> None:
    rows = labeled(TEXTS, banks)
    banks[1] = solutions(TEXTS, 1, "5333")
    with_similarity, without = audit_problem(rows, banks, differs), audit_problem(rows, banks)
    # Sentence 1 itself, and sentence 0, whose importance is towards it.
    assert (
        kinds(with_similarity) == kinds(without) == [("label_mismatch", "chunks_labeled.json", 2)]
    )
    assert "accuracy of 1 (by up to 0.5)" in without[0].detail
    assert "counterfactual" not in without[0].detail
    assert "counterfactual_importance_accuracy of" in with_similarity[0].detail


def test_without_the_labels_similarity_its_measures_are_not_judged(banks: list[Bank]) -> None:
    rows = labeled(TEXTS, banks)
    for row in rows:
        row["counterfactual_importance_accuracy"] += 0.25
        row["resampling_importance_kl"] += 1.0
    assert audit_problem(rows, banks) == []
    assert kinds(audit_problem(rows, banks, differs)) == [
        ("label_mismatch", "chunks_labeled.json", 5)
    ]


def test_a_null_measure_is_no_mismatch(banks: list[Bank]) -> None:
    rows = labeled(TEXTS, banks)
    for row in rows:
        row |= dict.fromkeys(("accuracy", "resampling_importance_accuracy"))
    assert audit_problem(rows, banks, differs) == []


def test_a_successor_without_answers_is_passed_over(banks: list[Bank]) -> None:
    banks[1] = solutions(TEXTS, 1, "    ")
    rows = labeled(TEXTS, banks)
    assert [finding.kind for finding in audit_problem(rows, banks, differs)] == ["empty_answers"]
    # Which sentence follows 0 cannot be known once 2 is gone.
    banks[2] = None
    rows[0]["counterfactual_importance_accuracy"] = 0.9
    assert "label_mismatch" not in [finding.kind for finding in audit_problem(rows, banks, differs)]


def test_two_snapshots_in_one_file_break_the_identity(banks: list[Bank]) -> None:
    older = [solutions(TEXTS, index, "5353") for index in range(5)]
    rows = labeled(TEXTS, banks)[:2] + labeled(TEXTS, older)[2:]
    (found,) = audit_problem(rows, None)
    assert found[:2] == ("broken_identity", "chunks_labeled.json")
    assert "in 1 sentences, first in 1, by up to 0.5" in found.detail


ANSWERS = st.text(alphabet="5 3", min_size=1, max_size=6)


@given(
    answers=st.lists(ANSWERS, min_size=5, max_size=5),
    absent=st.sets(st.integers(0, 4)),
    changed=st.integers(0, 4),
)
def test_what_is_absent_is_found_and_never_taken_for_wrong_labels(
    answers: list[str], absent: set[int], changed: int
) -> None:
    whole: list[Bank] = [solutions(TEXTS, index, given) for index, given in enumerate(answers)]
    rows = labeled(TEXTS, whole)
    left = [None if index in absent else bank for index, bank in enumerate(whole)]
    found = audit_problem(rows, left, differs)
    n_absent = sum(finding.n for finding in found if finding.kind in {"gap", "missing_block"})
    assert n_absent == len(absent)
    assert "label_mismatch" not in {finding.kind for finding in found}
    n_empty = {f"chunk_{i}/solutions.json": answers[i].count(" ") for i in set(range(5)) - absent}
    assert {finding.file: finding.n for finding in found if finding.kind == "empty_answers"} == {
        file: n for file, n in n_empty.items() if n
    }

    rows[changed]["accuracy"] = math.nextafter(rows[changed]["accuracy"], 2) + 1e-6
    again = audit_problem(rows, left, differs)
    assert ("label_mismatch" in {each.kind for each in again}) == (changed not in absent)


def write(folder: Path, problem_id: int, banks: Sequence[Bank] | None) -> Path:
    """A problem in the dataset's layout; without banks, labels alone."""
    place = folder / "tiny" / SAMPLING / SETTING / f"problem_{problem_id}"
    place.mkdir(parents=True)
    prompt, solution = "Solve. \n<think>\n", " ".join(TEXTS) + "\n</think>\n\\boxed{5}"
    rows = labeled(TEXTS, banks or [None] * 5)
    files: dict[str, Any] = {
        "problem.json": {"problem": "2 + 3"},
        "base_solution.json": {"prompt": prompt, "solution": solution},
        "chunks_labeled.json": [
            {"chunk": row["sentence"], "chunk_idx": row["sentence_idx"]}
            | {name: row[name] for name in ALWAYS_RECOMPUTED}
            for row in rows
        ],
    }
    for index, bank in enumerate(banks or []):
        assert isinstance(bank, Solutions)
        files[f"chunk_{index}/solutions.json"] = [
            {
                "prefix_without_chunk": " ".join(TEXTS[:index]),
                "chunk_resampled": rollout.chunk_resampled,
                "answer": rollout.answer,
                "is_correct": rollout.is_correct,
            }
            for rollout in bank.rollouts
        ]
    for name, value in files.items():
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_text(json.dumps(value))
    return place


def audit(folder: Path, **changes: Any) -> tuple[list[tuple[str, str]], dict[str, Any]]:
    chosen = Rollouts(source=MirrorSource(kind="mirror", folder=str(folder)), **changes)
    findings, coverage = audit_rollouts(FolderRollouts(folder), chosen, ["tiny"], [SETTING])
    root = f"tiny/{SAMPLING}/{SETTING}/"
    files = [(row["kind"], row["file"].removeprefix(root)) for row in findings.to_dicts()]
    return files, coverage.row(0, named=True)


def test_a_folder_of_labels_alone_misses_no_rollouts(tmp_path: Path, banks: list[Bank]) -> None:
    write(tmp_path, 1, None)
    write(tmp_path, 2, None)
    found, covered = audit(tmp_path)
    assert found == []
    assert (covered["n_readable"], covered["n_sentences"], covered["n_repeated"]) == (2, 10, 2)
    assert (covered["n_banks"], covered["n_rollouts"]) == (0, 0)

    write(tmp_path, 3, banks)  # now the others lack theirs
    found, covered = audit(tmp_path)
    assert found == [("missing_block", f"problem_{i}/chunk_0") for i in (1, 2)]
    assert (covered["n_banks"], covered["n_rollouts"]) == (5, 20)
    assert audit(tmp_path, problem_ids=(3,))[0] == []


def test_files_that_stop_the_loader_are_all_named(tmp_path: Path, banks: list[Bank]) -> None:
    places = [write(tmp_path, index, banks) for index in range(4)]
    (places[0] / "problem.json").unlink()
    (places[0] / "chunks_labeled.json").unlink()
    (places[1] / "base_solution.json").write_text('{"error": "timeout"}')
    (places[2] / "chunk_4" / "solutions.json").write_text("<!doctype html>")
    (places[3] / "chunk_4" / "solutions.json").write_text('[{"answer": 5}]')
    found, covered = audit(tmp_path, problem_ids=(0, 1, 2, 3, 9))
    assert found == [
        ("unreadable", "problem_0/problem.json"),
        ("unreadable", "problem_0/chunks_labeled.json"),
        ("unreadable", "problem_1/base_solution.json"),
        ("unreadable", "problem_2/chunk_4/solutions.json"),
        ("unreadable", "problem_3/chunk_4/solutions.json"),
        *[
            ("unreadable", f"problem_9/{name}")
            for name in ("problem.json", "base_solution.json", "chunks_labeled.json")
        ],
    ]
    assert (covered["n_problems"], covered["n_readable"], covered["n_banks"]) == (5, 2, 8)


def test_values_that_nothing_reads_are_told_and_are_no_damage(
    tmp_path: Path, banks: list[Bank]
) -> None:
    place = write(tmp_path, 1, banks)
    path = place / "chunks_labeled.json"
    path.write_text(path.read_text().replace('"chunk"', '"summary": 1, "chunk"'))
    (place / "problem.json").write_text('{"problem": "2 + 3", "level": NaN, "note": NaN}')
    bank = place / "chunk_0" / "solutions.json"
    bank.write_text(bank.read_text().replace('"answer"', '"error": null, "score": NaN, "answer"'))

    found, covered = audit(tmp_path)

    assert found == [
        ("unusable_values", "problem_1/problem.json"),
        ("unusable_values", "problem_1/chunks_labeled.json"),
    ]
    assert {kind for kind, _ in found} <= INFORMATIONAL
    assert covered["n_rollouts"] == 20


def test_an_absent_folder_is_an_error_and_so_is_the_hub(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no folder 'tiny'"):
        audit(tmp_path)
    hub = Rollouts(source=HubSource(kind="hub", repo="owner/name", revision=None))
    with pytest.raises(ConfigError, match="found a hub repository"):
        audit_rollouts(open_source(hub), hub, ["tiny"], [SETTING])


STUDY: dict[str, Any] = {
    "name": "audited",
    "rollouts": {"source": {"kind": "mirror", "folder": "mirror"}},
    "models": {
        "tiny": {
            "rollouts_dir": "tiny",
            "checkpoint": {"kind": "stand_in", "architecture": "qwen2", "n_layers": 2},
            "n_layers": 2,
            "tokenizer": "tokenizer",
        }
    },
    "settings": [SETTING],
    "seeds": [0],
}
Command = Callable[..., Any]


@pytest.fixture
def study(tmp_path: Path) -> Path:
    values = STUDY | {
        "rollouts": {"source": {"kind": "mirror", "folder": str(tmp_path / "mirror")}}
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(values))
    return tmp_path / "study.yaml"


def test_the_command_ends_with_0_or_3(
    study: Path, tmp_path: Path, taprobe: Command, banks: list[Bank]
) -> None:
    place = write(tmp_path / "mirror", 5, banks)
    said = taprobe("audit-rollouts", study)
    assert said.code == 0
    assert "0 findings in 1 problems" in said.out
    assert "labels without rollouts" not in said.out

    (place / "chunk_2" / "solutions.json").unlink()
    said = taprobe("audit-rollouts", study)
    assert said.code == EXIT_UNSOUND
    assert f"gap tiny/{SAMPLING}/{SETTING}/problem_5/chunk_2" in said.out
    assert "1 findings in 1 problems" in said.out

    said = taprobe("audit-rollouts", study, "--json")
    assert said.code == EXIT_UNSOUND
    found = json.loads(said.out)
    assert [row["kind"] for row in found["findings"]] == ["gap"]
    assert found["coverage"][0]["n_banks"] == 4
    # These labels state no counterfactual measures: nothing to compare, nothing to find.
    assert taprobe("audit-rollouts", study, "--trigram").code == EXIT_UNSOUND


def test_the_command_sums_up_where_findings_are_many(
    study: Path, tmp_path: Path, taprobe: Command
) -> None:
    empty: list[Bank] = [solutions(TEXTS, index, "5  ") for index in range(5)]
    for problem_id in range(11):
        write(tmp_path / "mirror", problem_id, empty)
    said = taprobe("audit-rollouts", study)
    assert said.code == 0  # rollouts may end without an answer; that is told, and no damage
    assert "... and 5 more, all of them with --json" in said.out
    assert "findings by kind" in said.out
    assert "55 findings in 11 problems" in said.out
    assert len(json.loads(taprobe("audit-rollouts", study, "--json").out)["findings"]) == 55


def test_the_command_says_that_labels_stand_alone(
    study: Path, tmp_path: Path, taprobe: Command
) -> None:
    write(tmp_path / "mirror", 5, None)
    said = taprobe("audit-rollouts", study)
    assert (said.code, "labels without rollouts" in said.out) == (0, True)


def test_the_command_refuses_the_hub_and_recomputes_all_of_the_policy(
    tmp_path: Path, taprobe: Command
) -> None:
    values = yaml.safe_load(yaml.safe_dump(STUDY))
    values["rollouts"]["source"] = {"kind": "hub", "repo": "owner/name"}
    (tmp_path / "hub.yaml").write_text(yaml.safe_dump(values))
    said = taprobe("audit-rollouts", tmp_path / "hub.yaml")
    assert said.code == EXIT_FIXABLE
    assert "Fix: fetch them with `hf download" in said.err

    values["rollouts"]["source"] = {"kind": "policy", "n_problems": 4, "n_rollouts": 4}
    (tmp_path / "policy.yaml").write_text(yaml.safe_dump(values))
    assert taprobe("audit-rollouts", tmp_path / "policy.yaml").code == 0
    (labels, *_) = sorted((tmp_path / "data").rglob("chunks_labeled.json"))
    rows = json.loads(labels.read_text())
    rows[1]["counterfactual_importance_accuracy"] *= 0.5
    rows[1]["counterfactual_importance_accuracy"] += 0.01
    labels.write_text(json.dumps(rows))
    said = taprobe("audit-rollouts", tmp_path / "policy.yaml", "--json")
    assert said.code == EXIT_UNSOUND
    assert [row["kind"] for row in json.loads(said.out)["findings"]] == ["label_mismatch"]
