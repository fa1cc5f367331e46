"""Skill of many configurations under many weightings of their problems, as matrix products.

    skill[b, c] = sum_p w[b, p] excess[c, p] / sum_p w[b, p] room[c, p]

A weighting is a bootstrap draw, half of the problems, or a fold's own. What is made of the skills
belongs in `stability` and `choices`.

Invariant: a problem where a configuration is undefined enters neither of its sums; a skill without
room is NaN and never wins.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray
from scipy import stats

Doubles = NDArray[np.float64]


class SkillMatrix(NamedTuple):
    """Excess and room of configurations on problems; 0 where undefined.

    Attributes:
        ids: configurations, ascending.
        problems: problem ids, ascending.
        excess: float64 [configuration, problem], value minus chance.
        room: float64 [configuration, problem], ceiling minus chance.
    """

    ids: tuple[str, ...]
    problems: tuple[int, ...]
    excess: Doubles
    room: Doubles

    def skill(self, weights: Doubles | None = None) -> Doubles:
        """Return skills, [draw, configuration], under `weights` [draw, problem] or equal ones."""
        if weights is None:
            weights = np.ones((1, len(self.problems)))
        excess, room = weights @ self.excess.T, weights @ self.room.T
        undefined = np.full_like(excess, np.nan)
        return np.asarray(np.divide(excess, room, out=undefined, where=room > 0))


def skill_matrix(values: pl.DataFrame) -> SkillMatrix:
    """Lay excess and room out as matrices.

    Args:
        values: config_id, problem_id, excess, room; a pair at most once.
    """
    ids, problems = (values[name].unique().sort() for name in ("config_id", "problem_id"))
    defined = values.drop_nulls(["excess", "room"])
    row, column = (
        known.search_sorted(defined[name]).to_numpy()
        for known, name in ((ids, "config_id"), (problems, "problem_id"))
    )
    shape = (len(ids), len(problems))
    excess, room = np.zeros(shape), np.zeros(shape)
    excess[row, column] = defined["excess"].to_numpy()
    room[row, column] = defined["room"].to_numpy()
    return SkillMatrix(tuple(ids), tuple(problems), excess, room)


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
