"""Labelled sentences and rollout banks of one problem -> findings.

What published rollouts suffer from: rollouts that failed, were not graded or gave no answer; banks
that are absent; prefixes that are not the earlier sentences; labels that were computed from other
rollouts. Files belong in `folder`. Invariant: pure; a sound problem has no finding, and what one
damage makes unknowable (a measure whose rollouts are absent) is not reported as another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, Literal, NamedTuple, TypeAlias

import polars as pl

from taprobe_core.errors import DataError, SchemaError
from taprobe_core.labels import MIN_SENTENCE_CHARS, Solutions, published_measures
from taprobe_core.labels.noise import verify_resampling_identity

LABELS_FILE = "chunks_labeled.json"

LABEL_TOLERANCE = 1e-9
"""Stored and recomputed measures are as close as this; one rollout more or less moves over 1e-4."""

ALWAYS_RECOMPUTED = ("accuracy", "resampling_importance_accuracy")
"""Measures that follow from answers and grades alone."""

RECOMPUTED_WITH_SIMILARITY = (
    "resampling_importance_kl",
    "counterfactual_importance_accuracy",
    "counterfactual_importance_kl",
    "different_trajectories_fraction",
    "overdeterminedness",
)
"""Measures that can be recomputed where the labels' own similarity is known.

Published KL values are over normalised answers, which the files do not state, so they too are left
to labels that were made here.
"""

Kind: TypeAlias = Literal[
    "unreadable",
    "unusable_values",
    "gap",
    "missing_block",
    "error_rows",
    "ungraded_rows",
    "empty_answers",
    "corrupted_prefix",
    "label_mismatch",
    "broken_identity",
]

INFORMATIONAL: frozenset[Kind] = frozenset({"empty_answers", "unusable_values"})
"""Kinds that are reported and are no damage: a rollout may end without an answer, and measures drop
it; a value that no stage reads may be anything."""

Bank: TypeAlias = Solutions | DataError | None
"""Rollouts of one sentence; the error that reading them raised; None where they are absent."""

IsDissimilar: TypeAlias = Callable[[str, str], bool]

_SHOWN_CHARS = 60


class Finding(NamedTuple):
    """Something wrong in one file of a problem.

    Attributes:
        kind: what is wrong.
        file: below the problem's folder; the first folder of a missing block.
        detail: one sentence for a reader.
        n: how many rows (of rollouts), sentences (of labels), folders or files.
    """

    kind: Kind
    file: str
    detail: str
    n: int


def audit_problem(
    sentences: Sequence[Mapping[str, Any]],
    banks: Sequence[Bank] | None,
    is_dissimilar: IsDissimilar | None = None,
) -> list[Finding]:
    """Find what is wrong with one problem whose files can be read.

    | kind | found where |
    |---|---|
    | unreadable | reading a bank raised |
    | gap, missing_block | one bank is absent, or several in a row; sentences under 4 characters
      have none |
    | error_rows, ungraded_rows | rows have an `error`, or null for a grade |
    | empty_answers | graded rows have no answer |
    | corrupted_prefix | `prefix_without_chunk` is not the earlier sentences joined by blanks |
    | label_mismatch | a stored measure is not what the rollouts give |
    | broken_identity | stored resampling importance is not the next accuracy minus the own |

    Args:
        sentences: rows as `rollouts.parse_problem` gives them; null measures are not compared.
        banks: one per sentence; None where the rollouts were not delivered at all, so that only
            the labels can be judged.
        is_dissimilar: the similarity that the labels were made with, where it is known.

    Returns:
        Findings: banks in sentence order, then labels.
    """
    found = [] if banks is None else list(_bank_findings(sentences, banks))
    if banks is not None:
        found += _label_mismatch(sentences, banks, is_dissimilar)
    return [*found, *_broken_identity(sentences, banks)]


def cut_prefix(sentences: Sequence[str], index: int) -> str:
    """Return the prefix of a generator that removes a sentence by deleting its text everywhere.

    It joins the sentences up to `index` by blanks, deletes every copy of sentence `index` and
    strips. Where the text occurs earlier this is not the sentences before `index`: the rollouts
    continue a text that the trace does not have.

    Args:
        sentences: all sentences of a trace.
        index: the sentence to remove.
    """
    return " ".join(sentences[: index + 1]).replace(sentences[index], "").strip()


def unreadable(file: str, error: DataError) -> Finding:
    """Return the finding for a file whose reading raised `error`."""
    faults = error.faults[:3] if isinstance(error, SchemaError) else ()
    return Finding("unreadable", file, "; ".join([error.what, *faults]), 1)


def unusable(notes: Sequence[str]) -> list[Finding]:
    """Return a finding per file for values that no stage reads; `ProblemRecord.notes`."""
    found = []
    for file, own in groupby(notes, key=lambda note: note.split(": ", 1)[0]):
        first, *others = (note.split(": ", 1)[1] for note in own)
        more = f"; and {len(others)} more" if others else ""
        found.append(Finding("unusable_values", file, f"{first}{more}", 1 + len(others)))
    return found


def _bank_findings(
    sentences: Sequence[Mapping[str, Any]], banks: Sequence[Bank]
) -> Iterator[Finding]:
    texts = [row["sentence"] for row in sentences]
    yield from _absent(texts, banks)
    for index, bank in enumerate(banks):
        file = f"chunk_{index}/solutions.json"
        if isinstance(bank, DataError):
            yield unreadable(file, bank)
        elif bank is not None:
            yield from _row_findings(file, bank)
            yield from _prefix_findings(file, texts, index, bank)


def _absent(texts: Sequence[str], banks: Sequence[Bank]) -> Iterator[Finding]:
    def is_absent(index: int) -> bool:
        return banks[index] is None and len(texts[index]) >= MIN_SENTENCE_CHARS

    for absent, run in groupby(range(len(texts)), key=is_absent):
        if not absent:
            continue
        first, *others = run
        if others:
            detail = f"no rollouts in chunk_{first} to chunk_{others[-1]}, although labels exist"
            yield Finding("missing_block", f"chunk_{first}", detail, 1 + len(others))
        else:
            detail = f"no rollouts in chunk_{first}, although its label exists"
            yield Finding("gap", f"chunk_{first}", detail, 1)


def _row_findings(file: str, bank: Solutions) -> Iterator[Finding]:
    n_empty = sum(rollout.answer == "" for rollout in bank.rollouts)
    counted: list[tuple[Kind, int, str]] = [
        ("error_rows", bank.n_errors, "failed: `error` instead of an answer"),
        ("ungraded_rows", bank.n_ungraded, "have null for `is_correct`"),
        ("empty_answers", n_empty, "gave no answer"),
    ]
    for kind, n, what in counted:
        if n:
            yield Finding(kind, file, f"{n} of {bank.n_rows} rows {what}", n)


def _prefix_findings(
    file: str, texts: Sequence[str], index: int, bank: Solutions
) -> Iterator[Finding]:
    whole = " ".join(texts[:index])
    wrong = {prefix: n for prefix, n in bank.prefixes.items() if prefix != whole}
    if wrong:
        n = sum(wrong.values())
        detail = f"{n} of {bank.n_rows} rows continue something else than the earlier sentences"
        if set(wrong) == {cut_prefix(texts, index)}:
            text = texts[index]
            shown = text if len(text) <= _SHOWN_CHARS else f"{text[:_SHOWN_CHARS]}..."
            detail = f"{n} of {bank.n_rows} rows continue a prefix without any {shown!r}"
        yield Finding("corrupted_prefix", file, detail, n)


def _label_mismatch(
    sentences: Sequence[Mapping[str, Any]],
    banks: Sequence[Bank],
    is_dissimilar: IsDissimilar | None,
) -> Iterator[Finding]:
    names = ALWAYS_RECOMPUTED + (RECOMPUTED_WITH_SIMILARITY if is_dissimilar else ())
    made = published_measures(
        [row["sentence"] for row in sentences],
        [bank.rollouts if isinstance(bank, Solutions) else [] for bank in banks],
        # Any answer will do where nothing that depends on it is compared.
        is_dissimilar or (lambda removed, resampled: True),
    )
    differing: set[int] = set()
    parts = []
    for name in names:
        distances = {
            index: abs(row[name] - made[index][name])
            for index, row in enumerate(sentences)
            if row[name] is not None and _is_known(banks, index, name)
        }
        off = {index for index, distance in distances.items() if distance > LABEL_TOLERANCE}
        differing |= off
        if off:
            parts.append(f"{name} of {len(off)} (by up to {max(distances.values()):.3g})")
    if parts:
        detail = f"not what the rollouts give, in sentences: {', '.join(parts)}"
        yield Finding("label_mismatch", LABELS_FILE, detail, len(differing))


def _is_known(banks: Sequence[Bank], index: int, name: str) -> bool:
    """Whether every rollout that a measure of sentence `index` depends on is there."""
    if not isinstance(banks[index], Solutions):
        return False
    if name == "accuracy":
        return True
    for later in banks[index + 1 :]:
        if not isinstance(later, Solutions):
            return False
        # The successor is the next bank with answers.
        if any(rollout.answer not in {"", "None"} for rollout in later.rollouts):
            return True
    return True


def _broken_identity(
    sentences: Sequence[Mapping[str, Any]], banks: Sequence[Bank] | None
) -> Iterator[Finding]:
    numbers = dict.fromkeys(ALWAYS_RECOMPUTED, pl.Float64)
    rows = []
    for index, sentence in enumerate(sentences):
        row = {name: sentence[name] for name in ("problem_id", "sentence_idx", *numbers)}
        # Where nothing was answered, an accuracy of 0 means that there is none.
        if _has_no_data(sentence["sentence"], banks[index] if banks else None):
            row["accuracy"] = None
        rows.append(row)
    frame = pl.DataFrame(rows, schema={"problem_id": pl.Int64, "sentence_idx": pl.Int64, **numbers})
    broken = verify_resampling_identity(frame).filter(~pl.col("is_exact"))
    if len(broken):
        first, largest = broken["sentence_idx"][0], max(abs(each) for each in broken["residual"])
        detail = (
            "resampling importance is not the next accuracy minus the own in "
            f"{len(broken)} sentences, first in {first}, by up to {largest:.3g}"
        )
        yield Finding("broken_identity", LABELS_FILE, detail, len(broken))


def _has_no_data(sentence: str, bank: Bank) -> bool:
    is_unanswered = isinstance(bank, Solutions) and not any(
        rollout.answer for rollout in bank.rollouts
    )
    return is_unanswered or len(sentence) < MIN_SENTENCE_CHARS
