"""Train the multilayer perceptron, and decide when to stop.

Initial weights, batches, updates and losses are those of scikit-learn's `MLPClassifier` and
`MLPRegressor`, drawn from the same random stream; without early stopping the weights agree. Early
stopping differs on purpose:

- scikit-learn holds out rows, so sentences of one trace stand on both sides; here whole training
  problems are held out (one in ten, rounded up, drawn by the seed).
- scikit-learn watches accuracy, which is best at the first epoch when one sentence in ten is an
  anchor; here the held-out loss is watched, for both kinds of target.
- Off, and said so in `Training.early_stopping`, when fewer than `MIN_PROBLEMS` problems train or
  when a side of a binary target would hold one class only. Then the training loss is watched.

A continuous target is standardised on the training rows, so that tolerance and penalty mean the
same for every target; the output layer undoes it. What does not belong here: features and scores.
Invariant: deterministic given the seed and the rows; float32 throughout; no global state.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from sklearn.utils import check_random_state

from taprobe_core.errors import NumericsError
from taprobe_core.probes.inputs import Matrix
from taprobe_core.probes.layers import Layer, Singles, Trainer
from taprobe_core.study.config import ProbeRecipe

PATIENCE = 20
TOLERANCE = 1e-4
MIN_PROBLEMS = 5


class Network(NamedTuple):
    """Trained layers, (weight [in, out], bias [out]) each, and how training ended."""

    layers: list[Layer]
    n_iter: int
    is_converged: bool
    early_stopping: str


def train_network(
    X: Matrix,
    y: NDArray[np.float64],
    problem_id: NDArray[np.int64],
    recipe: ProbeRecipe,
    is_binary: bool,
    seed: int,
) -> Network:
    """Train on the rows given.

    Args:
        X: [row, feature], dense or sparse; standardised by the caller.
        y: [row]; 0 or 1 when `is_binary`.
        problem_id: [row], the problem of each row.
        recipe: `hidden`, `max_iter` and `early_stopping`.
        is_binary: log loss and a logit output; else squared loss and the target itself.
        seed: of initial weights, held-out problems and batches.

    Returns:
        The layers; `is_converged` is False when `max_iter` epochs ended training.

    Raises:
        NumericsError: weights became NaN or infinite.
    """
    rng = check_random_state(seed)
    shift, spread = (0.0, 1.0) if is_binary else _moments(y)
    X, target = X.astype(np.float32), ((y - shift) / spread).astype(np.float32)[:, None]
    held_out, early_stopping = _hold_out(y, problem_id, recipe, is_binary, rng)
    trainer = Trainer(X[~held_out], target[~held_out], recipe.hidden, is_binary, rng)
    watched = (X[held_out], target[held_out]) if held_out.any() else None
    # An overflow is met where it shows, as a loss that is no number.
    with np.errstate(over="ignore", invalid="ignore"):
        n_iter, is_converged = _run(trainer, watched, recipe.max_iter)
    layers = [(weight.copy(), bias.copy()) for weight, bias in trainer.layers]
    if not is_binary:
        weight, bias = layers[-1]
        layers[-1] = (weight * np.float32(spread), bias * np.float32(spread) + np.float32(shift))
    return Network(layers, n_iter, is_converged, early_stopping)


def _moments(y: NDArray[np.float64]) -> tuple[float, float]:
    mean, deviation = float(y.mean()), float(y.std())
    # The deviation of a constant is rounding, and would be blown up to 1.
    return mean, deviation if deviation > 1e-12 * max(1.0, abs(mean)) else 1.0


def _hold_out(
    y: NDArray[np.float64],
    problem_id: NDArray[np.int64],
    recipe: ProbeRecipe,
    is_binary: bool,
    rng: np.random.RandomState,
) -> tuple[NDArray[np.bool_], str]:
    """Return the held-out rows (none when off), and what was decided, in words."""
    none = np.zeros(len(y), dtype=bool)
    if not recipe.early_stopping:
        return none, "off: the recipe says so"
    problems = np.unique(problem_id)
    if len(problems) < MIN_PROBLEMS:
        return none, f"off: {len(problems)} training problems, {MIN_PROBLEMS} needed"
    n_held_out = -(-len(problems) // 10)
    held_out = np.isin(problem_id, rng.permutation(problems)[:n_held_out])
    if is_binary and min(len(np.unique(y[side])) for side in (held_out, ~held_out)) < 2:
        return none, "off: the held-out or the remaining problems have one class only"
    return held_out, f"on: {n_held_out} of {len(problems)} training problems held out"


def _run(
    trainer: Trainer, watched: tuple[Matrix, Singles] | None, max_iter: int
) -> tuple[int, bool]:
    """Train until `PATIENCE` epochs in a row gain less than `TOLERANCE`, or `max_iter` epochs.

    Leaves the weights of the best epoch if rows are watched, else of the last one. Returns the
    epochs trained, and whether patience ended them.
    """
    best, best_weights, n_stale, epoch = np.inf, trainer.weights.copy(), 0, 0
    while n_stale <= PATIENCE and epoch < max_iter:
        epoch += 1
        loss = trainer.epoch()
        if watched is not None:
            loss = trainer.loss(*watched)
        if not (np.isfinite(loss) and np.isfinite(trainer.weights).all()):
            raise NumericsError(
                f"the network diverged in epoch {epoch}: its loss is {loss}",
                "probes.recipes",
                "look for extreme values in the features, or use estimator: linear",
            )
        n_stale = n_stale + 1 if loss > best - TOLERANCE else 0
        if loss < best:
            best = loss
            best_weights[:] = trainer.weights
    if watched is not None:
        trainer.weights[:] = best_weights
    return epoch, n_stale > PATIENCE
