"""A control task: labels that no text can explain, for probes of the same rows and capacity.

Each kind of sentence (tag, fifth of the trace, third of the lengths) is an anchor or not by a
hash. A probe learns that by memorising kinds, and has nothing else to learn from. What does not
belong here: fitting (`fit`), and what a control says about a probe (`evaluation.contrasts`).

Invariant: control labels follow from the kinds and the seed alone.

Source: Hewitt and Liang (2019), Designing and interpreting probes with control tasks. They label
word types; sentences have no type, so kinds stand for them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from taprobe_core.errors import LabelError
from taprobe_core.probes.features import POSITION_FEATURES, ProbeData
from taprobe_core.probes.targets import TargetValues

N_BINS = 5
"""Fifths of a trace."""

_PLACE, _LENGTH = (POSITION_FEATURES.index(name) for name in ("relative_position", "n_tokens"))


def position_bin(relative: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return the fifth of the trace of each sentence.

    Args:
        relative: [sentence] in [0, 1].

    Returns:
        [sentence] int64 in 0 .. 4; bins are closed on the left, the last on both sides.
    """
    # Rounding keeps 0.6 * 5 = 3.0000000000000004's kind from moving a boundary.
    return np.minimum(np.floor(np.round(relative * N_BINS, 9)), N_BINS - 1).astype(np.int64)


def control_strata(
    tags: Sequence[str], relative_position: ArrayLike, n_tokens: ArrayLike
) -> list[str]:
    """Name the kind of each sentence: tag, fifth of the trace, third of the lengths.

    Args:
        tags: [sentence].
        relative_position: [sentence] in [0, 1].
        n_tokens: [sentence] lengths; thirds are of all sentences given, so give those of all
            problems at once.

    Returns:
        [sentence], such as `plan_generation/0/2`.
    """
    length = np.asarray(n_tokens, dtype=np.float64)
    third = np.searchsorted(np.quantile(length, [1 / 3, 2 / 3]), length) if length.size else length
    fifth = position_bin(np.asarray(relative_position, dtype=np.float64))
    return [f"{tag}/{f}/{int(t)}" for tag, f, t in zip(tags, fifth, third, strict=True)]


def control_labels(strata: Sequence[str], rate: float, seed: int) -> NDArray[np.bool_]:
    """Label whole strata positive by a seeded hash, until about `rate` of the sentences are.

    Strata are taken in the order of SHA-256 of seed and name, each if it brings the share of
    positives nearer to `rate`; so the control has the task's base rate as nearly as strata allow.

    Args:
        strata: [sentence], from `control_strata`, of all problems at once.
        rate: share of positives to come near to, in (0, 1).
        seed: of the hash.

    Returns:
        [sentence] bool.
    """
    names, kind, counts = np.unique(np.asarray(strata), return_inverse=True, return_counts=True)
    digests = [hashlib.sha256(f"{seed}:{name}".encode()).digest() for name in names]
    wanted, taken = rate * len(strata), 0
    is_positive = np.zeros(len(names), dtype=bool)
    for place in sorted(range(len(names)), key=digests.__getitem__):
        if abs(taken + counts[place] - wanted) < abs(taken - wanted):
            is_positive[place] = True
            taken += int(counts[place])
    return np.asarray(is_positive[kind.ravel()], dtype=np.bool_)


def kinds_of(data: ProbeData) -> list[str]:
    """Name the kind of each row, [sentence]; see `control_strata`.

    Args:
        data: the rows of all problems that are divided into folds.
    """
    place, length = data.position[:, _PLACE], data.position[:, _LENGTH]
    return control_strata(data.labels["function_tag"].to_list(), place, length)


def control_target(task: TargetValues, data: ProbeData, seed: int) -> TargetValues:
    """Return the control of a task of anchors: other labels, equal rows, weights and base rate.

    Args:
        task: anchors of `data`, from `targets.target_values`.
        data: the rows.
        seed: of the hash.

    Raises:
        LabelError: the task has no anchors to put labels in the place of, or no label of one of
            the two classes is left at their base rate.
    """
    rate = 0.0 if task.is_positive is None else float(task.is_positive[task.is_defined].mean())
    labels = control_labels(kinds_of(data), rate, seed)
    if labels.all() or not labels.any():
        raise LabelError(
            f"a control task needs two classes; kinds of sentences give {labels.sum()} positives "
            f"among {labels.size} at a base rate of {rate:.3f}",
            "labels",
            "use more problems, or set evaluation.selectivity.recipes to []",
        )
    value = labels.astype(np.float64)
    return replace(task, y=value, value=value, is_positive=labels)
