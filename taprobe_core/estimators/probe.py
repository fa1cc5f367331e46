"""One recipe fitted to arrays or DataFrames: scikit-learn's interface to what studies fit.

`Probe` lays its rows out as a study's design of one fold, so that it is solved by the same code,
and keeps a `FittedProbe`, which is also how new text is scored. What does not belong here: many
fits at once (`probes.fit`), folds and targets of a study.

Invariants: what is held out to stop early is whole groups where there are groups; errors in what
scikit-learn checks are its own `ValueError`; the scaler ignores weights, as in a pipeline whose
last step takes them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal, Self

import numpy as np
import polars as pl
import torch
from numpy.typing import ArrayLike, NDArray
from pydantic import ValidationError
from sklearn.base import BaseEstimator
from sklearn.metrics import accuracy_score, r2_score
from sklearn.utils import ClassifierTags, RegressorTags, check_random_state
from sklearn.utils.metaestimators import available_if
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import (
    _check_sample_weight,
    check_consistent_length,
    check_is_fitted,
    column_or_1d,
    validate_data,
)

from taprobe_core.errors import ConfigError
from taprobe_core.probes import Design, Fit
from taprobe_core.probes.design import FoldTarget
from taprobe_core.probes.features import ProbeData, TokenSets
from taprobe_core.probes.registry import SOLVERS
from taprobe_core.solvers.tokens.ragged import RaggedTokens, is_ragged
from taprobe_core.splits import Fold
from taprobe_core.study import ESTIMATORS, Labels, ProbeRecipe, Splits

Features = RaggedTokens | Sequence[ArrayLike | torch.Tensor] | ArrayLike
"""[row, feature] array or DataFrame; or token sets: `RaggedTokens`, or a [token, d] array a row."""

MAX_SEED = 2**31 - 1
TARGETS_OF = {"classification": "anchor_binary", "regression": "importance_signed"}
"""Task -> the target that a recipe without one gets."""


def _classifies(probe: Probe) -> bool:
    return probe.resolved_task == "classification"


class Probe(BaseEstimator):  # type: ignore[misc] # scikit-learn is untyped
    """A recipe, or an estimator by its name, fitted to rows of features or to token sets.

    A setting that is None is the recipe's, or the estimator's default (`study.ESTIMATORS` says
    which estimator reads which; others are refused). y is taken as it is given: `weights` and
    `residualize` of a recipe are the caller's.

    Args:
        recipe: a `ProbeRecipe`, whose features are the columns of X; or linear, mlp, attention,
            multimax or rolling_multimax.
        task: classification of two classes, or regression; None: what the recipe's target is, and
            classification without one.
        regularization: C of linear classification, alpha of linear regression.
        hidden: units of every hidden layer of an mlp.
        max_iter: epochs at most of an mlp.
        early_stopping: whether an mlp stops early.
        held_out: rows or problems; None: problems if `fit` is given groups, else the recipe's.
        n_heads: of token probes, as all that follow (`study.TokenProbe`).
        width: units of each layer that reads a token.
        depth: such layers.
        window: tokens of a window of rolling_multimax.
        training: hard or soft maxima while training.
        loss: huber or squared, of regression.
        learning_rate: of AdamW.
        weight_decay: of AdamW.
        batch_size: sentences of a step.
        max_epochs: passes over the sentences at most.
        patience: epochs without a better validation loss before training stops.
        balanced: whether linear and token probes weigh both classes alike; an mlp never does.
        validation_fraction: share held out to stop early on (and to calibrate token probes): of
            the groups, or of the rows of each class without groups.
        random_state: seed, or what draws one.
        device: where to compute.

    Attributes:
        fitted_: the `FittedProbe`: arrays, scores, `probes.save_probes`.
        classes_: [2], sorted; of classification.
        is_held_out_: [row] bool, rows not trained on.
        n_iter_: epochs of a network, else solver steps.
        n_features_in_, feature_names_in_: as scikit-learn's.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> X = [rng.normal(size=(n, 4)) for n in rng.integers(1, 9, 60)]
        >>> y = [each[:, 0].max() > 1 for each in X]
        >>> Probe("multimax", width=8).fit(X, y, groups=np.arange(60) // 6).predict_proba(X).shape
        (60, 2)
    """

    def __init__(
        self,
        recipe: ProbeRecipe | str = "linear",
        *,
        task: Literal["classification", "regression"] | None = None,
        regularization: float | None = None,
        hidden: tuple[int, ...] | None = None,
        max_iter: int | None = None,
        early_stopping: bool | None = None,
        held_out: Literal["rows", "problems"] | None = None,
        n_heads: int | None = None,
        width: int | None = None,
        depth: int | None = None,
        window: int | None = None,
        training: Literal["hard", "soft"] | None = None,
        loss: Literal["huber", "squared"] | None = None,
        learning_rate: float | None = None,
        weight_decay: float | None = None,
        batch_size: int | None = None,
        max_epochs: int | None = None,
        patience: int | None = None,
        balanced: bool = True,
        validation_fraction: float = 0.15,
        random_state: int | np.random.RandomState | None = 0,
        device: str = "cpu",
    ) -> None:
        self.recipe = recipe
        self.task = task
        self.regularization = regularization
        self.hidden = hidden
        self.max_iter = max_iter
        self.early_stopping = early_stopping
        self.held_out = held_out
        self.n_heads = n_heads
        self.width = width
        self.depth = depth
        self.window = window
        self.training = training
        self.loss = loss
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.batch_size = batch_size
        self.max_epochs = max_epochs
        self.patience = patience
        self.balanced = balanced
        self.validation_fraction = validation_fraction
        self.random_state = random_state
        self.device = device

    def fit(
        self,
        X: Features,
        y: ArrayLike,
        sample_weight: ArrayLike | None = None,
        groups: ArrayLike | None = None,
    ) -> Self:
        """Fit one probe.

        Args:
            X: [row, feature] array or DataFrame; or token sets: `RaggedTokens`, a list of arrays
                [token, d], or one [row, token, d] array. Token probes read rows as one token each.
            y: [row] two classes, or values; a Series or a DataFrame of one column will do.
            sample_weight: [row], at least 0; default 1.
            groups: [row] problem ids. What is held out to stop early is then whole problems; a
                linear probe holds nothing out.

        Raises:
            ValueError: input that scikit-learn would refuse, or other than two classes.
            ConfigError: settings that the recipe or estimator does not take.
            TaprobeError: as the solver.
        """
        seed = self.random_state
        if not isinstance(seed, int | np.integer):
            seed = check_random_state(seed).randint(MAX_SEED)
        recipe = self._resolved(has_groups=groups is not None)
        rows, target = self._read(X, y, recipe)
        if recipe.is_binary:
            check_classification_targets(target)
            self.classes_, target = np.unique(target, return_inverse=True)
            if len(self.classes_) != 2:
                raise ValueError(
                    "Only binary classification is supported. y has "
                    f"{len(self.classes_)} class(es), the classifier needs 2 classes"
                )
        value = np.asarray(target, dtype=np.float64)
        weight = _check_sample_weight(
            sample_weight, np.empty((len(value), 1)), dtype=np.float64, ensure_non_negative=True
        )
        if recipe.is_binary and len(np.unique(value[weight > 0])) < 2:
            raise ValueError("the rows of weight above 0 have one class only, 2 classes are needed")
        problem = np.arange(len(value)) if groups is None else _problems(groups, len(value))
        held = np.zeros(len(value), dtype=bool)
        if _stops_on_problems(recipe):
            strata = value if recipe.is_binary else np.zeros(len(value))
            units = problem if groups is not None else None
            held = held_out(strata, units, self.validation_fraction, int(seed))
        train, val = (tuple(np.unique(problem[side]).tolist()) for side in (~held, held))
        design = Design(
            _as_data(rows, problem),
            (Fold("holdout", 0, train, val, test=()),),
            Splits(),
            Labels(),
            given=FoldTarget(value[None], value[None], None, weight),
            is_balanced=self.balanced,
        )
        own = {} if recipe.reads_tokens else {"features": ("activations",), "pooling": "mean"}
        fit = Fit(recipe.model_copy(update=own), int(seed))
        solved = SOLVERS[recipe.estimator].solve(design, [fit], self.device, True)
        self.fitted_ = replace(solved.probe(fit, 0), recipe=recipe)
        self.is_held_out_ = held
        self.n_iter_ = max(1, self.fitted_.training.n_iter)
        return self

    def predict(self, X: Features) -> NDArray[Any]:
        """Return the likelier class of each row, or its value, [row]."""
        decision = self._decide(X)
        if not _classifies(self):
            return decision
        return np.take(self.classes_, (decision > 0).astype(int))

    @available_if(_classifies)  # type: ignore[untyped-decorator]
    def decision_function(self, X: Features) -> NDArray[np.float64]:
        """Return the log-odds of the second class, [row] float64."""
        return self._decide(X)

    @available_if(_classifies)  # type: ignore[untyped-decorator]
    def predict_proba(self, X: Features) -> NDArray[np.float64]:
        """Return the probabilities of both classes, [row, 2] float64."""
        check_is_fitted(self)
        return self.fitted_.predict_proba(self._rows(X))

    def score(self, X: Features, y: ArrayLike, sample_weight: ArrayLike | None = None) -> float:
        """Return the accuracy of a classification, R^2 of a regression."""
        measure = accuracy_score if _classifies(self) else r2_score
        return float(measure(y, self.predict(X), sample_weight=sample_weight))

    @property
    def resolved_task(self) -> str:
        """`task`, or what the recipe's target is."""
        if self.task is not None:
            return self.task
        recipe = self.recipe
        is_value = isinstance(recipe, ProbeRecipe) and recipe.target and not recipe.is_binary
        return "regression" if is_value else "classification"

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.required = True
        if _classifies(self):
            tags.estimator_type = "classifier"
            tags.classifier_tags = ClassifierTags(multi_class=False)
        else:
            tags.estimator_type, tags.regressor_tags = "regressor", RegressorTags()
        return tags

    def _resolved(self, *, has_groups: bool) -> ProbeRecipe:
        """The recipe with every setting filled in."""
        base = self.recipe
        if isinstance(base, str):
            if base not in ESTIMATORS:
                known = ", ".join(ESTIMATORS)
                raise ConfigError(f"no estimator {base!r}", "Probe.recipe", f"use one of {known}")
            features = "tokens" if ESTIMATORS[base].reads_tokens else "activations"
            base = ProbeRecipe(name="probe", features=(features,), estimator=base)  # type: ignore[arg-type]
        if "text" in base.features:
            raise ConfigError(
                "a recipe that reads text",
                f"Probe, recipe {base.name!r}",
                "fit it with probes.fit_batches, which has the texts; Probe reads arrays",
            )
        entry, task = base.estimator_entry, self.resolved_task
        if task not in TARGETS_OF or (base.target and base.is_binary != (task == "classification")):
            raise ConfigError(
                f"task {task!r} with target {base.target}",
                "Probe.task",
                f"use one of {', '.join(TARGETS_OF)} that is what the target is, or leave it out",
            )
        names = {each.name for other in ESTIMATORS.values() for each in other.settings}
        given = {name: each for name in names if (each := getattr(self, name)) is not None}
        is_value = task == "regression"
        read = {each.name for each in entry.settings if is_value or not each.only_continuous}
        unread = sorted(given.keys() - read)
        if unread:
            raise ConfigError(
                f"{', '.join(unread)}, which {task} by {entry.name} does not read",
                "Probe",
                f"leave it out; it reads {', '.join(sorted(read))}",
            )
        if has_groups and self.held_out is None and entry.part is None:
            given["held_out"] = "problems"
        content = base.model_dump(mode="json")
        if entry.part is None:
            content |= given
        else:
            content[entry.part] |= given
        content["target"] = base.target or TARGETS_OF[task]
        try:
            # As JSON, where a list stands for a tuple and NumPy's numbers for Python's.
            return type(base).model_validate_json(json.dumps(content, default=np.generic.item))
        except ValidationError as error:
            faults = [f"{each['loc'][-1]}: {each['msg']}" for each in error.errors()]
            raise ConfigError("; ".join(faults), "Probe", "give settings in their range") from None

    def _read(self, X: Features, y: ArrayLike, recipe: ProbeRecipe) -> tuple[Any, NDArray[Any]]:
        """Rows as the solver reads them, and the target, both checked as scikit-learn does."""
        if hasattr(y, "columns") and len(y.columns) == 1:
            y = np.asarray(y)[:, 0]
        is_numeric = not recipe.is_binary
        if recipe.reads_tokens and (isinstance(X, RaggedTokens) or is_ragged(X)):
            tokens = RaggedTokens.of(X)
            y = validate_data(self, X="no_validation", y=y, y_numeric=is_numeric)
            y = column_or_1d(y, warn=True)
            check_consistent_length(np.empty(len(tokens)), y)
            self.n_features_in_ = tokens.n_features
            if hasattr(self, "feature_names_in_"):
                del self.feature_names_in_
            return tokens, np.asarray(y)
        rows, target = validate_data(
            self, X, y, dtype=self._dtypes(recipe), y_numeric=is_numeric, ensure_min_samples=2
        )
        return RaggedTokens.of(rows) if recipe.reads_tokens else rows, target

    def _rows(self, X: Features) -> Any:
        recipe = self.fitted_.recipe
        if recipe.reads_tokens and (isinstance(X, RaggedTokens) or is_ragged(X)):
            tokens = RaggedTokens.of(X)
            if tokens.n_features != self.n_features_in_:
                raise ValueError(
                    f"X has {tokens.n_features} features, but Probe is expecting "
                    f"{self.n_features_in_} features as input"
                )
            return tokens
        return validate_data(self, X, dtype=self._dtypes(recipe), reset=False)

    def _decide(self, X: Features) -> NDArray[np.float64]:
        check_is_fitted(self)
        return self.fitted_.decide(self._rows(X))

    def _dtypes(self, recipe: ProbeRecipe) -> Any:
        return [np.float64, np.float32] if recipe.estimator_entry.is_linear else np.float32


LogisticProbe = partial(Probe, balanced=False)
"""`Pipeline(StandardScaler(), LogisticRegression())` at its converged optimum."""


def _problems(groups: ArrayLike, n_rows: int) -> NDArray[np.int64]:
    """Groups as problem ids: whole numbers as they are, anything else numbered in order."""
    ids = column_or_1d(groups)
    check_consistent_length(np.empty(n_rows), ids)
    if not np.issubdtype(ids.dtype, np.integer):
        ids = np.unique(ids, return_inverse=True)[1]
    return np.asarray(ids, dtype=np.int64)


def _stops_on_problems(recipe: ProbeRecipe) -> bool:
    read = {each.name for each in recipe.estimator_entry.read(recipe, is_binary=recipe.is_binary)}
    is_held_out = "held_out" in read and recipe.held_out == "problems"
    return SOLVERS[recipe.estimator].stops_on_validation or is_held_out


def held_out(
    strata: NDArray[np.float64], groups: NDArray[np.int64] | None, share: float, seed: int
) -> NDArray[np.bool_]:
    """Draw the rows to hold out, [row] bool: whole groups, or without any of each stratum alike.

    Raises:
        ValueError: the share is not inside (0, 1), or there is nothing to divide.
    """
    if not 0 < share < 1:
        raise ValueError(f"validation_fraction is {share}, expected between 0 and 1")
    random = np.random.RandomState(seed % 2**32)
    if groups is not None:
        held = _drawn(groups, share, random)
    else:
        held = np.zeros(len(strata), dtype=bool)
        for stratum in np.unique(strata):
            rows = np.flatnonzero(strata == stratum)
            held[rows] = _drawn(rows, share, random)
    if not held.any():
        raise ValueError(
            "1 sample, or 1 group, of each class cannot be divided: nothing to hold out"
        )
    return held


def _drawn(unit: NDArray[Any], share: float, random: np.random.RandomState) -> NDArray[np.bool_]:
    distinct = np.unique(unit)
    n_held = min(max(round(share * len(distinct)), 1), len(distinct) - 1)
    return np.isin(unit, random.permutation(distinct)[:n_held])


def _as_data(rows: Any, problem: NDArray[np.int64]) -> ProbeData:
    """The rows as joined features: activations, or token states."""
    index = np.arange(len(problem))
    labels = pl.DataFrame({"problem_id": problem, "sentence_idx": index})
    empty = np.empty((len(problem), 0), dtype=np.float32)
    if isinstance(rows, RaggedTokens):
        values = rows.values.float() if rows.values.dtype == torch.bfloat16 else rows.values
        tokens = TokenSets(values.cpu().numpy(), rows.offsets)
        return ProbeData(labels, [""] * len(problem), empty, empty, tokens=tokens)
    return ProbeData(labels, [""] * len(problem), empty, empty, activations={"mean": rows})
