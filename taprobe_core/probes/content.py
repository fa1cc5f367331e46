"""A name for what a fit sees: equal names, equal results.

Settings can hold the same traces under another heading: text, spans and labels of the published
`*_forced_answer` settings are those of the plain ones wherever they were compared. Their artifacts
differ, what a solver sees does not. From rows and folds to a hash of everything that a fit reads.
What does not belong here: looking for the twin of a fit (`pipeline.twins`).

Invariant: two fits of one code version with one name have the same scores and probes.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from taprobe_core.control_task import kinds_of
from taprobe_core.probes.design import Design, Fit
from taprobe_core.probes.inputs import DENSE_BLOCKS, dense_matrix
from taprobe_core.residuals import BASELINE_FEATURES
from taprobe_core.store.canonical import canonical_json
from taprobe_core.study import ControlRecipe, Precision, ProbeRecipe
from taprobe_core.targets import MEASURED


class Contents:
    """Names of the fits of one design; each block of features is hashed once.

    Args:
        design: rows and folds.
        precision: of the products of stochastic fits.
    """

    def __init__(self, design: Design, precision: Precision = "float32") -> None:
        self._design = design
        self._precision = precision
        self._known: dict[str, str] = {}

    def of(self, fit: Fit) -> str:
        """Return the name of a fit: 64 hex digits.

        Raises:
            DataError: the data lacks what the recipe reads.
        """
        recipe, design = fit.recipe, self._design
        seen: dict[str, Any] = {
            "recipe": recipe.content(),
            "seed": fit.seed if recipe.is_stochastic else None,
            "precision": self._precision if recipe.is_stochastic else None,
            "labels": [design.labels.field, design.labels.tie_rule, self._labels(recipe)],
            "folds": self._once("folds", _folds),
            "blocks": sorted(self._blocks(recipe)),
        }
        if isinstance(recipe, ControlRecipe):
            seen["kinds"] = self._once("kinds", _kinds)
        return hashlib.sha256(canonical_json(seen).encode()).hexdigest()

    def _labels(self, recipe: ProbeRecipe) -> str:
        further = () if recipe.target_entry is None else recipe.target_entry.reads
        return self._once(" ".join(["labels", *further]), lambda design: _labels(design, further))

    def _blocks(self, recipe: ProbeRecipe) -> set[str]:
        found = self._features(recipe)
        if recipe.residualize != "none":
            features = BASELINE_FEATURES[recipe.residualize]
            found |= self._features(ProbeRecipe(name="baseline", features=features))
        return found

    def _features(self, recipe: ProbeRecipe) -> set[str]:
        found = set()
        if "text" in recipe.features:
            found.add(self._once("text", _texts))
        if recipe.reads_tokens:
            found.add(self._once("tokens", _tokens))
        dense = sorted(set(recipe.features) & set(DENSE_BLOCKS))
        if dense:
            pooling = recipe.pooling if "activations" in dense else ""
            name = " ".join([*dense, pooling])
            found.add(self._once(name, lambda design: _dense(recipe, design)))
        return found

    def _once(self, name: str, make: Callable[[Design], bytes]) -> str:
        if name not in self._known:
            self._known[name] = f"{name} {hashlib.sha256(make(self._design)).hexdigest()}"
        return self._known[name]


def _labels(design: Design, further: Sequence[str]) -> bytes:
    out = io.BytesIO()
    design.data.labels.select(*MEASURED, *further).rechunk().write_ipc(out)
    return out.getvalue()


def _folds(design: Design) -> bytes:
    return json.dumps([asdict(fold) for fold in design.folds]).encode()


def _kinds(design: Design) -> bytes:
    return json.dumps(kinds_of(design.data)).encode()


def _texts(design: Design) -> bytes:
    return json.dumps(design.data.texts).encode()


def _tokens(design: Design) -> bytes:
    tokens = design.data.tokens
    if tokens is None:
        return b""
    parts = (np.ascontiguousarray(each) for each in tokens)
    return (
        b"".join(hashlib.sha256(part.data).digest() for part in parts)
        + str(tokens.values.dtype).encode()
    )


def _dense(recipe: ProbeRecipe, design: Design) -> bytes:
    matrix = dense_matrix(recipe, design.data)
    if matrix is None:
        return b""
    # A block made of table columns stands column by column in memory; what it holds is the same.
    rows = np.ascontiguousarray(matrix)
    return str(rows.shape).encode() + hashlib.sha256(rows.data).digest()
