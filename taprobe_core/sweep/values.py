"""Results of recipes to what a sweep ranks: values, chance, and skill under weighted problems.

    skill = (mean value - mean chance) / (mean ceiling - mean chance)

over the problems where the value is defined. Chance and ceiling move with the base rate and the
metric, so skill may be compared across percentiles where the value may not. Skill of many
configurations under many weightings of their problems (bootstrap draws, halves of the problems, a
fold's own) is had as matrix products, with v and c the value and the ceiling above chance:

    skill[b, i] = sum_p w[b, p] v[i, p] / sum_p w[b, p] c[i, p]

Who is ranked belongs in `boards`, what is made of the skills in `stability` and `shortlist`.

Invariants: a value that is not defined is null from the first step on, and no NaN passes. A problem
where a configuration is undefined enters neither of its sums; a skill whose ceiling is not above
chance is NaN and never wins.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray
from scipy import stats

from taprobe_core.errors import DataError
from taprobe_core.evaluation.summary import chance_pr_auc, normalised_skill

Doubles = NDArray[np.float64]


class SkillMatrix(NamedTuple):
    """Values and ceilings above chance of configurations on problems; 0 where undefined.

    Attributes:
        ids: configurations, ascending.
        problems: problem ids, ascending.
        value_above_chance: float64 [configuration, problem], value minus chance.
        ceiling_above_chance: float64 [configuration, problem], ceiling minus chance.
    """

    ids: tuple[str, ...]
    problems: tuple[int, ...]
    value_above_chance: Doubles
    ceiling_above_chance: Doubles

    def skill(self, weights: Doubles | None = None) -> Doubles:
        """Return skills, [draw, configuration], under `weights` [draw, problem] or equal ones."""
        if weights is None:
            weights = np.ones((1, len(self.problems)))
        value = weights @ self.value_above_chance.T  # [draw, configuration]
        ceiling = weights @ self.ceiling_above_chance.T
        undefined = np.full_like(value, np.nan)
        return np.asarray(np.divide(value, ceiling, out=undefined, where=ceiling > 0))


def skill_matrix(values: pl.DataFrame) -> SkillMatrix:
    """Lay values and ceilings above chance out as matrices.

    Args:
        values: config_id, problem_id, value_above_chance, ceiling_above_chance; a pair at most
            once.
    """
    ids, problems = (values[name].unique().sort() for name in ("config_id", "problem_id"))
    defined = values.drop_nulls(["value_above_chance", "ceiling_above_chance"])
    row, column = (
        known.search_sorted(defined[name]).to_numpy()
        for known, name in ((ids, "config_id"), (problems, "problem_id"))
    )
    shape = (len(ids), len(problems))
    value, ceiling = np.zeros(shape), np.zeros(shape)
    value[row, column] = defined["value_above_chance"].to_numpy()
    ceiling[row, column] = defined["ceiling_above_chance"].to_numpy()
    return SkillMatrix(tuple(ids), tuple(problems), value, ceiling)


def rank_correlation(left: Doubles, right: Doubles) -> float:
    """Spearman's correlation over the configurations that both define, [configuration].

    Returns:
        NaN below three of them, or where one side is constant.
    """
    both = np.isfinite(left) & np.isfinite(right)
    if both.sum() < 3:
        return float("nan")
    ranks = stats.rankdata(left[both]), stats.rankdata(right[both])
    if min(np.ptp(rank) for rank in ranks) == 0:
        return float("nan")
    return float(np.corrcoef(*ranks)[0, 1].clip(-1, 1))


def winner(skills: Doubles) -> NDArray[np.int64]:
    """Return the index of the greatest skill of each draw, [draw]; ties to the first, -1 for none.

    Args:
        skills: [draw, configuration], NaN where undefined.
    """
    best = np.where(np.isnan(skills), -np.inf, skills).argmax(axis=1)
    return np.where(np.isnan(skills).all(axis=1), -1, best)


PLACE = ("model", "layer", "setting")
FIT = (*PLACE, "recipe", "metric")
"""Key of a recipe at a site and setting; `metric` follows from it."""

_ZERO_CHANCE = ("spearman", "pearson")
_RANDOM = "pr_auc"


def problem_values(results: pl.DataFrame, protocol: str) -> pl.DataFrame:
    """Average results over the folds that share a problem, one row per seed.

    Args:
        results: `tables.SWEEP_RESULTS`; a fit that two stages ask for may stand there twice.
        protocol: whose folds to take.

    Returns:
        `FIT`, split, seed, problem_id, value, value_above_chance,
        ceiling_above_chance, the last three null where one of them is not defined; sorted.

    Raises:
        DataError: a recipe has two metrics, or one whose chance level is not known.
    """
    key = [*FIT, "split", "seed", "problem_id"]
    mine = results.filter(pl.col("protocol") == protocol).unique([*key, "fold"], keep="first")
    _check_metrics(mine)
    values = (
        mine.with_columns(pl.col("value", "ceiling").fill_nan(None))
        .sort(*key, "fold")
        .group_by(key, maintain_order=True)
        .agg(pl.col("value", "ceiling").mean(), pl.col("n_sentences", "n_positives").first())
        .with_columns(pl.col("ceiling").fill_null(1.0))
        .join(_levels(mine), on=["metric", "n_sentences", "n_positives"], maintain_order="left")
    )
    above = pl.col("value") - pl.col("chance")
    ceiling = pl.when(above.is_not_null()).then(pl.col("ceiling") - pl.col("chance"))
    value = pl.when(above.is_not_null()).then(pl.col("value"))
    return values.select(*key, value, value_above_chance=above, ceiling_above_chance=ceiling)


def recipe_values(values: pl.DataFrame) -> pl.DataFrame:
    """Summarise each recipe on validation and on test, seeds averaged inside a problem.

    Args:
        values: from `problem_values`.

    Returns:
        One row per recipe at a place: `FIT`, then val_value, val_skill, test_value, test_skill,
        test_chance, test_seed_sd (standard deviation over seeds of the test mean, null for one),
        n_problems, n_undefined (of test problems), n_seeds, is_whole (both sides have results).
        Null on a side without results.
    """
    by_problem = over_seeds(values)
    sides = []
    for split in ("val", "test"):
        side = (
            by_problem.filter(pl.col("split") == split)
            .group_by(FIT, maintain_order=True)
            .agg(
                pl.col("value").mean(),
                normalised_skill(
                    pl.col("value_above_chance").mean(),
                    pl.lit(0.0),
                    pl.col("ceiling_above_chance").mean(),
                ).alias("skill"),
                (pl.col("value") - pl.col("value_above_chance")).mean().alias("chance"),
                pl.len().cast(pl.Int64).alias("n_problems"),
                pl.col("value").null_count().cast(pl.Int64).alias("n_undefined"),
                pl.col("n_seeds").max(),
            )
        )
        sides.append(side.rename({name: f"{split}_{name}" for name in side.columns[len(FIT) :]}))
    joined = sides[0].join(sides[1], on=FIT, how="full", coalesce=True).sort(FIT)
    return joined.join(_seed_sd(values), on=FIT, how="left", maintain_order="left").select(
        *FIT,
        *("val_value", "val_skill", "test_value", "test_skill", "test_chance", "test_seed_sd"),
        *(pl.col(f"test_{name}").alias(name) for name in ("n_problems", "n_undefined", "n_seeds")),
        pl.all_horizontal(pl.col("val_n_problems", "test_n_problems").is_not_null()).alias(
            "is_whole"
        ),
    )


def over_seeds(values: pl.DataFrame) -> pl.DataFrame:
    """Average `problem_values` over seeds.

    Returns:
        `FIT`, split, problem_id, value, value_above_chance, ceiling_above_chance, n_seeds.
    """
    return values.group_by(*FIT, "split", "problem_id", maintain_order=True).agg(
        pl.col("value", "value_above_chance", "ceiling_above_chance").mean(),
        pl.col("seed").n_unique().cast(pl.Int64).alias("n_seeds"),
    )


def _seed_sd(values: pl.DataFrame) -> pl.DataFrame:
    return (
        values.filter(pl.col("split") == "test")
        .group_by(*FIT, "seed", maintain_order=True)
        .agg(pl.col("value").mean())
        .group_by(FIT, maintain_order=True)
        .agg(pl.col("value").std(ddof=1).alias("test_seed_sd"))
    )


def _levels(results: pl.DataFrame) -> pl.DataFrame:
    """Chance of every metric and size of problem that there is; null where it is not defined."""
    sizes = results.select("metric", "n_sentences", "n_positives").unique().sort(pl.all())
    chance = [_chance(metric, n, k) for metric, n, k in sizes.iter_rows()]
    return sizes.with_columns(pl.Series("chance", chance, pl.Float64))


def _chance(metric: str, n_sentences: int, n_positives: int) -> float | None:
    if metric in _ZERO_CHANCE:
        return 0.0
    return chance_pr_auc(n_sentences, n_positives) if 0 < n_positives < n_sentences else None


def _check_metrics(results: pl.DataFrame) -> None:
    known = (_RANDOM, *_ZERO_CHANCE)
    unknown = sorted(set(results["metric"].unique()) - set(known))
    if unknown:
        raise DataError(
            f"no chance level of the metrics {unknown}",
            "sweep results",
            f"give one of {', '.join(known)} as the metric of each recipe",
        )
    twice = (
        results.group_by(*PLACE, "recipe")
        .agg(pl.col("metric").n_unique().alias("n"))
        .filter(pl.col("n") > 1)
        .sort(*PLACE, "recipe")
    )
    if twice.height:
        raise DataError(
            f"recipe {twice['recipe'][0]} has {twice['n'][0]} metrics",
            "sweep results",
            "give the rows of its primary metric alone",
        )
