"""What a recipe reads: its dense blocks side by side, its texts, its token sets.

From joined features to the matrices that solvers take. What does not belong here: learning
(`dense`, `fitted`). Invariant: a row's features depend on that row alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

from taprobe_core.errors import DataError
from taprobe_core.probes.features import ProbeData
from taprobe_core.study import ProbeRecipe

Matrix: TypeAlias = NDArray[np.float64] | csr_matrix
Arrays = dict[str, NDArray[Any]]

DENSE_BLOCKS = ("activations", "vertical_attention", "causal_position", "position")
"""Blocks that are standardised, in the order of their features."""


def dense_matrix(recipe: ProbeRecipe, data: ProbeData) -> NDArray[np.float32] | None:
    """Return the dense blocks that `recipe` reads, side by side.

    Returns:
        [row, feature], of the blocks' type (float32), not standardised; None for text alone.

    Raises:
        DataError: the data lacks a block.
    """
    names = [name for name in DENSE_BLOCKS if name in recipe.features]
    blocks = [_dense_block(recipe, data, name) for name in names]
    return np.concatenate(blocks, axis=1) if blocks else None


MIN_JOINT_FEATURES = 256
"""Activations narrower than this are solved set by set: there is little to share."""

_BESIDE = ("causal_position", "position")
"""Blocks of a few columns, which a fold can be blind to at no cost."""


def joint_features(recipe: ProbeRecipe, data: ProbeData) -> tuple[str, ...]:
    """Return what linear recipes must have in common to be one solve: all but a few columns.

    Args:
        recipe: of estimator `linear`.
        data: for the width of the activations.
    """
    pooled = data.activations.get(recipe.pooling) if "activations" in recipe.features else None
    if pooled is None or pooled.shape[1] < MIN_JOINT_FEATURES or "text" in recipe.features:
        return tuple(recipe.features)
    return tuple(name for name in recipe.features if name not in _BESIDE)


class JointBlocks(NamedTuple):
    """Several sets of dense features side by side.

    Attributes:
        seen: [set, feature] bool, the features of each set.
        of_recipe: [recipe] int64, which set a recipe has.
    """

    seen: NDArray[np.bool_]
    of_recipe: NDArray[np.int64]


def joint_blocks(
    recipes: Sequence[ProbeRecipe], data: ProbeData
) -> tuple[ProbeRecipe, JointBlocks]:
    """Return a recipe that reads what any of these read, and which of it is whose.

    Args:
        recipes: of equal `joint_features`.
        data: for the widths of the blocks.

    Raises:
        DataError: the data lacks a block.
    """
    sets = [frozenset(recipe.features) for recipe in recipes]
    distinct = list(dict.fromkeys(sets))
    features = tuple(dict.fromkeys(name for each in recipes for name in each.features))
    joint = recipes[0].model_copy(update={"features": features})
    names = [
        name
        for name in DENSE_BLOCKS
        if name in features
        for _ in range(_dense_block(joint, data, name).shape[1])
    ]
    seen = np.array([[name in each for name in names] for each in distinct], dtype=bool)
    return joint, JointBlocks(
        seen.reshape(len(distinct), len(names)), np.array([distinct.index(each) for each in sets])
    )


def n_values(recipe: ProbeRecipe, data: ProbeData) -> int:
    """Return the number of dense values that `recipe` reads: the size of its products."""
    if recipe.reads_tokens:
        return 0 if data.tokens is None else data.tokens.values.size
    pooled = data.activations.get(recipe.pooling) if "activations" in recipe.features else None
    heads = data.vertical_attention if "vertical_attention" in recipe.features else None
    return sum(block.size for block in (pooled, heads) if block is not None)


def n_inputs(recipe: ProbeRecipe, data: ProbeData) -> int:
    """Return about how many dense values `recipe` reads of a row, or of a token if it reads those.

    Few columns, such as position, are left out.
    """
    if recipe.reads_tokens:
        return 0 if data.tokens is None else data.tokens.values.shape[1]
    return n_values(recipe, data) // max(len(data.texts), 1)


def _dense_block(recipe: ProbeRecipe, data: ProbeData, name: str) -> NDArray[np.float32]:
    is_pooled = name == "activations"
    block: NDArray[np.float32] | None = (
        data.activations.get(recipe.pooling) if is_pooled else getattr(data, name)
    )
    if block is None:
        what = f"activations of pooling {recipe.pooling}" if is_pooled else name
        raise DataError(
            f"recipe {recipe.name!r} reads {what}, and the data has none",
            f"ProbeData.{name}",
            "pass them to join_features",
        )
    return block
