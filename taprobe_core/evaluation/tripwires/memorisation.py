"""Can one problem be learned by heart? A network, early stopping off, on the largest problem.

A network that sees every row of one problem must put that problem's anchors first. Where it cannot,
the rows cannot be told apart (constant or repeated features), rows that are equal have different
labels, or the optimisation is broken. An exact companion says which: the PR-AUC that a scorer
reaches that knows, for each group of equal rows, its share of anchors. A problem most of whose rows
repeat each other fails whatever its labels: that its anchors agree is then luck.

What the check cannot see: wrong labels. With as many features as rows, in general position, a
hyperplane divides the rows in every way (Cover 1965), so a network learns shuffled labels as
willingly as true ones, and labels joined to the wrong rows too. What does not belong here: whether
a probe carries over to other problems.

Invariant: there is no early stopping, no validation rows and no way to ask for them; the network
sees every row in every pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from taprobe_core.errors import DataError, NonFiniteError, NotEnoughDataError
from taprobe_core.evaluation.tripwires.rows import row_identity
from taprobe_core.metrics import pr_auc

Memorise = Callable[
    [NDArray[np.float32], NDArray[np.bool_], NDArray[np.int64]], NDArray[np.float64]
]
"""X [row, feature], labels [row], seeds [network] -> scores [row, network] of the rows learned."""

MIN_ROWS = 5


@dataclass(frozen=True)
class Memorisation:
    """Result of `memorises_one_problem`.

    Attributes:
        passes: `value` is at least `threshold`, and at most `max_repeated` of the rows repeat.
        value: training PR-AUC of the best network.
        values: training PR-AUC of each network.
        attainable: PR-AUC of a scorer that knows the share of anchors in each group of equal rows.
        threshold: PR-AUC asked for.
        max_repeated: share of rows allowed to equal another row.
        problem_id: the problem with most sentences among those with both classes.
        n_rows: its sentences.
        n_anchors: its anchors.
        n_distinct: its distinct feature rows.
        n_repeated: its rows that equal another row of it.
        n_mixed_rows: its rows that are equal to another row with the other label.
        n_mixed_rows_all: the same over all problems together.
        n_features: features.
        n_constant: features that are constant in this problem.
    """

    passes: bool
    value: float
    values: tuple[float, ...]
    attainable: float
    threshold: float
    max_repeated: float
    problem_id: int
    n_rows: int
    n_anchors: int
    n_distinct: int
    n_repeated: int
    n_mixed_rows: int
    n_mixed_rows_all: int
    n_features: int
    n_constant: int

    @property
    def text(self) -> str:
        """What was found, and where to look if it is a fault."""
        found = (
            f"Problem {self.problem_id} ({self.n_rows} sentences, {self.n_anchors} anchors, "
            f"{self.n_features} features): the best of {len(self.values)} networks learns it to "
            f"PR-AUC {self.value:.3f}, asked for {self.threshold:g}."
        )
        if self.n_mixed_rows:
            found += (
                f" {self.n_mixed_rows} sentences equal another one with the other label; a scorer "
                f"that knows each group's share of anchors reaches {self.attainable:.3f}."
            )
        return found if self.passes else f"{found} {self._advice()}"

    def _advice(self) -> str:
        if self.n_distinct == 1:
            return (
                "All feature rows are equal. Look for activations that were not filled in, or "
                "one row joined to every sentence."
            )
        is_repeated = self.n_repeated > self.max_repeated * self.n_rows
        if is_repeated or self.attainable < self.threshold:
            contradict = " and labels contradict each other" if self.n_mixed_rows else ""
            return (
                f"{self.n_repeated} of {self.n_rows} rows equal another row{contradict}. Look for "
                "a join that repeats rows, for two label files read as one, or for features that "
                "do not reach the sentence (one value for several)."
            )
        return (
            "The rows differ, but the networks cannot use it. Look for features that are constant "
            f"({self.n_constant} of {self.n_features} are) or extreme; a feature set of a few "
            "columns, such as position, is too small for this check."
        )


def memorises_one_problem(
    memorise: Memorise,
    X: NDArray[np.float32],
    problem_id: NDArray[np.int64],
    is_anchor: NDArray[np.bool_],
    *,
    seed: int = 0,
    n_networks: int = 3,
    threshold: float = 0.9,
    max_repeated: float = 0.5,
) -> Memorisation:
    """Check that a network learns the labels of the largest problem by heart.

    The best of several networks counts: one unlucky start is no fault of the data, while
    contradictions bound them all.

    Args:
        memorise: fits networks to all the rows it is given, every pass over all of them, and
            scores these rows (`network`).
        X: [row, feature].
        problem_id: [row].
        is_anchor: [row].
        seed: of the networks.
        n_networks: networks that differ in their seed.
        threshold: PR-AUC asked for.
        max_repeated: share of the problem's rows that may equal another of its rows.

    Raises:
        NotEnoughDataError: no problem has five sentences and both classes.
        DataError: lengths differ.
        NonFiniteError: a feature or a score is NaN or infinite.

    Source:
        Fitting a tiny subset as a sanity check: Goodfellow, Bengio and Courville (2016), 11.5.
    """
    if not len(X) == len(problem_id) == len(is_anchor):
        raise DataError(
            f"{len(X)} feature rows, {len(problem_id)} problem ids, {len(is_anchor)} labels",
            "rows",
            "give one of each per row",
        )
    identity = row_identity(X)
    chosen = _largest(problem_id, is_anchor)
    rows = np.flatnonzero(problem_id == chosen)
    features, labels, same = np.asarray(X[rows], dtype=np.float32), is_anchor[rows], identity[rows]
    seeds = np.random.default_rng(seed).integers(0, 2**31, size=n_networks)
    score = memorise(features, labels, seeds)
    if not np.isfinite(score).all():
        raise NonFiniteError(
            "a network that learned one problem scores NaN or infinity",
            f"problem {chosen}",
            "look for extreme values in the features",
        )
    values = tuple(pr_auc(labels, column) for column in score.T)
    share = anchor_share(same, labels)
    group, counts = np.unique(same, return_inverse=True, return_counts=True)[1:]
    n_repeated = int((counts[group] > 1).sum())
    return Memorisation(
        passes=max(values) >= threshold and n_repeated <= max_repeated * len(rows),
        value=max(values),
        values=values,
        attainable=pr_auc(labels, share),
        threshold=threshold,
        max_repeated=max_repeated,
        problem_id=chosen,
        n_rows=len(rows),
        n_anchors=int(labels.sum()),
        n_distinct=len(counts),
        n_repeated=n_repeated,
        n_mixed_rows=_n_mixed(share),
        n_mixed_rows_all=_n_mixed(anchor_share(identity, is_anchor)),
        n_features=X.shape[1],
        n_constant=int((features == features[0]).all(axis=0).sum()),
    )


def anchor_share(identity: NDArray[np.int64], is_anchor: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Return, for each row, the share of anchors among the rows that equal it.

    Args:
        identity: [row], from `rows.row_identity`.
        is_anchor: [row].

    Returns:
        [row] float64; strictly between 0 and 1 where equal rows have different labels.
    """
    group = np.unique(identity, return_inverse=True)[1]
    share = np.bincount(group, weights=is_anchor) / np.bincount(group)
    return np.asarray(share[group], dtype=np.float64)


def _n_mixed(share: NDArray[np.float64]) -> int:
    return int(((share > 0) & (share < 1)).sum())


def _largest(problem_id: NDArray[np.int64], is_anchor: NDArray[np.bool_]) -> int:
    problems, group = np.unique(problem_id, return_inverse=True)
    n_rows = np.bincount(group, minlength=len(problems))
    n_anchors = np.bincount(group, weights=is_anchor, minlength=len(problems))
    is_usable = (n_rows >= MIN_ROWS) & (n_anchors > 0) & (n_anchors < n_rows)
    if not is_usable.any():
        raise NotEnoughDataError(
            f"none of {len(problems)} problems has {MIN_ROWS} sentences and both classes",
            "labels",
            "use more problems, or lower labels.percentile",
        )
    return int(problems[np.argmax(np.where(is_usable, n_rows, -1))])
