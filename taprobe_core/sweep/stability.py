"""How far a ranking of configurations depends on what it should not depend on.

Seeds, problems and settings are exchanged, and rankings of the same configurations compared. What a
configuration is worth belongs in `values`; the statistics are of the test side, and of the kind
that validation preferred.

Invariant: every comparison is between rankings of the same configurations by skill; a pair that is
not defined is left out and not counted. No seed is a replicate of the data.

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

from taprobe_core.store.fingerprint import canonical_json
from taprobe_core.sweep.values import (
    PLACE,
    Doubles,
    SkillMatrix,
    problem_values,
    rank_correlation,
    skill_matrix,
    winner,
)
from taprobe_core.tables.contract import check_table, schema_of
from taprobe_core.tables.results import PROTOCOLS
from taprobe_core.tables.sweep import SWEEP_STABILITY

_GROUP = ["stage", "target"]


def sweep_stability(
    board: pl.DataFrame, results: pl.DataFrame, *, protocol: str, n_draws: int = 200, seed: int = 0
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
        results: `tables.SWEEP_RESULTS`.
        protocol: that of the board.
        n_draws: halves and resamples.
        seed: of both.

    Returns:
        `tables.SWEEP_STABILITY`; `p_winner_changes` is the share of comparisons whose two best
        configurations differ, `n_winners` counts the distinct best ones, and `mean_sd` is the mean
        over configurations of the standard deviation of skill over seeds or resamples.
    """
    ranked = board.filter(pl.col("rank").is_not_null())
    values = ranked.select(*_GROUP, "config_id", "factors", *PLACE, "recipe").join(
        problem_values(results, protocol), on=[*PLACE, "recipe"], maintain_order="left_right"
    )
    rows = []
    for key, own in values.group_by(_GROUP, maintain_order=True):
        rng = np.random.default_rng(seed)
        for source, found in _sources(own, n_draws, rng).items():
            about = {**dict(zip(_GROUP, key, strict=True)), "protocol": protocol}
            rows.append({**about, "source": source, **found})
    frame = pl.DataFrame(rows, schema_of(SWEEP_STABILITY) | {"protocol": pl.Enum(PROTOCOLS)})
    return check_table(frame, SWEEP_STABILITY, "a sweep's leaderboard and results")


class _Pair(NamedTuple):
    """Two skill vectors of the same configurations."""

    left: Doubles
    right: Doubles


def _sources(
    values: pl.DataFrame, n_draws: int, rng: np.random.Generator
) -> dict[str, dict[str, Any]]:
    matrices = {
        split: skill_matrix(_mean(values.filter(pl.col("split") == split)))
        for split in ("val", "test")
    }
    test = matrices["test"]
    return {
        "seeds": _of_seeds(values.filter(pl.col("split") == "test")),
        "halves": _of_halves(test, n_draws, rng),
        "settings": _of_settings(values.filter(pl.col("split") == "test")),
        "validation_test": _summary(
            len(test.ids), [_Pair(matrices["val"].skill()[0], test.skill()[0])]
        ),
        "bootstrap": _of_bootstrap(test, n_draws, rng),
    }


def _mean(values: pl.DataFrame) -> pl.DataFrame:
    return values.group_by("config_id", "problem_id", maintain_order=True).agg(
        pl.col("value_above_chance", "ceiling_above_chance").mean()
    )


def _of_seeds(values: pl.DataFrame) -> dict[str, Any]:
    known = sorted(values["seed"].unique())
    whole = values.select("config_id", "problem_id").unique(maintain_order=True)
    by_seed = []
    for seed in known:
        own = values.filter(pl.col("seed") == seed)
        # A fit that does not depend on the seed has one, which stands for all.
        single = values.filter(pl.col("seed").n_unique().over("config_id") == 1)
        both = pl.concat([own, single]).unique(["config_id", "problem_id"], keep="first")
        laid = whole.join(both, on=["config_id", "problem_id"], how="left", maintain_order="left")
        by_seed.append(skill_matrix(laid).skill()[0])
    skills = np.stack(by_seed)
    pairs = [_Pair(skills[i], skills[j]) for i, j in combinations(range(len(known)), 2)]
    return _summary(skills.shape[1], pairs, winner(skills), _mean_sd(skills))


def _of_halves(matrix: SkillMatrix, n_draws: int, rng: np.random.Generator) -> dict[str, Any]:
    n = len(matrix.problems)
    chosen = rng.permuted(np.tile(np.arange(n), (n_draws, 1)), axis=1) < n // 2
    left, right = (matrix.skill(mask.astype(np.float64)) for mask in (chosen, ~chosen))
    winners = np.concatenate([winner(left), winner(right)])
    return _summary(
        len(matrix.ids), [_Pair(*pair) for pair in zip(left, right, strict=True)], winners
    )


def _of_bootstrap(matrix: SkillMatrix, n_draws: int, rng: np.random.Generator) -> dict[str, Any]:
    n = len(matrix.problems)
    weights = rng.multinomial(n, np.full(n, 1 / n), size=n_draws).astype(np.float64)
    observed, drawn = matrix.skill()[0], matrix.skill(weights)
    pairs = [_Pair(observed, each) for each in drawn]
    return _summary(len(matrix.ids), pairs, winner(drawn), _mean_sd(drawn))


def _of_settings(values: pl.DataFrame) -> dict[str, Any]:
    """Compare settings over the configurations that stand in both."""
    rest = values.select("config_id", "factors").unique(maintain_order=True)
    alike = [_without_setting(factors) for factors in rest["factors"]]
    named = values.join(
        rest.select("config_id", pl.Series("alike", alike, pl.String)), on="config_id"
    )
    by_setting = {}
    for (setting,), own in named.group_by("setting", maintain_order=True):
        matrix = skill_matrix(
            own.group_by(pl.col("alike").alias("config_id"), "problem_id", maintain_order=True).agg(
                pl.col("value_above_chance", "ceiling_above_chance").mean()
            )
        )
        by_setting[setting] = dict(zip(matrix.ids, matrix.skill()[0], strict=True))
    pairs, shared = [], set()
    for first, second in combinations(sorted(by_setting), 2):
        both = sorted(set(by_setting[first]) & set(by_setting[second]))
        shared |= set(both)
        sides = ([by_setting[name][key] for key in both] for name in (first, second))
        pairs.append(_Pair(*(np.array(side, dtype=np.float64) for side in sides)))
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
    pairs: Iterable[_Pair],
    winners: NDArray[np.int64] | None = None,
    mean_sd: float | None = None,
) -> dict[str, Any]:
    compared = [pair for pair in pairs if _is_comparable(pair)]
    found = [rank_correlation(*pair) for pair in compared]
    defined = [each for each in found if np.isfinite(each)]
    changes = [winner(np.stack(pair)) for pair in compared]
    return {
        "n_configurations": n_configurations,
        "n_comparisons": len(compared),
        "rank_correlation": float(np.mean(defined)) if defined else None,
        "rank_correlation_low": min(defined, default=None),
        "rank_correlation_high": max(defined, default=None),
        "p_winner_changes": float(np.mean([a != b for a, b in changes])) if changes else None,
        "n_winners": _n_distinct(winners if winners is not None else np.array(changes).ravel()),
        "mean_sd": mean_sd,
    }


def _is_comparable(pair: _Pair) -> bool:
    return bool((np.isfinite(pair.left) & np.isfinite(pair.right)).any())


def _n_distinct(winners: NDArray[np.int64]) -> int | None:
    return len(set(winners.tolist()) - {-1}) or None
