"""The fits of one (site or model, setting) laid out: rows, folds, what each recipe is fitted to.

From joined features and folds to the boolean masks and targets that solvers take, and to a content
hash of everything that a fit reads. Settings can hold the same traces under another heading: text,
spans and labels of the published `*_forced_answer` settings are those of the plain ones wherever
they were compared. Their artifacts differ, what a solver sees does not. What does not belong here:
solving (`registry`), what a target means (`targets`, `residuals`), and looking for the equal fit of
another setting (`pipeline.fit`).

Invariants: a target learns from the training rows of its fold alone; all recipes see equal folds;
two fits of one code version with one content hash have the same scores and probes.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

from taprobe_core.errors import DataError, NotEnoughDataError
from taprobe_core.probes.control_task import control_target, kinds_of
from taprobe_core.probes.features import FoldWords, ProbeData, fold_words
from taprobe_core.probes.inputs import DENSE_BLOCKS, dense_matrix
from taprobe_core.probes.residuals import BASELINE_FEATURES, baseline_predictions, residual_targets
from taprobe_core.probes.targets import MEASURED, TargetValues, target_values
from taprobe_core.solvers.columns import FitRequest, class_sizes
from taprobe_core.solvers.linear.fold_matrix import FoldMatrix, TextBlock
from taprobe_core.splits import Fold, check_no_leakage, inner_folds
from taprobe_core.store.fingerprint import canonical_json
from taprobe_core.study import ControlRecipe, Labels, Precision, ProbeRecipe, Splits
from taprobe_core.study.probes import Residualize
from taprobe_core.study.targets import target_settings
from taprobe_core.tables import PROTOCOLS, SPLITS

Mask = NDArray[np.bool_]
Floats = NDArray[np.float64]

TARGET_SETTINGS = ("target", *target_settings(), "weights", "residualize")
"""All that `targets` and `residuals` read of a recipe but its name, which errors give."""


class Fit(NamedTuple):
    """One recipe at one seed: what is fitted on every fold and stored as one artifact."""

    recipe: ProbeRecipe
    seed: int


class FoldTarget(NamedTuple):
    """A recipe's target; a first axis of length 1 is shared by all folds.

    Attributes:
        y: [fold, row] float64, what is fitted.
        value: [fold, row] float64, what ranks are judged against.
        is_positive: [fold, row] bool, the recipe's own anchors; None for signed targets.
        weight: [row] float64, 0 where the target is not defined.
    """

    y: Floats
    value: Floats
    is_positive: Mask | None
    weight: Floats


class ScoredRows(NamedTuple):
    """Where scores are read off: every validation and test row of every fold, fold by fold.

    Attributes:
        row: [place] row of the features.
        number: [place] number of the fold among `Design.folds`.
        frame: problem_id, sentence_idx, protocol, fold and split of each place.
    """

    row: NDArray[np.intp]
    number: NDArray[np.intp]
    frame: pl.DataFrame


@dataclass(frozen=True, eq=False)
class Design:
    """Rows and folds that recipes share.

    Attributes:
        data: features and labels of every row.
        outer: the folds that are tested.
        splits: the study's, for the inner folds.
        labels: the study's, for the tie rule of anchors.
        given: the target of every recipe, in place of what the labels say (`estimators`).
        is_balanced: whether linear and token probes of classes weigh both alike.
    """

    data: ProbeData
    outer: tuple[Fold, ...]
    splits: Splits
    labels: Labels
    given: FoldTarget | None = None
    is_balanced: bool = True

    def __post_init__(self) -> None:
        known = set(self.data.problems)
        for fold in self.outer:
            check_no_leakage(fold)
            unknown = sorted({*fold.train, *fold.val, *fold.test} - known)
            if unknown:
                raise DataError(
                    f"problems {unknown} have no rows",
                    str(fold),
                    "make the folds with `present` from ProbeData.problems",
                )

    @cached_property
    def folds(self) -> tuple[Fold, ...]:
        """Outer folds, then the inner folds of each, if the study asks for them."""
        inner = [each for fold in self.outer for each in inner_folds(fold, self.splits)]
        return (*self.outer, *inner)

    @cached_property
    def train(self) -> Mask:
        """[fold, row] bool."""
        return self._mask("train")

    @cached_property
    def validation(self) -> Mask:
        """[fold, row] bool."""
        return self._mask("val")

    def _mask(self, side: str) -> Mask:
        ids = self.data.problem_id
        return np.array([np.isin(ids, getattr(fold, side)) for fold in self.folds])

    def stopping_sides(self) -> tuple[Mask, Mask]:
        """Return training and validation rows of every fold for a training that stops early.

        A fold without validation problems, in a study with inner folds, gives up the first of its
        inner groups for it.

        Returns:
            Two masks [fold, row], disjoint.
        """
        train, validation = self.train.copy(), self.validation.copy()
        first = {(each.protocol, each.index): each for each in reversed(self.folds) if each.val}
        for row, fold in enumerate(self.folds):
            if not fold.val:
                group = np.isin(self.data.problem_id, first[fold.protocol, fold.index].val)
                validation[row] = group
                train[row] &= ~group
        return train, validation

    @cached_property
    def _targets(self) -> dict[tuple[object, ...], FoldTarget]:
        return {}

    def target(self, recipe: ProbeRecipe) -> FoldTarget:
        """Return what `recipe` is fitted to and judged by, on every fold.

        Recipes that agree in what a target reads have one: its baseline is solved once for all
        kinds of probes that are fitted to what it leaves.

        Args:
            recipe: with its target filled in (`ProbeRecipe.resolved`).

        Raises:
            LabelError: the labels lack what the target is made of.
        """
        if self.given is not None:
            return self.given
        control = recipe.control_seed if isinstance(recipe, ControlRecipe) else None
        key = (control, *(getattr(recipe, name) for name in TARGET_SETTINGS))
        if key not in self._targets:
            self._targets[key] = self._target(recipe)
        return self._targets[key]

    def _target(self, recipe: ProbeRecipe) -> FoldTarget:
        own = target_values(self.data.labels, recipe, self.labels)
        if isinstance(recipe, ControlRecipe):
            own = control_target(own, self.data, recipe.control_seed)
        weight = np.where(own.is_defined, own.weight, 0.0)
        if recipe.residualize == "none":
            positive = None if own.is_positive is None else own.is_positive[None]
            return FoldTarget(own.y[None], own.value[None], positive, weight)
        predictions = self._predictions(recipe.residualize, own)
        left = residual_targets(predictions, own, self.data.problem_id, recipe, self.labels)
        y = left.value
        if recipe.is_binary and left.is_positive is not None:
            y = left.is_positive.astype(np.float64)
        return FoldTarget(y, left.value, left.is_positive, weight)

    @cached_property
    def _predicted(self) -> dict[tuple[object, ...], Floats]:
        return {}

    def _predictions(self, residualize: Residualize, target: TargetValues) -> Floats:
        """Return what the baseline predicts, [fold, row]: once for anchors of all percentiles."""
        key = (residualize, target.value.tobytes(), target.weight.tobytes())
        if key not in self._predicted:
            baseline = ProbeRecipe(name="baseline", features=BASELINE_FEATURES[residualize])
            self._predicted[key] = baseline_predictions(self.matrix(baseline), self.train, target)
        return self._predicted[key]

    @cached_property
    def places(self) -> ScoredRows:
        """Where the scores of a fit are read off."""
        parts = [
            (number, fold, split, self.data.rows(problem_ids))
            for number, fold in enumerate(self.folds)
            for split, problem_ids in (("val", fold.val), ("test", fold.test))
        ]
        sizes = [len(rows) for _, _, _, rows in parts]
        row = np.concatenate([rows for _, _, _, rows in parts])
        number = np.repeat([number for number, _, _, _ in parts], sizes)
        protocols = np.repeat([fold.protocol for _, fold, _, _ in parts], sizes)
        indices = np.repeat([fold.index for _, fold, _, _ in parts], sizes)
        splits = np.repeat([split for _, _, split, _ in parts], sizes)
        frame = self.data.keys[row].with_columns(
            pl.Series("protocol", protocols, pl.Enum(PROTOCOLS)),
            pl.Series("fold", indices, pl.Int32),
            pl.Series("split", splits, pl.Enum(SPLITS)),
        )
        return ScoredRows(row, number, frame)

    @cached_property
    def words(self) -> FoldWords:
        """Terms of every fold.

        Raises:
            NotEnoughDataError: the training texts of a fold hold no word.
        """
        return fold_words(self.data.texts, self.train)

    def matrix(
        self, recipe: ProbeRecipe, device: str = "cpu", *, visible: Mask | None = None
    ) -> FoldMatrix:
        """Return the features of a linear recipe, standardised by every fold for itself.

        Args:
            recipe: says which features.
            device: of the dense ones.
            visible: [set, feature] bool of the dense ones; the folds stand once for each set, all
                folds of one set before those of the next. None: one set of all.

        Raises:
            DataError: the data lacks what the recipe reads.
            NotEnoughDataError: the training texts of a fold hold no word.
        """
        has_text = "text" in recipe.features
        text = TextBlock(self.words.counts, self.words.idf) if has_text else None
        dense = dense_matrix(recipe, self.data)
        if visible is None or len(visible) == 1:
            return FoldMatrix(self.train, dense, text, device=device)
        seen = np.repeat(visible, len(self.train), axis=0)
        train = np.tile(self.train, (len(visible), 1))
        return FoldMatrix(train, dense, text, visible=seen, device=device)

    def columns(self, fits: Sequence[Fit], train: Mask | None = None) -> FitRequest:
        """Return one column per fit and fold, folds running fastest.

        Args:
            fits: what to fit.
            train: [fold, row], the training rows; None: those of the folds.

        Raises:
            NotEnoughDataError: the training rows of a binary target hold one class.
        """
        train = self.train if train is None else train
        n_folds, n_rows = train.shape
        y = np.empty((n_rows, len(fits) * n_folds))
        weight = np.empty_like(y)
        for index, fit in enumerate(fits):
            target = self.target(fit.recipe)
            mine = slice(index * n_folds, (index + 1) * n_folds)
            y[:, mine] = np.broadcast_to(target.y, (n_folds, n_rows)).T
            weight[:, mine] = (train * target.weight).T
            if fit.recipe.is_binary:
                self._check_classes(fit.recipe, y[:, mine], weight[:, mine])
        seed = np.repeat([fit.seed for fit in fits], n_folds).astype(np.int64)
        return FitRequest(np.tile(np.arange(n_folds), len(fits)), y, weight, seed)

    def _check_classes(self, recipe: ProbeRecipe, y: Floats, weight: Floats) -> None:
        for fold, n_others, n_anchors in zip(self.folds, *class_sizes(y, weight > 0), strict=True):
            if not (n_others and n_anchors):
                raise NotEnoughDataError(
                    f"training needs two classes, found {'anchors' if n_anchors else 'no anchor'} "
                    f"among {n_others + n_anchors} sentences of problems {list(fold.train)}",
                    f"recipe {recipe.name!r}, {fold}",
                    "use more problems, or "
                    + (
                        "set evaluation.selectivity.recipes to []"
                        if isinstance(recipe, ControlRecipe)
                        else "lower labels.percentile"
                    ),
                )


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
