"""How much of a probe's value is what it was told, and how much what it could memorise.

A control task has labels that no text can explain: each kind of sentence (tag, place, length) is an
anchor or not by a hash. A probe of the same capacity learns it by memorising kinds. Selectivity is
the metric on the task less the metric on the control. Beside it, the online code: how many bits the
labels take if each block of problems is coded by a probe that learnt the blocks before. What does
not belong here: fitting.

Invariant: control labels follow from the stratum and the seed alone.

Source: Hewitt and Liang (2019), Designing and interpreting probes with control tasks; Voita and
Titov (2020), Information-theoretic probing with minimum description length, section 3.2.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import polars as pl
from numpy.typing import ArrayLike, NDArray

from taprobe_core.comparison import compare_values
from taprobe_core.errors import DataError
from taprobe_core.position_bins import position_bin
from taprobe_core.study.config import Evaluation

_EDGE = 1e-7


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


def selectivity(task: pl.DataFrame, control: pl.DataFrame, evaluation: Evaluation) -> pl.DataFrame:
    """Compare each recipe on its task with the same recipe on the control task.

    Args:
        task: `aggregation.problem_values` of recipes on their task: recipe, protocol, problem_id,
            value.
        control: the same of the control task, under the same recipe names.
        evaluation: bootstrap settings.

    Returns:
        One row per recipe × protocol of both: recipe, protocol, task_value, control_value (means
        over problems), then the paired comparison (`comparison.Comparison`), whose `delta` is the
        selectivity.
    """
    key = ["recipe", "protocol"]
    rows: list[dict[str, Any]] = []
    for (recipe, protocol), own in task.sort(*key, "problem_id").group_by(key, maintain_order=True):
        other = control.filter(recipe=recipe, protocol=protocol)
        if other.height:
            means = {"task_value": own["value"].mean(), "control_value": other["value"].mean()}
            pair = ["problem_id", "value"]
            found = compare_values(own.select(pair), other.select(pair), evaluation)
            rows.append({"recipe": recipe, "protocol": protocol, **means, **found._asdict()})
    return pl.DataFrame(rows, infer_schema_length=None)


class OnlineCode(NamedTuple):
    """What labels cost when told block by block.

    Attributes:
        bits: length of the online code.
        uniform_bits: length of the code that knows the share of positives alone.
        compression: uniform_bits / bits; 1 is no better than the share of positives.
    """

    bits: float
    uniform_bits: float
    compression: float


def online_code(
    n_first: int, blocks: Sequence[tuple[ArrayLike, ArrayLike]], prevalence: float
) -> OnlineCode:
    """Return the length of the online (prequential) code of binary labels.

    L = n_1 H - sum over later blocks b of log2 p_{b-1}(y_b | x_b), with p_{b-1} from a probe that
    was fitted on the blocks before b and H the entropy of the prevalence in bits; the code to
    compare with is n H. Voita and Titov code the first block, and the comparison, with one bit a
    label; with one anchor in ten that would flatter every probe.

    Args:
        n_first: labels of the first block, which nothing could be learnt from.
        blocks: of each later block, labels [row] bool and probabilities of a positive [row], cut to
            [1e-7, 1 - 1e-7]. Blocks hold whole problems.
        prevalence: share of positives over all blocks, in (0, 1).

    Returns:
        Bits and compression.

    Raises:
        DataError: labels and probabilities of a block differ in number, or a prevalence of 0 or 1.
    """
    if not 0 < prevalence < 1:
        raise DataError(f"prevalence {prevalence}", "online code", "give labels of both classes")
    entropy = -(
        prevalence * np.log2(prevalence) + (1 - prevalence) * np.log2(1 - prevalence)
    ).item()
    bits, n = n_first * entropy, n_first
    for place, (labels, probabilities) in enumerate(blocks):
        y, p = np.asarray(labels, dtype=bool), np.asarray(probabilities, dtype=np.float64)
        if y.shape != p.shape:
            raise DataError(
                f"{y.size} labels and {p.size} probabilities",
                f"online code, block {place + 1}",
                "score every sentence of the block",
            )
        cut = np.clip(p, _EDGE, 1 - _EDGE)
        bits -= float(np.log2(np.where(y, cut, 1 - cut)).sum())
        n += y.size
    return OnlineCode(bits, n * entropy, n * entropy / bits)
