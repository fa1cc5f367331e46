"""Attention, MultiMax and rolling MultiMax probes, many models sharing one pass over the tokens.

Models (folds, targets, seeds) are grouped by seed and steps of an epoch; the models of a group see
the same sentences in the same order, so that the tokens of a batch are read once and the first
layer of all models is one matrix product. What does not belong here: training (`training`), the
network (`forward`) and which columns there are.

Invariant: a column's result is a function of its own fold, target, weights and seed, of the
options and of the sentences; which other columns it is solved with changes it by rounding only.

Source:
    arXiv 2601.11516 for the probes. Ours differs: a learned weight per head where theirs sums the
    heads; learning rate 1e-3, no weight decay and early stopping on validation loss by default
    where theirs has 1e-4, 3e-3 and about 1,000 steps with the best of many seeds; calibrated
    outputs (`platt`). Standardisation and stacking are ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from taprobe_core.errors import DataError, NonFiniteError
from taprobe_core.solvers.columns import FitRequest, class_sizes
from taprobe_core.solvers.tokens.forward import Stack
from taprobe_core.solvers.tokens.learner import Targets, stopping_weights
from taprobe_core.solvers.tokens.platt import calibrate, probabilities
from taprobe_core.solvers.tokens.pooling import TokenProbeOptions
from taprobe_core.solvers.tokens.ragged import RaggedTokens
from taprobe_core.solvers.tokens.replay import Recorder, recording
from taprobe_core.solvers.tokens.states import (
    TokenStates,
    check_finite,
    models_at_once,
    stacks,
    steps_of,
    token_states,
)
from taprobe_core.solvers.tokens.training import Trained, network_shape, score_stack, train_stack

Mask = NDArray[np.bool_]
Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class TokenSolution:
    """Trained token probes, one per column.

    Attributes:
        arrays: weights by name, [column, ...] float32, of states standardised by `mean` and
            `scale`, which are among them as [column, d]; `score_token_probe` reads one column.
        mean: [fold, d] float64, of the training tokens.
        scale: [fold, d] float64, their standard deviation; 1 where constant.
        n_iter: [column] int64, epochs trained.
        best_epoch: [column] int64, from 1, the epoch whose weights are kept.
        is_converged: [column] bool, whether patience ran out before the last epoch; False without
            validation sentences.
        decision: [sentence, column] float64, logits or predicted values of every sentence.
        calibration: [column, 2] float64, slope and offset of Platt scaling; (1, 0) where it could
            not be fitted, and for continuous targets.
        is_calibrated: [column] bool, whether it was fitted.
    """

    arrays: dict[str, NDArray[np.float32]]
    mean: Floats
    scale: Floats
    n_iter: NDArray[np.int64]
    best_epoch: NDArray[np.int64]
    is_converged: NDArray[np.bool_]
    decision: Floats
    calibration: Floats
    is_calibrated: NDArray[np.bool_]

    def probability(self) -> Floats:
        """Return calibrated probabilities of the positive class, [sentence, column]."""
        return probabilities(self.decision, self.calibration)

    def column(self, at: int) -> dict[str, NDArray[np.float32]]:
        """Return the arrays of one model; none where weights were not kept."""
        return {name: array[at] for name, array in self.arrays.items()}


def positive_weights(y: Floats, fold: NDArray[np.int64], train: Mask) -> Floats:
    """Weigh positives so that both classes count alike, as `pos_weight` does.

    Args:
        y: [sentence, column], 0 or 1.
        fold: [column] int64.
        train: [fold, sentence] bool.

    Returns:
        [sentence, column] float64: negatives / max(positives, 1) for training positives, 1 for
        training negatives, 0 elsewhere.
    """
    is_train = train[fold].T
    negatives, positives = class_sizes(y, is_train)
    weight = negatives / np.maximum(positives, 1)
    return np.where(is_train & (y > 0.5), weight, is_train.astype(np.float64))


def fit_token_probes(
    tokens: RaggedTokens,
    train: Mask,
    validation: Mask | None,
    columns: FitRequest,
    options: TokenProbeOptions,
    device: torch.device | str = "cpu",
    *,
    keep_weights: bool = True,
    max_bytes: int | None = None,
) -> TokenSolution:
    """Fit one token probe per column.

    Training stops for each model by its own validation loss, a weighted mean. The target of a
    validation sentence is read from its column, like that of a training sentence.

    Args:
        tokens: n sentences.
        train: [fold, n] bool, training sentences.
        validation: [fold, n] bool, sentences that decide when to stop, apart from the training
            ones, and that calibrate; None: every model trains for `max_epochs` and none is
            calibrated.
        columns: models with seeds of at least 0; y is 0 or 1 for a logistic loss.
        options: settings.
        device: where to compute.
        keep_weights: False saves memory where the scores are enough.
        max_bytes: of the models trained at once, beside the token states; default 2 GiB on a CPU,
            half of the free memory of a GPU.

    Returns:
        The probes, their scores and how they got there; equal for equal arguments on one machine.

    Raises:
        DataError: masks, columns and tokens do not fit together.
        NotEnoughDataError: a column has no validation sentence.
        NonFiniteError: a token state, or the loss of a model, is NaN or infinite.
    """
    _check(tokens, train, validation, columns, options)
    states = token_states(tokens, train, torch.device(device))
    stopping_weight = None
    if validation is not None:
        stopping_weight = stopping_weights(columns, validation, options.is_binary)
    n, m = columns.y.shape
    shape = network_shape(tokens.n_features, options)
    sizes = shape.parameters() if keep_weights else {}
    arrays = {name: np.empty((m, *size), np.float32) for name, size in sizes.items()}
    n_iter, best_epoch = np.zeros((2, m), dtype=np.int64)
    is_converged, decision = np.zeros(m, dtype=bool), np.empty((n, m))
    steps = steps_of(columns, options)
    at_once = models_at_once(states, shape, options, int(steps.min()), max_bytes)
    with recording(states.device) as recorder:
        for chosen, seed in stacks(columns, steps, at_once):
            found = _fit_group(states, columns, stopping_weight, options, chosen, seed, recorder)
            for name, kept in arrays.items():
                kept[chosen] = found.trained.stack.views[name].cpu().numpy()
            n_iter[chosen] = found.trained.n_epochs
            best_epoch[chosen] = found.trained.best_epoch
            is_converged[chosen] = found.trained.is_stopped
            decision[:, chosen] = found.decision
    if keep_weights:
        arrays["mean"] = states.mean[columns.fold].astype(np.float32)
        arrays["scale"] = states.scale[columns.fold].astype(np.float32)
    calibration, is_calibrated = np.tile([1.0, 0.0], (m, 1)), np.zeros(m, dtype=bool)
    if options.is_binary and validation is not None:
        calibration, is_calibrated = calibrate(decision, columns.y, validation[columns.fold].T)
    return TokenSolution(
        arrays,
        states.mean,
        states.scale,
        n_iter,
        best_epoch,
        is_converged,
        decision,
        calibration,
        is_calibrated,
    )


def score_token_probe(
    tokens: RaggedTokens,
    arrays: Mapping[str, NDArray[np.float32]],
    options: TokenProbeOptions,
    device: torch.device | str = "cpu",
) -> Floats:
    """Score sentences with one trained probe.

    Args:
        tokens: n sentences.
        arrays: of one model, as `TokenSolution.column` returns them.
        options: as it was trained with.
        device: where to compute.

    Returns:
        [n] float64, uncalibrated logits or predicted values.

    Raises:
        DataError: the tokens have another width than the probe.
        NonFiniteError: a token state is NaN or infinite.
    """
    width = arrays["mean"].shape[0]
    if tokens.n_features != width:
        raise DataError(
            f"token states of width {tokens.n_features} for a probe of width {width}",
            "token sets",
            "score the layer of the model that the probe was trained on",
        )
    check_finite(tokens)
    mean, scale = (arrays[name].astype(np.float64)[None] for name in ("mean", "scale"))
    centre, inverse = (
        torch.from_numpy(each[0].astype(np.float32)).to(device) for each in (mean, 1 / scale)
    )
    states = TokenStates(tokens.to(device), centre, inverse, mean, scale)
    stack = Stack.zeros(network_shape(width, options), 1, states.device, torch.float32)
    stack.fill({name: arrays[name] for name in stack.views})
    scaling = states.scaling(np.zeros(1, dtype=np.int64))
    scores = score_stack(stack, scaling, states, options)[:, 0]
    return np.asarray(scores.cpu().numpy(), dtype=np.float64)


class _Fitted(NamedTuple):
    trained: Trained
    decision: Floats


def _fit_group(
    states: TokenStates,
    columns: FitRequest,
    stopping_weight: Floats | None,
    options: TokenProbeOptions,
    chosen: NDArray[np.intp],
    seed: int,
    recorder: Recorder | None,
) -> _Fitted:
    scaling = states.scaling(columns.fold[chosen])
    targets = Targets(
        columns.y[:, chosen],
        columns.weight[:, chosen],
        None if stopping_weight is None else stopping_weight[:, chosen],
    )
    trained = train_stack(states, scaling, targets, options, seed, recorder)
    decision = score_stack(trained.stack, scaling, states, options).cpu().numpy()
    is_bad = ~np.isfinite(decision).all(axis=0)
    if stopping_weight is not None:
        is_bad |= ~np.isfinite(trained.best_loss)
    if is_bad.any():
        raise NonFiniteError(
            f"{int(is_bad.sum())} token probes diverged",
            f"column {int(chosen[is_bad][0])}, seed {seed}",
            "lower learning_rate, or look for extreme values among targets and weights",
        )
    return _Fitted(trained, decision.astype(np.float64))


def _check(
    tokens: RaggedTokens,
    train: Mask,
    validation: Mask | None,
    columns: FitRequest,
    options: TokenProbeOptions,
) -> None:
    columns.check(train)
    is_read = columns.weight > 0
    if validation is not None and validation.shape == train.shape:
        is_read = is_read | validation[columns.fold].T
    faults = {
        f"{len(tokens)} sentences of tokens and {train.shape[1]} of masks": (
            len(tokens) != train.shape[1]
        ),
        "no seed, or one below 0": columns.seed is None or bool((columns.seed < 0).any()),
        "binary targets that are not 0 or 1": (
            options.is_binary and not np.isin(columns.y[is_read], (0.0, 1.0)).all()
        ),
        "training masks that are empty": not train.any(axis=1).all(),
        "validation masks of another shape, or that hold training sentences": (
            validation is not None
            and (validation.shape != train.shape or bool((validation & train).any()))
        ),
    }
    found = [what for what, is_found in faults.items() if is_found]
    if found:
        raise DataError(
            "; ".join(found), "token probes", "make masks and columns from the same folds"
        )
