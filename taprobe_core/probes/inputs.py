"""The feature matrix of a recipe: [terms ; activations ; position], learned on training rows.

Terms are weighted and left as they are; activations and position are standardised with the mean
and the deviation of the training rows. What does not belong here: which rows train (`splits`) and
what is fitted to them. Invariant: nothing here depends on a row that is not a training row, and a
feature that is constant in training is only centred, so no value is divided by zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix, hstack

from taprobe_core.errors import DataError
from taprobe_core.features import ProbeData
from taprobe_core.probes.words import (
    TermCounts,
    choose_terms,
    count_terms,
    inverse_document_frequency,
    weigh_terms,
)
from taprobe_core.study.config import ProbeRecipe

Matrix: TypeAlias = NDArray[np.float64] | csr_matrix
Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True, eq=False)
class RawInputs:
    """What a recipe reads, before anything is learned.

    Attributes:
        dense: [sentence, feature] float64, activations then position; None without either.
        words: term counts; None without text.
    """

    dense: NDArray[np.float64] | None
    words: TermCounts | None


def read_inputs(
    recipe: ProbeRecipe, data: ProbeData, terms: tuple[str, ...] | None = None
) -> RawInputs:
    """Collect what `recipe` reads from `data`.

    Args:
        recipe: names the features.
        data: rows.
        terms: count these terms only; None counts all that occur.

    Raises:
        DataError: the recipe reads activations and `data` has none.
    """
    blocks = []
    if "activations" in recipe.features:
        if data.activations is None:
            raise DataError(
                f"recipe {recipe.name!r} reads activations, and the data has none",
                "ProbeData.activations",
                "pass the site's activations to join_features",
            )
        blocks.append(data.activations)
    if "position" in recipe.features:
        blocks.append(data.position)
    return RawInputs(
        dense=np.concatenate(blocks, axis=1, dtype=np.float64) if blocks else None,
        words=count_terms(data.texts, terms) if "text" in recipe.features else None,
    )


def learn_inputs(raw: RawInputs, rows: NDArray[np.intp]) -> tuple[Arrays, tuple[str, ...] | None]:
    """Learn scaling and terms on `rows`.

    Args:
        raw: every row.
        rows: training rows.

    Returns:
        Arrays `mean` and `scale` [feature], `term` [term] (columns of `raw.words`) and `idf`
        [term], as far as the recipe needs them; and the chosen terms, or None without text.
    """
    arrays: Arrays = {}
    if raw.dense is not None:
        arrays["mean"], arrays["scale"] = _moments(raw.dense[rows])
    if raw.words is None:
        return arrays, None
    counts = raw.words.counts[rows]
    columns = choose_terms(counts)
    arrays["idf"] = inverse_document_frequency(counts[:, columns])
    return arrays, tuple(raw.words.terms[column] for column in columns)


def apply_inputs(
    raw: RawInputs,
    arrays: Arrays,
    terms: tuple[str, ...] | None,
    rows: NDArray[np.intp] | slice = slice(None),
) -> Matrix:
    """Return the feature matrix of `rows`, as learned.

    Args:
        raw: every row.
        arrays: from `learn_inputs`, or of a stored probe.
        terms: the chosen terms, in the order of `idf`.
        rows: which rows, in the order wanted; all by default.

    Returns:
        [row, feature] float64, sparse when the recipe reads text.
    """
    dense = None
    if raw.dense is not None:
        dense = (raw.dense[rows] - arrays["mean"]) / arrays["scale"]
    if raw.words is None:
        return dense
    counts = raw.words.counts[rows]
    if terms is not None and raw.words.terms != terms:
        column = {term: index for index, term in enumerate(raw.words.terms)}
        counts = counts[:, [column[term] for term in terms]]
    weighted = weigh_terms(counts, arrays["idf"])
    return weighted if dense is None else csr_matrix(hstack([weighted, csr_matrix(dense)]))


def _moments(rows: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    mean, variance = rows.mean(axis=0), rows.var(axis=0)
    # Below this a variance is rounding of a constant; scikit-learn's StandardScaler draws the
    # line at the same place.
    eps = np.finfo(np.float64).eps
    noise = len(rows) * eps * variance + (len(rows) * mean * eps) ** 2
    return mean, np.where(variance <= noise, 1.0, np.sqrt(variance))
