"""Join labels, spans, sentences and activations into the rows that probes read.

One row per labelled sentence, sorted by (problem_id, sentence_idx). A problem without any span was
left out upstream: it is dropped here and reported, so that folds are made from `problems` and one
unreadable problem does not cost the others. Anything else that is missing is an error. What does
not belong here: scaling and vocabularies, which are learned inside a fold (`probes`).

Position features, float32, in the order of `POSITION_FEATURES`:

- `sentence_idx`: counted from 0.
- `n_sentences`: labelled sentences of the problem. Leaky: known only when the trace has ended.
- `relative_position`: sentence_idx / max(n_sentences - 1, 1), in [0, 1]. Leaky for that reason.
- `n_tokens`: tokens of the sentence.

The leaky two make a baseline stronger than a reader of the running trace could be: good for asking
whether activations say more than position does, not usable while a trace is being written.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

from taprobe_core.errors import DataError, NonFiniteError, NotEnoughDataError
from taprobe_core.study.config import Target

POSITION_FEATURES = ("sentence_idx", "n_sentences", "relative_position", "n_tokens")
LEAKY_FEATURES = ("n_sentences", "relative_position")

_KEY = ["problem_id", "sentence_idx"]
_SHOWN = 10


@dataclass(frozen=True, eq=False)
class ProbeData:
    """Features and targets of every labelled sentence; all members share their row order.

    Attributes:
        keys: problem_id and sentence_idx, Int64.
        problem_id: [sentence] int64, ascending.
        position: [sentence, 4] float32, `POSITION_FEATURES`.
        texts: the sentences.
        activations: [sentence, d_model] float32, or None.
        importance_abs: [sentence] float64 in [0, 1].
        importance_signed: [sentence] float64 in [-1, 1].
        is_anchor: [sentence] bool.
        dropped: labelled problems without spans, ascending.
    """

    keys: pl.DataFrame
    problem_id: NDArray[np.int64]
    position: NDArray[np.float32]
    texts: list[str]
    activations: NDArray[np.float32] | None
    importance_abs: NDArray[np.float64]
    importance_signed: NDArray[np.float64]
    is_anchor: NDArray[np.bool_]
    dropped: tuple[int, ...] = ()

    @property
    def problems(self) -> tuple[int, ...]:
        """Problems with rows, ascending; make the folds from these."""
        return tuple(int(problem_id) for problem_id in np.unique(self.problem_id))

    def rows(self, problem_ids: Iterable[int]) -> NDArray[np.intp]:
        """Return the row numbers of `problem_ids`, ascending."""
        return np.flatnonzero(np.isin(self.problem_id, list(problem_ids)))

    def target(self, target: Target) -> NDArray[np.float64]:
        """Return the target of each row, [sentence] float64; anchors are 1, other sentences 0."""
        if target == "anchor_binary":
            return self.is_anchor.astype(np.float64)
        return self.importance_abs if target == "importance_abs" else self.importance_signed


def join_features(
    labels: pl.DataFrame,
    spans: pl.DataFrame,
    sentences: pl.DataFrame,
    activations: Mapping[int, NDArray[np.float32]] | None,
) -> ProbeData:
    """Join the tables of one (model, setting), and the activations of one site.

    Args:
        labels: `tables.LABELS`; decides which sentences become rows.
        spans: `tables.SPANS`; every span of a problem, labelled or not.
        sentences: `tables.SENTENCES`, for the text.
        activations: problem_id -> [n_spans, d_model] float32, row i belonging to sentence i; or
            None when no recipe reads activations. Problems without labels are ignored.

    Raises:
        NotEnoughDataError: no labelled problem has spans.
        DataError: a labelled sentence lacks its span, its text or its activation row, or shapes
            disagree; lists every fault.
        NonFiniteError: an activation is NaN or infinite; names problem and sentence.
    """
    labelled = set(labels["problem_id"].unique())
    dropped = tuple(sorted(labelled - set(spans["problem_id"].unique())))
    kept = labels.filter(~pl.col("problem_id").is_in(dropped)).sort(_KEY)
    if kept.is_empty():
        raise NotEnoughDataError(
            f"none of {len(labelled)} labelled problems has spans",
            "labels and spans",
            "see the skipped table of the spans stage for the reason of each problem",
        )
    joined = kept.join(
        spans.select(*_KEY, "n_tokens"), on=_KEY, how="left", maintain_order="left"
    ).join(sentences.select(*_KEY, "sentence"), on=_KEY, how="left", maintain_order="left")
    faults = _uncovered(joined, "n_tokens", "span") + _uncovered(joined, "sentence", "text")
    if activations is not None:
        faults += _activation_faults(joined, spans, activations)
    if faults:
        raise DataError(
            f"labelled sentences are not covered: {'; '.join(faults)}",
            "labels, spans, sentences and activations",
            "build these stages again from the same rollouts",
        )
    return ProbeData(
        keys=joined.select(_KEY),
        problem_id=joined["problem_id"].to_numpy(),
        position=_position(joined),
        texts=joined["sentence"].to_list(),
        activations=None if activations is None else _stack(joined, activations),
        importance_abs=joined["importance_abs"].to_numpy(),
        importance_signed=joined["importance_signed"].to_numpy(),
        is_anchor=joined["is_anchor"].to_numpy(),
        dropped=dropped,
    )


def _position(joined: pl.DataFrame) -> NDArray[np.float32]:
    index = joined["sentence_idx"].to_numpy().astype(np.float32)
    count = joined["n_sentences"].to_numpy().astype(np.float32)
    relative = index / np.maximum(count - 1, 1)
    tokens = joined["n_tokens"].to_numpy().astype(np.float32)
    return np.column_stack([index, count, relative, tokens])


def _uncovered(joined: pl.DataFrame, column: str, name: str) -> list[str]:
    missing = joined.filter(pl.col(column).is_null())
    if missing.is_empty():
        return []
    counts = missing.group_by("problem_id").len("n").sort("problem_id")
    return [
        f"{row['n']} without {name} in problem {row['problem_id']}" for row in counts.to_dicts()
    ]


def _activation_faults(
    joined: pl.DataFrame, spans: pl.DataFrame, activations: Mapping[int, NDArray[np.float32]]
) -> list[str]:
    n_spans = dict(spans.group_by("problem_id").len().iter_rows())
    faults, widths = [], {}
    for problem_id in joined["problem_id"].unique(maintain_order=True):
        rows = activations.get(problem_id)
        if rows is None:
            faults.append(f"no activations for problem {problem_id}")
        elif rows.ndim != 2 or len(rows) != n_spans[problem_id]:
            shape = list(rows.shape)
            faults.append(
                f"activations of problem {problem_id} are {shape}, its spans {n_spans[problem_id]}"
            )
        else:
            widths[problem_id] = rows.shape[1]
    if len(set(widths.values())) > 1:
        faults.append(f"d_model differs between problems: {widths}")
    return faults


def _stack(
    joined: pl.DataFrame, activations: Mapping[int, NDArray[np.float32]]
) -> NDArray[np.float32]:
    blocks = [
        np.asarray(activations[problem_id], dtype=np.float32)[group["sentence_idx"].to_numpy()]
        for (problem_id,), group in joined.group_by("problem_id", maintain_order=True)
    ]
    stacked = np.concatenate(blocks)
    bad = np.flatnonzero(~np.isfinite(stacked).all(axis=1))
    if bad.size:
        shown = [joined.select(_KEY).row(int(row)) for row in bad[:_SHOWN]]
        raise NonFiniteError(
            f"{bad.size} activation rows hold NaN or infinity",
            f"(problem_id, sentence_idx) {shown}",
            "extract them again; with storage float16, set activations.storage to float32",
        )
    return stacked
