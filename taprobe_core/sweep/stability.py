"""How far a ranking of configurations depends on what it should not depend on.

Seeds, problems and settings are exchanged, and rankings of the same configurations compared. The
statistics are of the test side, and of the kind that validation preferred. Skills under many
weightings of the problems (resamples, halves) are had as matrix products, with v and r the value
and the reach of a configuration above chance (1 less chance):

    skill[b, i] = sum_p w[b, p] v[i, p] / sum_p w[b, p] r[i, p]

Invariant: every comparison is between rankings of the same configurations by skill; a problem where
a configuration is undefined enters neither sum, a skill that is not defined never wins, and a pair
without any in common is left out and not counted. No seed is a replicate of the data.

Source: bootstrap over problems, Efron and Tibshirani (1993); the rest is counting.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

from taprobe_core.metrics import spearman
from taprobe_core.store.fingerprint import canonical_json
from taprobe_core.sweep.boards import FIT, PLACE, measured
from taprobe_core.tables.contract import check_table, schema_of
from taprobe_core.tables.results import PROTOCOLS
from taprobe_core.tables.sweep import SWEEP_STABILITY

Doubles = NDArray[np.float64]


class SkillMatrix(NamedTuple):
    """Values and reach above chance, [configuration, problem]; 0 where undefined."""

    ids: tuple[str, ...]
    value: Doubles
    reach: Doubles

    def skill(self, weights: Doubles | None = None) -> Doubles:
        """Return skills, [draw, configuration], under `weights` [draw, problem] or equal ones."""
        if weights is None:
            weights = np.ones((1, self.value.shape[1]))
        value, reach = weights @ self.value.T, weights @ self.reach.T
        return np.asarray(np.divide(value, reach, out=np.full_like(value, np.nan), where=reach > 0))


def skill_matrix(values: pl.DataFrame) -> SkillMatrix:
    """Lay values out by config_id and problem_id, ascending; what shares both is averaged.

    Args:
        values: config_id, problem_id, primary and chance, both null where undefined.
    """
    ids, problems = (values[name].unique().sort() for name in ("config_id", "problem_id"))
    mean = (
        values.drop_nulls("primary")
        .group_by("config_id", "problem_id", maintain_order=True)
        .agg(pl.col("primary", "chance").mean())
    )
    at = tuple(known.search_sorted(mean[known.name]).to_numpy() for known in (ids, problems))
    value, reach = np.zeros((2, len(ids), len(problems)))
    value[at] = (mean["primary"] - mean["chance"]).to_numpy()
    reach[at] = (1 - mean["chance"]).to_numpy()
    return SkillMatrix(tuple(ids), value, reach)


def rank_correlation(left: Doubles, right: Doubles) -> float:
    """Spearman's correlation where both are defined, [configuration]; NaN below three of these."""
    both = np.isfinite(left) & np.isfinite(right)
    return spearman(left[both], right[both]) if both.sum() >= 3 else float("nan")


def winner(skills: Doubles) -> NDArray[np.int64]:
    """Return the index of the greatest skill of each draw, [draw]; ties to the first, -1 for none.

    Args:
        skills: [draw, configuration], NaN where undefined.
    """
    best = np.where(np.isnan(skills), -np.inf, skills).argmax(axis=1)
    return np.where(np.isnan(skills).all(axis=1), -1, best)


_GROUP = ["stage", "target"]


def sweep_stability(
    board: pl.DataFrame,
    recipes: pl.DataFrame,
    units: pl.DataFrame,
    *,
    protocol: str,
    n_draws: int = 200,
    seed: int = 0,
) -> pl.DataFrame:
    """Say how stable the ranking of each stage and target is.

    - seeds: rankings by one seed each, every pair of seeds; probes that do not depend on the seed
      stand in each with the same skill.
    - halves: rankings on two random halves of the problems, `n_draws` times.
    - settings: rankings of the configurations that differ in the setting alone, every pair.
    - validation_test: the ranking on validation beside that on test, once.
    - bootstrap: the ranking on resampled problems beside the observed one, `n_draws` times.

    Args:
        board: `tables.SWEEP_LEADERBOARD`; what has no rank is left out.
        recipes: `tables.SWEEP_RECIPES`.
        units: see `boards.measured`.
        protocol: that of the board.
        n_draws: halves and resamples.
        seed: of both.

    Returns:
        `tables.SWEEP_STABILITY`.
    """
    ranked = board.filter(pl.col("rank").is_not_null())
    values = ranked.select(*_GROUP, "config_id", "factors", *PLACE, "recipe").join(
        measured(units, recipes, protocol), on=FIT, maintain_order="left_right"
    )
    rows = []
    for key, own in values.group_by(_GROUP, maintain_order=True):
        rng = np.random.default_rng(seed)
        for source, found in _sources(own, n_draws, rng).items():
            about = {**dict(zip(_GROUP, key, strict=True)), "protocol": protocol}
            rows.append({**about, "source": source, **found})
    frame = pl.DataFrame(rows, schema_of(SWEEP_STABILITY) | {"protocol": pl.Enum(PROTOCOLS)})
    return check_table(frame, SWEEP_STABILITY, "a sweep's leaderboard and results")


def _sources(
    values: pl.DataFrame, n_draws: int, rng: np.random.Generator
) -> dict[str, dict[str, Any]]:
    on_val, on_test = (values.filter(split=split) for split in ("val", "test"))
    val, test = skill_matrix(on_val), skill_matrix(on_test)
    return {
        "seeds": _of_seeds(on_test, test.ids),
        "halves": _of_halves(test, n_draws, rng),
        "settings": _of_settings(on_test),
        "validation_test": _summary(len(test.ids), [(val.skill()[0], test.skill()[0])]),
        "bootstrap": _of_bootstrap(test, n_draws, rng),
    }


def _of_seeds(values: pl.DataFrame, ids: tuple[str, ...]) -> dict[str, Any]:
    by_seed = []
    # A fit that does not depend on the seed has one, which stands for all.
    is_single = pl.col("seed").n_unique().over("config_id") == 1
    for seed in sorted(values["seed"].unique()):
        matrix = skill_matrix(values.filter((pl.col("seed") == seed) | is_single))
        found = dict(zip(matrix.ids, matrix.skill()[0], strict=True))
        by_seed.append([found.get(each, np.nan) for each in ids])
    skills = np.array(by_seed)
    return _summary(len(ids), combinations(skills, 2), winner(skills), _mean_sd(skills))


def _of_halves(matrix: SkillMatrix, n_draws: int, rng: np.random.Generator) -> dict[str, Any]:
    n = matrix.value.shape[1]
    chosen = rng.permuted(np.tile(np.arange(n), (n_draws, 1)), axis=1) < n // 2
    left, right = (matrix.skill(mask.astype(np.float64)) for mask in (chosen, ~chosen))
    winners = np.concatenate([winner(left), winner(right)])
    return _summary(len(matrix.ids), zip(left, right, strict=True), winners)


def _of_bootstrap(matrix: SkillMatrix, n_draws: int, rng: np.random.Generator) -> dict[str, Any]:
    n = matrix.value.shape[1]
    weights = rng.multinomial(n, np.full(n, 1 / n), size=n_draws).astype(np.float64)
    observed, drawn = matrix.skill()[0], matrix.skill(weights)
    pairs = ((observed, each) for each in drawn)
    return _summary(len(matrix.ids), pairs, winner(drawn), _mean_sd(drawn))


def _of_settings(values: pl.DataFrame) -> dict[str, Any]:
    """Compare settings over the configurations that stand in both."""
    alike = {each: _without_setting(each) for each in values["factors"].unique()}
    named = values.with_columns(pl.col("factors").replace_strict(alike).alias("config_id"))
    by_setting = {}
    for (setting,), own in named.group_by("setting"):
        matrix = skill_matrix(own)
        by_setting[setting] = dict(zip(matrix.ids, matrix.skill()[0], strict=True))
    pairs, shared = [], set()
    for first, second in combinations(sorted(by_setting), 2):
        both = sorted(set(by_setting[first]) & set(by_setting[second]))
        shared |= set(both)
        left, right = (
            np.array([by_setting[name][key] for key in both]) for name in (first, second)
        )
        pairs.append((left, right))
    return _summary(len(shared), pairs)


def _without_setting(factors: str) -> str:
    return canonical_json({**json.loads(factors), "setting": None})


def _mean_sd(skills: Doubles) -> float | None:
    if len(skills) < 2:
        return None
    spread = skills.std(axis=0, ddof=1)
    defined = spread[np.isfinite(spread)]
    return float(defined.mean()) if defined.size else None


def _summary(
    n_configurations: int,
    pairs: Iterable[tuple[Doubles, Doubles]],
    winners: NDArray[np.int64] | None = None,
    mean_sd: float | None = None,
) -> dict[str, Any]:
    """Say what pairs of skills of the same configurations, [configuration] each, have in common."""
    compared = [pair for pair in pairs if np.isfinite(pair).all(axis=0).any()]
    found = [rank_correlation(*pair) for pair in compared]
    defined = [each for each in found if np.isfinite(each)]
    changes = np.array([winner(np.stack(pair)) for pair in compared]).reshape(-1, 2)
    best = set((changes.ravel() if winners is None else winners).tolist()) - {-1}
    return {
        "n_configurations": n_configurations,
        "n_comparisons": len(compared),
        "rank_correlation": float(np.mean(defined)) if defined else None,
        "rank_correlation_low": min(defined, default=None),
        "rank_correlation_high": max(defined, default=None),
        "p_winner_changes": float((changes[:, 0] != changes[:, 1]).mean()) if compared else None,
        "n_winners": len(best) or None,
        "mean_sd": mean_sd,
    }
