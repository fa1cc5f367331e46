"""From labels to what a recipe is fitted to and judged by, one value per labelled sentence.

What is known of a target beside its values (settings, what it reads, how its scores are read)
stands in its entry in `study.targets`; here each has its `MAKERS`, under the same name.

    anchor_binary      among the most important of its problem, at the recipe's percentile
    importance_abs     |importance|
    importance_signed  importance
    exceeds_threshold  P(|true importance| > d | data), by adaptive shrinkage (`effects`)
    windowed_change    success rate w sentences on, less that of the sentence

What is learned about targets inside a fold (what position predicts of them) belongs in
`residuals`. Invariants: a row without a value has y 0, weight 0 and `is_defined` false; a problem's
values depend on its own labels, but for `exceeds_threshold` and `inverse_variance`.

Those two read a prior of effects fitted to all measured rows of the model and setting, tested
problems among them. That is part of what the label means, not of what a probe learns: all folds
must be judged by the same values, and the prior passes nothing on but the spread of importance in
the setting, as the percentile of an anchor does in a problem. Leaving one of six published problems
out of it keeps the order of the others' values (Spearman over .999) and moves them by .001 to .008
on average, .21 at most. `prior_rows` restricts it.

A standard error is unknown where the importance was not measured: no dissimilar rollout, no
successor, counts that fit nothing. Such a row has no `exceeds_threshold` (zero there means
unmeasured, not unimportant) and weight 0 under `inverse_variance`. Where one of the two samples
that are compared is unanimous, its plug-in variance is 0, which is no certainty; there the variance
of the Beta(k + 1, n - k + 1) posterior stands for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

from taprobe_core.errors import ConfigError, LabelError
from taprobe_core.labels.effects import EffectPrior, fit_effects, posterior
from taprobe_core.labels.make import anchors_by_problem
from taprobe_core.study.config import Labels
from taprobe_core.study.probes import ProbeRecipe
from taprobe_core.study.targets import TARGETS

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]

_OWN_SAMPLE = {
    "counterfactual_importance_accuracy": ("n_dissimilar", "n_dissimilar_correct"),
    "resampling_importance_accuracy": ("n_rollouts", "n_correct"),
}
"""Measure -> rollouts and successes of the sentence's own side of the difference."""


MEASURED = (
    "problem_id",
    "sentence_idx",
    "importance_signed",
    "importance_abs",
    "n_rollouts",
    "n_correct",
    "n_dissimilar",
    "n_dissimilar_correct",
    "importance_se",
)
"""Columns of `tables.LABELS` that every target may read; others stand in its entry's `reads`."""


@dataclass(frozen=True, eq=False)
class TargetValues:
    """One target of every labelled sentence; all members share the row order of the labels.

    Attributes:
        y: [sentence] float64, what is fitted.
        value: [sentence] float64, what ranks of scores are judged against.
        is_positive: [sentence] bool, the anchors that scores should find; None for signed targets.
        weight: [sentence] float64, at least 0, of mean 1 over the defined rows.
        is_defined: [sentence] bool.
    """

    y: FloatArray
    value: FloatArray
    is_positive: BoolArray | None
    weight: FloatArray
    is_defined: BoolArray


@dataclass(frozen=True, eq=False)
class Measurement:
    """What a target's values are made of, for one recipe.

    Attributes:
        rows: the columns of `MEASURED` and the target's `reads` of `tables.LABELS`.
        recipe: with its target filled in.
        labels: the study's, for the measure, the tie rule and the percentile.
        effect: [sentence] float64, the difference of success rates that the target is about.
        se: [sentence] float64, its standard error; NaN where it was not measured.
        prior_rows: [sentence] bool, rows that the prior of effects is fitted to; None for all.
    """

    rows: pl.DataFrame
    recipe: ProbeRecipe
    labels: Labels
    effect: FloatArray
    se: FloatArray
    prior_rows: BoolArray | None

    def prior(self) -> tuple[EffectPrior, BoolArray]:
        """Return the prior of effects, and which rows are measured, [sentence] bool.

        Raises:
            LabelError: no row is measured.
        """
        known = np.isfinite(self.effect) & np.isfinite(self.se)
        fitted = known if self.prior_rows is None else known & self.prior_rows
        if not fitted.any():
            raise _uncounted(self.recipe)
        return fit_effects(self.effect[fitted], self.se[fitted]), known


def _importance(
    rows: pl.DataFrame, recipe: ProbeRecipe, labels: Labels
) -> tuple[FloatArray, FloatArray]:
    return _floats(rows, "importance_signed"), importance_errors(rows, labels.field)


def _change(
    rows: pl.DataFrame, recipe: ProbeRecipe, labels: Labels
) -> tuple[FloatArray, FloatArray]:
    return windowed_change(rows, int(setting_of(recipe, "window")))


def _exceeds(measured: Measurement) -> FloatArray:
    prior, known = measured.prior()
    value = np.full(len(known), np.nan)
    shrunk = posterior(prior, measured.effect[known], measured.se[known])
    value[known] = shrunk.exceeds(setting_of(measured.recipe, "threshold"))
    return value


def _absolute(measured: Measurement) -> FloatArray:
    return _floats(measured.rows, "importance_abs")


def _effect(measured: Measurement) -> FloatArray:
    return measured.effect


def _anchors(measured: Measurement) -> BoolArray:
    percentile = measured.recipe.percentile or measured.labels.percentile
    ids = measured.rows["problem_id"].to_numpy()
    return anchors_by_problem(ids, _absolute(measured), percentile, measured.labels.tie_rule)


@dataclass(frozen=True)
class TargetMaker:
    """How labels become the values of one target.

    Attributes:
        value: the values, [sentence] float64, NaN where the target is not defined.
        measure: rows, recipe and the study's labels to the difference of success rates that the
            target is about and its standard error, [sentence] float64 each.
        positive: the sentences that its scores should find, [sentence] bool, and the class that it
            is fitted to where its entry says `is_binary`; not asked of signed targets.
    """

    value: Callable[[Measurement], FloatArray]
    measure: Callable[[pl.DataFrame, ProbeRecipe, Labels], tuple[FloatArray, FloatArray]] = (
        _importance
    )
    positive: Callable[[Measurement], BoolArray] = _anchors


MAKERS: dict[str, TargetMaker] = {
    "anchor_binary": TargetMaker(_absolute),
    "importance_abs": TargetMaker(_absolute),
    "importance_signed": TargetMaker(_effect),
    "exceeds_threshold": TargetMaker(_exceeds),
    "windowed_change": TargetMaker(_effect, _change),
}
"""Name of a target (`study.TARGETS`) -> how it is made."""


def target_values(
    rows: pl.DataFrame,
    recipe: ProbeRecipe,
    labels: Labels,
    prior_rows: BoolArray | None = None,
) -> TargetValues:
    """Return what `recipe` is fitted to and judged by.

    `anchor_binary` is judged against the absolute importance, every other target against itself.
    `is_positive` has the anchors of the recipe's percentile, or of the study's where the target has
    none.

    Args:
        rows: `tables.LABELS`, sorted by problem_id and sentence_idx.
        recipe: with its target filled in (`ProbeRecipe.resolved`).
        labels: the study's, for the measure, the tie rule and the percentile.
        prior_rows: [sentence] bool, rows that the prior of effects is fitted to; None for all.
            Read by `exceeds_threshold` and `inverse_variance` alone.

    Raises:
        LabelError: the target or its weights need counts, and no row has them.
        ConfigError: the target or its own setting is not filled in.
    """
    if recipe.target is None:
        raise _unresolved(recipe, "a recipe without a target")
    entry, maker = TARGETS[recipe.target], MAKERS[recipe.target]
    read = rows.select(*MEASURED, *entry.reads)
    effect, se = maker.measure(read, recipe, labels)
    measured = Measurement(read, recipe, labels, effect, se, prior_rows)
    value = maker.value(measured)
    is_defined = np.isfinite(value)
    if not is_defined.any():
        raise _uncounted(recipe)
    value = np.where(is_defined, value, 0.0)
    is_positive = maker.positive(measured) if entry.ranks_anchors else None
    weight = is_defined.astype(np.float64)
    if recipe.weights == "inverse_variance":
        prior, known = measured.prior()
        weight[~known] = 0.0
        weight[known] /= se[known] ** 2 + prior.variance
        weight *= is_defined.sum() / weight.sum()
    y = value
    if entry.is_binary and is_positive is not None:
        y = is_positive.astype(np.float64)
    return TargetValues(y, value, is_positive, weight, is_defined)


def windowed_change(rows: pl.DataFrame, window: int) -> tuple[FloatArray, FloatArray]:
    """Return how the success rate changes over the next sentences, and how sure that is.

        change_i = n_correct_{i+w} / n_rollouts_{i+w} - n_correct_i / n_rollouts_i

    Over one sentence that is the resampling importance; over more it is measured with the same
    error and holds more of what happens, so it is the more reliable target.

    Args:
        rows: `tables.LABELS`.
        window: w, in sentences, at least 1.

    Returns:
        Change in [-1, 1] and its standard error, float64 [sentence]; both NaN in the last w
        sentences of a problem and where a count is unknown or zero.
    """
    key = ("problem_id", "sentence_idx")
    later = rows.select(
        *key, pl.col("n_correct").alias("_k"), pl.col("n_rollouts").alias("_n")
    ).with_columns(pl.col("sentence_idx") - window)
    joined = rows.join(later, on=key, how="left", maintain_order="left")
    sides = [
        (_floats(joined, hits), _floats(joined, n))
        for hits, n in (("n_correct", "n_rollouts"), ("_k", "_n"))
    ]
    (rate, variance), (later_rate, later_variance) = (_rate(hits, n) for hits, n in sides)
    return later_rate - rate, np.sqrt(variance + later_variance)


def importance_errors(rows: pl.DataFrame, field: str) -> FloatArray:
    """Return the standard error of each importance, unanimous samples counted as uncertain.

    `importance_se` adds the variance of the sentence's own sample and that of its successor's. One
    that is 0, every rollout of its sample having ended alike, is replaced by the variance of the
    Beta(k + 1, n - k + 1) posterior; for the successor n is the sentence's own number of rollouts.

    Args:
        rows: `tables.LABELS`.
        field: the measure that the importance is (`Labels.field`).

    Returns:
        float64 [sentence], positive; NaN where `importance_se` is null.
    """
    se = _floats(rows, "importance_se")
    if field not in _OWN_SAMPLE:
        return np.full(len(se), np.nan)
    n_column, hits_column = _OWN_SAMPLE[field]
    n, hits = _floats(rows, n_column), _floats(rows, hits_column)
    n_rollouts, n_correct = _floats(rows, "n_rollouts"), _floats(rows, "n_correct")
    known = np.isfinite(se)
    plug_in = _plug_in(hits, n)
    # One dissimilar rollout borrows the rate of all (noise.importance_se).
    is_single = known & (n == 1)
    plug_in[is_single] = (_plug_in(n_correct, n_rollouts) * n_rollouts)[is_single]
    following = se**2 - plug_in
    own = np.where(plug_in > 0, plug_in, _beta(hits, n))
    # Rounding leaves no more than this of a variance of 0; others are at least 1 / n^2.
    other = np.where(following > _ROUNDING, following, _beta(np.zeros_like(n), n_rollouts))
    return np.where(known, np.sqrt(own + other), np.nan)


_ROUNDING = 1e-12


def setting_of(recipe: ProbeRecipe, name: str) -> float:
    """Return a setting of the recipe's target.

    Raises:
        ConfigError: it is not filled in.
    """
    value = getattr(recipe, name)
    if value is None:
        raise _unresolved(recipe, f"target {recipe.target} without {name}")
    return float(value)


def _unresolved(recipe: ProbeRecipe, what: str) -> ConfigError:
    fix = "resolve the recipe first (ProbeRecipe.resolved)"
    return ConfigError(what, f"recipe {recipe.name!r}", fix)


def _uncounted(recipe: ProbeRecipe) -> LabelError:
    weighed = " with weights: inverse_variance" if recipe.weights != "none" else ""
    return LabelError(
        f"target {recipe.target}{weighed} needs counts of rollouts, and no row has them",
        f"labels, for recipe {recipe.name!r}",
        "choose another target and weights: none, or a labels.field whose rollouts are counted",
    )


def _floats(rows: pl.DataFrame, name: str) -> FloatArray:
    """Nulls become NaN."""
    return rows[name].cast(pl.Float64).fill_null(np.nan).to_numpy().copy()


def _rate(hits: FloatArray, n: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Share of hits and its variance; NaN without any draw."""
    size = np.where(n > 0, n, np.nan)
    plug_in = _plug_in(hits, n)
    return hits / size, np.where(plug_in > 0, plug_in, _beta(hits, size))


def _plug_in(hits: FloatArray, n: FloatArray) -> FloatArray:
    """Estimate p (1 - p) / n without bias; 0 for a unanimous or a single draw, NaN for none."""
    size = np.where(n > 0, n, np.nan)
    return np.asarray(hits * (size - hits) / (size**2 * np.maximum(size - 1, 1)))


def _beta(hits: FloatArray, n: FloatArray) -> FloatArray:
    """Variance of the posterior of a share under a uniform prior."""
    return np.asarray((hits + 1) * (n - hits + 1) / ((n + 2) ** 2 * (n + 3)))
