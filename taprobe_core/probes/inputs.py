"""What a recipe reads, one column per block; and the feature matrix, made from stored arrays.

The frame is what the pipeline is fitted on; `transform_inputs` repeats the pipeline's input step
from its arrays, without scikit-learn's objects. What does not belong here: learning (`pipeline`).
Invariant: a row's features depend on that row and the arrays alone.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import polars as pl
from numpy.typing import NDArray
from scipy.sparse import csr_matrix, hstack

from taprobe_core.errors import DataError
from taprobe_core.features import ProbeData
from taprobe_core.probes.words import weigh_texts
from taprobe_core.study.config import ProbeRecipe

Matrix: TypeAlias = NDArray[np.float64] | csr_matrix
Arrays = dict[str, NDArray[Any]]

DENSE_BLOCKS = ("activations", "position")
"""Blocks that are standardised, in the order of their features."""


def input_frame(recipe: ProbeRecipe, data: ProbeData) -> pl.DataFrame:
    """Return the blocks that `recipe` reads, one row per sentence.

    Returns:
        Of the columns `text` (String), `activations` (Array of d_model Float32) and `position`
        (Array of 4 Float32), those that the recipe names.

    Raises:
        DataError: the recipe reads activations and `data` has none.
    """
    if recipe.reads_activations and data.activations is None:
        raise DataError(
            f"recipe {recipe.name!r} reads activations, and the data has none",
            "ProbeData.activations",
            "pass the site's activations to join_features",
        )
    blocks = {"text": data.texts, "activations": data.activations, "position": data.position}
    return pl.DataFrame(
        [pl.Series(name, blocks[name]) for name in blocks if name in recipe.features]
    )


def n_dense(frame: pl.DataFrame) -> int:
    """Return the number of standardised features of `frame`."""
    return sum(frame.schema[name].shape[0] for name in DENSE_BLOCKS if name in frame.columns)  # type: ignore[attr-defined]


def transform_inputs(frame: pl.DataFrame, arrays: Arrays, terms: tuple[str, ...] | None) -> Matrix:
    """Return the feature matrix, [terms ; activations ; position].

    Args:
        frame: rows from `input_frame`.
        arrays: `mean` and `scale` [feature], `idf` [term], as far as the recipe needs them.
        terms: [term]; None without text.

    Returns:
        [row, feature] float64, sparse when the recipe reads text.
    """
    blocks = [frame[name].to_numpy() for name in DENSE_BLOCKS if name in frame.columns]
    dense = None
    if blocks:
        values = np.concatenate(blocks, axis=1, dtype=np.float64)
        dense = (values - arrays["mean"]) / arrays["scale"]
    if terms is None:
        return dense
    weighted = weigh_texts(frame["text"].to_list(), terms, arrays["idf"])
    return weighted if dense is None else csr_matrix(hstack([weighted, csr_matrix(dense)]))
