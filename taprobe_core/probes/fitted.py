"""A fitted probe: arrays in, scores out; what a batched solve leaves; probes on disk.

A solve leaves scores of every row, and each model's arrays on demand. Probes that read token sets
are fitted and scored here; those that read one row a sentence in `dense`.

A file of probes is JSON beside tensors. JSON: `format`, `seed`, `recipe` (with its target), `terms`
(every term that any fold chose, once, alphabetical) and `probes`, one object per fold: `protocol`,
`index`, `train`, `val`, `test`, `n_iter`, `is_converged`, `early_stopping`, `arrays`. A tensor's
name is the fold and the array, `lopo_3.coef`; `lopo_3.terms` [term] int32 are that fold's terms as
positions in `terms`.

What does not belong here: which estimator is which (`registry`), the training (`solvers`), rows and
targets (`design`), atomic publishing and hashes (`store`). Invariants: what a probe reads of a row
is a function of arrays, terms and the row alone; the same fit gives the same bytes, and loaded
probes hold bit-equal arrays. No pickle.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save
from scipy.sparse import csr_matrix, hstack
from scipy.special import expit

from taprobe_core.errors import (
    ConfigError,
    CorruptArtifactError,
    DataError,
    MissingArtifactError,
    NonFiniteError,
    StaleArtifactError,
)
from taprobe_core.probes.design import Design, Fit
from taprobe_core.probes.features import ProbeData, weigh_texts
from taprobe_core.probes.inputs import Arrays, Matrix, dense_matrix
from taprobe_core.solvers.columns import FitRequest
from taprobe_core.solvers.tokens.pooling import TokenProbeOptions
from taprobe_core.solvers.tokens.ragged import RaggedTokens
from taprobe_core.solvers.tokens.solve import fit_token_probes, positive_weights, score_token_probe
from taprobe_core.splits import Fold
from taprobe_core.store import write_bytes
from taprobe_core.study import ControlRecipe, ProbeRecipe

Floats = NDArray[np.float64]
Rows: TypeAlias = ArrayLike | RaggedTokens | None
"""What a probe reads of the rows beside their texts: [row, feature] dense features as they are, the
blocks of `DENSE_BLOCKS` side by side; or token sets (`RaggedTokens.of`); None for texts alone."""


@dataclass(frozen=True, eq=False)
class SolverResult:
    """One solve.

    Attributes:
        score: [row, column] float32: the probability of an anchor for targets that are classes,
            else the predicted value; the columns of `Design.columns`.
        n_iter: [column] int64, epochs of a network or token probe, else solver steps.
        probe: makes the stored probe of one column; called only for folds that are tested.
        not_converged: [column] float64, the error bound of a linear model that is not within its
            tolerance, NaN for the others; None where no model can be.
    """

    score: NDArray[np.float32]
    n_iter: NDArray[np.int64]
    probe: Callable[[Fit, int], FittedProbe]
    not_converged: NDArray[np.float64] | None = None


def own_features(recipe: ProbeRecipe, data: ProbeData) -> tuple[str, ...]:
    """Return the features that a recipe reads."""
    return recipe.features


@dataclass(frozen=True)
class Solver:
    """How one kind of estimator is fitted and scored.

    Attributes:
        solve: fits many recipes on every fold: design, fits, device and whether weights are kept.
        decide: log-odds or value of every row by a stored probe, as `FittedProbe.decide`.
        n_weights: about how many weights one probe has, given the recipe and the number of dense
            values that it reads of a row or token.
        per_model: settings in which the models of one solve may differ, beside their targets.
        features: what of the features the recipes of one solve have in common.
        stops_on_validation: whether training always stops by the fold's validation rows, so that
            the models of one solve must have their target defined on the same rows.
    """

    solve: Callable[[Design, Sequence[Fit], str, bool], SolverResult]
    decide: Callable[[FittedProbe, Rows, Sequence[str]], Floats]
    n_weights: Callable[[ProbeRecipe, int], int]
    per_model: tuple[str, ...] = ()
    features: Callable[[ProbeRecipe, ProbeData], tuple[str, ...]] = own_features
    stops_on_validation: bool = False


def scores_of(decision: NDArray[np.float64], recipe: ProbeRecipe) -> NDArray[np.float32]:
    """Return what a recipe's scores are: the probability of a class, else the value as it is."""
    return np.asarray(expit(decision) if recipe.is_binary else decision, dtype=np.float32)


@dataclass(frozen=True)
class Training:
    """How a fit ended.

    Attributes:
        n_iter: epochs of a network, else solver steps; 1 for equations solved at once.
        is_converged: False when a network used up its epochs, or a linear probe's error bound is
            above its tolerance.
        early_stopping: what a network did, in words; None for a linear probe.
    """

    n_iter: int
    is_converged: bool
    early_stopping: str | None = None


@dataclass(frozen=True, eq=False)
class FittedProbe:
    """One recipe fitted on the training problems of one fold.

    Attributes:
        recipe: target, features, estimator and settings.
        fold: the division it was fitted on.
        seed: the run's seed; a linear probe does not depend on it.
        arrays: `mean` and `scale` [feature] of dense features, `idf` [term] of text; `coef`
            [feature] and `intercept` [1] of a linear probe; all these float64; `weight_<i>`
            [in, out] and `bias_<i>` [out] of a network, float32; those of a token probe as
            `solvers.tokens` names them. Features stand as terms, then `DENSE_BLOCKS`.
        terms: the terms of `idf`, alphabetical; None without text.
        training: how the fit ended.
    """

    recipe: ProbeRecipe
    fold: Fold
    seed: int
    arrays: Arrays
    terms: tuple[str, ...] | None
    training: Training

    def decide(self, X: Rows, texts: Sequence[str] = ()) -> Floats:
        """Return the log-odds of an anchor, or the predicted value, [row] float64.

        Args:
            X: what the recipe reads of each row: [row, feature], not standardised, or token sets.
            texts: [row], of recipes that read `text`.

        Raises:
            DataError: another width than the probe was fitted on, or another number of texts.
            NonFiniteError: a feature is NaN or infinite; names the first row.
        """
        return SOLVERS[self.recipe.estimator].decide(self, X, texts)

    def predict_proba(self, X: Rows, texts: Sequence[str] = ()) -> Floats:
        """Return the probabilities of no anchor and of an anchor, [row, 2]; as `decide`.

        Raises:
            ConfigError: the recipe's target is a value, not a class.
        """
        if not self.recipe.is_binary:
            raise ConfigError(
                f"target {self.recipe.target} has no probabilities",
                f"recipe {self.recipe.name!r}",
                "call predict, which gives its value",
            )
        decision = self.decide(X, texts)
        return np.stack([expit(-decision), expit(decision)], axis=1)

    def predict(self, X: Rows, texts: Sequence[str] = ()) -> NDArray[Any]:
        """Return whether each row is likelier an anchor, [row] bool, or its value; as `decide`."""
        decision = self.decide(X, texts)
        return decision > 0 if self.recipe.is_binary else decision

    def scores(self, data: ProbeData) -> NDArray[np.float32]:
        """Score every row of `data`, as `SolverResult.score` does, [row] float32.

        Args:
            data: rows of any problems, with what the recipe reads of the same site.

        Raises:
            DataError: `data` lacks a feature, or has another d_model.
        """
        read = ragged_tokens if self.recipe.reads_tokens else dense_matrix
        return scores_of(self.decide(read(self.recipe, data), data.texts), self.recipe)

    def inputs(self, X: Rows, texts: Sequence[str] = ()) -> Matrix:
        """Return [terms ; standardised X], [row, feature] float64, sparse where there is text."""
        dense = None if X is None else np.asarray(X)
        expected = len(self.arrays.get("mean", ()))
        shape = () if dense is None else dense.shape
        if shape[1:] != ((expected,) if expected else ()):
            raise DataError(
                f"the data is {list(shape)}, the probe was fitted on {expected} features",
                f"recipe {self.recipe.name!r}, {self.fold}",
                "use activations of the model that the probe was fitted on",
            )
        scaled = None
        if dense is not None:
            bad = np.flatnonzero(~np.isfinite(dense).all(axis=1))
            if bad.size:
                raise NonFiniteError(
                    f"{bad.size} rows hold NaN or infinity",
                    f"row {bad[0]}",
                    "extract these states again, or leave the rows out",
                )
            scaled = (dense.astype(np.float64) - self.arrays["mean"]) / self.arrays["scale"]
        if self.terms is None:
            return scaled
        if dense is not None and len(texts) != len(dense):
            raise DataError(
                f"{len(texts)} texts for {len(dense)} rows",
                f"recipe {self.recipe.name!r}",
                "give one text per row",
            )
        weighted = weigh_texts(texts, self.terms, self.arrays["idf"])
        return weighted if scaled is None else csr_matrix(hstack([weighted, csr_matrix(scaled)]))


SOLVERS: dict[str, Solver] = {}
"""Name of an estimator -> how it is fitted and decides; `registry` names them."""


def fit_token_sets(
    design: Design, fits: Sequence[Fit], device: str, keep_weights: bool = True
) -> SolverResult:
    """Train the token probes of recipes that differ in target and seed alone.

    Binary targets weigh both classes alike while training; their scores are then calibrated on the
    fold's validation problems, the ones whose loss stopped the training.

    Args:
        design: rows and folds.
        fits: recipes of one token estimator, of equal settings.
        device: of the training.
        keep_weights: False where no probe will be asked for.

    Raises:
        DataError: the data has no token sets.
        NonFiniteError: a probe diverged.
    """
    recipe = fits[0].recipe
    train, validation = design.stopping_sides()
    # An undefined target has no loss; `fit` groups fits by what leaves it undefined.
    validation &= design.target(recipe).weight > 0
    columns, options = design.columns(fits, train), token_options(recipe)
    if options.is_binary and design.is_balanced:
        weight = columns.weight * positive_weights(columns.y, columns.fold, train)
        columns = FitRequest(columns.fold, columns.y, weight, columns.seed)
    tokens = ragged_tokens(recipe, design.data)
    found = fit_token_probes(
        tokens, train, validation, columns, options, device, keep_weights=keep_weights
    )
    score = found.probability() if options.is_binary else found.decision

    def probe(fit: Fit, column: int) -> FittedProbe:
        is_fitted = bool(found.is_calibrated[column])
        in_words = f"on: validation loss, best in epoch {found.best_epoch[column]}"
        if options.is_binary and not is_fitted:
            in_words += "; not calibrated"
        training = Training(int(found.n_iter[column]), bool(found.is_converged[column]), in_words)
        arrays: dict[str, NDArray[Any]] = {**found.column(column)}
        arrays["calibration"] = found.calibration[column]
        fold = design.folds[int(columns.fold[column])]
        return FittedProbe(fit.recipe, fold, fit.seed, arrays, None, training)

    return SolverResult(score.astype(np.float32), found.n_iter, probe)


def decide_tokens(probe: FittedProbe, X: Rows, texts: Sequence[str]) -> Floats:
    """Calibrated log-odds, or values, by a stored token probe; X are token sets."""
    decision = score_token_probe(RaggedTokens.of(X), probe.arrays, token_options(probe.recipe))
    slope, offset = probe.arrays["calibration"]
    return np.asarray(slope * decision + offset)


def ragged_tokens(recipe: ProbeRecipe, data: ProbeData) -> RaggedTokens:
    """Return the token sets of the rows.

    Raises:
        DataError: the data has none.
    """
    if data.tokens is None:
        raise DataError(
            f"recipe {recipe.name!r} reads token sets, and the data has none",
            "ProbeData.tokens",
            "pass activations of pooling tokens to join_features",
        )
    return RaggedTokens(torch.from_numpy(data.tokens.values), data.tokens.offsets)


def token_options(recipe: ProbeRecipe) -> TokenProbeOptions:
    """Return the solver's settings of a recipe."""
    own = recipe.token_probe
    return TokenProbeOptions(
        pooling=recipe.estimator,  # type: ignore[arg-type] # the recipe has a token estimator
        loss="logistic" if recipe.is_binary else own.loss,
        **own.model_dump(exclude={"loss"}),
    )


def _n_weights(recipe: ProbeRecipe, d_model: int) -> int:
    width, depth = recipe.token_probe.width, recipe.token_probe.depth
    return width * (d_model + (depth - 1) * width)


TOKEN_SETS = Solver(fit_token_sets, decide_tokens, _n_weights, stops_on_validation=True)
"""Probes that read each token of a sentence and pool what they read."""


FORMAT = 2
_ARRAYS, _REST = "probes.safetensors", "probes.json"
_FIT_AGAIN = "fit these probes again"


def save_probes(folder: Path, probes: Sequence[FittedProbe]) -> None:
    """Write the probes of one recipe into `folder`, which exists.

    Args:
        folder: receives `probes.safetensors` and `probes.json`.
        probes: one per fold, at least one.
    """
    first = probes[0]
    terms = sorted({term for probe in probes for term in probe.terms or ()})
    position = {term: index for index, term in enumerate(terms)}
    tensors = {}
    for probe in probes:
        arrays = dict(probe.arrays)
        if probe.terms is not None:
            arrays["terms"] = np.array([position[term] for term in probe.terms], dtype=np.int32)
        for name, array in arrays.items():
            tensors[f"{_prefix(probe.fold)}.{name}"] = np.ascontiguousarray(array)
    document = {
        "format": FORMAT,
        "seed": first.seed,
        "recipe": first.recipe.model_dump(mode="json"),
        "terms": terms,
        "probes": [_record(probe) for probe in probes],
    }
    # The library's own writer would let only its owner read the file, whatever the umask says.
    write_bytes(folder / _ARRAYS, save(tensors))
    text = json.dumps(document, ensure_ascii=False, allow_nan=False, indent=1, sort_keys=True)
    (folder / _REST).write_text(text + "\n", encoding="utf-8")


def load_probes(folder: Path) -> list[FittedProbe]:
    """Read what `save_probes` wrote, in fold order.

    Raises:
        MissingArtifactError: a file is absent.
        StaleArtifactError: another version of this format.
        CorruptArtifactError: a file cannot be read, or the two do not belong together.
    """
    missing = [name for name in (_ARRAYS, _REST) if not (folder / name).is_file()]
    if missing:
        raise MissingArtifactError(f"no {' and no '.join(missing)}", str(folder), _FIT_AGAIN)
    try:
        document = json.loads((folder / _REST).read_text(encoding="utf-8"))
        if document["format"] != FORMAT:
            raise StaleArtifactError(
                f"format is {document['format']}, this version reads {FORMAT}",
                str(folder / _REST),
                _FIT_AGAIN,
            )
        tensors = load_file(folder / _ARRAYS)
        kind = ControlRecipe if "control_seed" in document["recipe"] else ProbeRecipe
        recipe = kind.model_validate_json(json.dumps(document["recipe"]))
        return [_probe(document, recipe, record, tensors) for record in document["probes"]]
    except (ValueError, KeyError, TypeError, IndexError, SafetensorError) as error:
        raise CorruptArtifactError(
            f"probes cannot be read ({type(error).__name__}: {error})", str(folder), _FIT_AGAIN
        ) from error


def _record(probe: FittedProbe) -> dict[str, Any]:
    fold, training = probe.fold, probe.training
    return {
        "protocol": fold.protocol,
        "index": fold.index,
        "train": list(fold.train),
        "val": list(fold.val),
        "test": list(fold.test),
        "n_iter": training.n_iter,
        "is_converged": training.is_converged,
        "early_stopping": training.early_stopping,
        "arrays": sorted(probe.arrays),
    }


def _probe(
    document: dict[str, Any], recipe: ProbeRecipe, record: dict[str, Any], tensors: Arrays
) -> FittedProbe:
    train, val, test = (tuple(record[side]) for side in ("train", "val", "test"))
    fold = Fold(record["protocol"], record["index"], train, val, test)
    prefix = _prefix(fold)
    terms = None
    if "text" in recipe.features:
        terms = tuple(document["terms"][position] for position in tensors[f"{prefix}.terms"])
    return FittedProbe(
        recipe=recipe,
        fold=fold,
        seed=document["seed"],
        arrays={name: tensors[f"{prefix}.{name}"] for name in record["arrays"]},
        terms=terms,
        training=Training(record["n_iter"], record["is_converged"], record["early_stopping"]),
    )


def _prefix(fold: Fold) -> str:
    return f"{fold.protocol}_{fold.index}"
