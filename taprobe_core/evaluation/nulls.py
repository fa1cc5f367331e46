"""What each recipe would reach if its labels fell elsewhere: distributions under relabelling.

Two nulls, drawn inside each problem:

- circular shift: labels turn along the trace by a random number of sentences. Keeps how many
  anchors there are and how they cluster; breaks the tie to the text.
- position stratified: labels are permuted among the sentences of the same fifth of the trace.
  Keeps how importance depends on position too, so it asks for more than position.

The statistic is what a recipe is ranked by: the mean over problems of its primary metric, seeds
averaged inside each. Draw b uses the same shift and permutation for every recipe, seed, layer and
protocol of one model and setting, so that `intervals.max_t` can take the best of all, draw by draw.
What does not belong here: corrections for many tests (`intervals`).

Invariant: a metric is defined in every draw or in none, as both nulls keep scores and label values.
A shift has only as many outcomes as the problem has sentences; all of them are computed once.

Source: restricted permutation, Good (2005), chapter 3; p = (1 + #{null >= observed}) / (1 + B),
Phipson and Smyth (2010), which counts the observed arrangement as one of the draws.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

from taprobe_core.evaluation.blocks import Block, ScoreBlocks, distinct_rows
from taprobe_core.metrics import centred_rank_rows, pr_auc_at, primary_metric, tie_end_rows
from taprobe_core.probes.control_task import position_bin
from taprobe_core.study.config import Target
from taprobe_core.tables import NULL_KINDS, NULLS, schema_of

Doubles = NDArray[np.float64]

_CHUNK = 2_000_000
"""Values held at a time while sorting the places of anchors."""


class _Relabelling(NamedTuple):
    """Whose label each sentence takes, [arrangement, sentence], and each draw's arrangement."""

    source: NDArray[np.int64]
    draw: NDArray[np.int64]


def null_distributions(
    scored: ScoreBlocks, targets: Mapping[str, Target], n_null: int, seed: int
) -> pl.DataFrame:
    """Draw both nulls for every recipe and protocol, on test.

    Args:
        scored: from `make_blocks`.
        targets: recipe -> what its scores predict.
        n_null: draws of each null; 0 gives an empty table.
        seed: of the draws.

    Returns:
        `tables.NULLS`.
    """
    if n_null == 0:
        return schema_of(NULLS).to_frame()
    key = ["recipe", "protocol"]
    cells = scored.units.filter(pl.col("split") == "test").select(key).unique().sort(key)
    cell_of = (
        scored.units.join(cells.with_row_index("cell"), on=key, how="left", maintain_order="left")[
            "cell"
        ]
        .cast(pl.Int64)
        .fill_null(-1)
        .to_numpy()
    )
    by_precision = [primary_metric(targets[name]) == "pr_auc" for name in cells["recipe"]]
    sums = np.zeros((len(NULL_KINDS), cells.height, 1 + n_null))
    n_problems = np.zeros(cells.height, dtype=np.int64)
    for blocks in _by_problem(scored):
        _add_problem(blocks, cell_of, np.array(by_precision), sums, n_problems, seed)
    rows: list[dict[str, Any]] = []
    for place, cell in enumerate(cells.iter_rows(named=True)):
        metric = primary_metric(targets[cell["recipe"]])
        for kind, name in enumerate(NULL_KINDS):
            means = sums[kind, place] / max(n_problems[place], 1)
            summary = _summary(means[0], means[1:]) if n_problems[place] else _NOTHING
            counts = {"n_problems": int(n_problems[place]), "n_draws": n_null}
            rows.append({**cell, "metric": metric, "null": name, **counts, **summary})
    return pl.DataFrame(rows, schema_of(NULLS)).sort(*key, "null")


def null_p(observed: float, draws: Doubles) -> float:
    """Return (1 + #{draws >= observed}) / (1 + B).

    Args:
        observed: statistic of the labels as they are.
        draws: [draw] the statistic under relabelling.
    """
    return float((1 + (draws >= observed - 1e-12).sum()) / (1 + draws.size))


_NOTHING: dict[str, Any] = {"value": None, "p_null": None, "draws": []} | dict.fromkeys(
    ("null_mean", "null_std", "null_low", "null_high")
)


def _summary(observed: float, draws: Doubles) -> dict[str, Any]:
    low, high = np.quantile(draws, [0.025, 0.975])
    return {
        "value": float(observed),
        "null_mean": float(draws.mean()),
        "null_std": float(draws.std(ddof=1)) if draws.size > 1 else None,
        "null_low": float(low),
        "null_high": float(high),
        "p_null": null_p(observed, draws),
        "draws": draws.astype(np.float32).tolist(),
    }


def _by_problem(scored: ScoreBlocks) -> list[list[Block]]:
    found: dict[int, list[Block]] = {}
    for block in scored.of_split("test"):
        found.setdefault(block.problem_id, []).append(block)
    return list(found.values())


def _add_problem(
    blocks: list[Block],
    cell_of: NDArray[np.int64],
    by_precision: NDArray[np.bool_],
    sums: Doubles,
    n_problems: NDArray[np.int64],
    seed: int,
) -> None:
    """Add one problem's observed and drawn values, averaged over seeds, to each cell's sums."""
    n_null = sums.shape[2] - 1
    for block in blocks:
        if len(block.sentence_idx) < 2:
            continue
        rng = np.random.default_rng([seed, block.problem_id])
        kinds = [_shifts(rng, len(block.columns), n_null), _permutations(rng, block, n_null)]
        cells = cell_of[block.units]
        values = []
        for relabelling in kinds:
            arranged = _arranged(block, relabelling, by_precision[cells])
            values.append(arranged[:, np.append(0, 1 + relabelling.draw)])
        is_defined = ~np.isnan(values[0][:, 0])
        for cell in np.unique(cells[is_defined]):
            mine = is_defined & (cells == cell)
            n_problems[cell] += 1
            for kind, drawn in enumerate(values):
                sums[kind, cell] += drawn[mine].mean(axis=0)


def _shifts(rng: np.random.Generator, n: int, n_null: int) -> _Relabelling:
    """Every turn of the trace, of which `draw` picks."""
    # A uniform number per draw, so that a trace judged up to another sentence turns likewise.
    draw = np.minimum((rng.random(n_null) * n).astype(np.int64), n - 1)
    return _Relabelling((np.arange(n) - np.arange(n)[:, None]) % n, draw)


def _permutations(rng: np.random.Generator, block: Block, n_null: int) -> _Relabelling:
    """One permutation per draw, inside each fifth of the trace."""
    keys = rng.random((n_null, block.n_sentences), dtype=np.float32)[:, block.columns]
    fifth = position_bin(block.relative_position)
    source = np.empty(keys.shape, dtype=np.int64)
    for each in np.unique(fifth):
        columns = np.flatnonzero(fifth == each)
        source[:, columns] = columns[np.argsort(keys[:, columns], axis=1)]
    return _Relabelling(source, np.arange(n_null))


def _arranged(block: Block, relabelling: _Relabelling, by_precision: NDArray[np.bool_]) -> Doubles:
    """Measure each unit by its labels as they are and in every arrangement.

    Returns:
        [unit, 1 + arrangement] float64; a row of NaN where the metric is undefined.
    """
    n = len(block.columns)
    source = np.vstack([np.arange(n), relabelling.source])
    target_first, target_kind = block.target_of
    # Deterministic recipes have the same scores for every seed: these are measured once.
    row_first, row_kind = distinct_rows(np.stack([target_kind, by_precision], axis=1), block.scores)
    values = np.empty((len(row_first), len(source)))
    for kind, unit in enumerate(target_first):
        for is_precise in (True, False):
            chosen = (target_kind[row_first] == kind) & (by_precision[row_first] == is_precise)
            if not chosen.any():
                continue
            mine = block.of(row_first[chosen])
            if is_precise:
                values[chosen] = _precision(mine, block.positive[unit][source])
            else:
                values[chosen] = _correlation(mine, block.target[unit], source)
    return values[row_kind]


def _precision(block: Block, positive: NDArray[np.bool_]) -> Doubles:
    """Average precision of each unit with the anchors of each arrangement."""
    n = positive.shape[1]
    k = int(positive[0].sum())
    ends = tie_end_rows(block.ranking)
    places = np.nonzero(positive)[1].reshape(len(positive), k)
    step = max(1, _CHUNK // max(places.size, 1))
    parts = [pr_auc_at(ends[at : at + step][:, places], n) for at in range(0, len(ends), step)]
    return np.concatenate(parts)


def _correlation(block: Block, target: Doubles, source: NDArray[np.int64]) -> Doubles:
    """Spearman's rank correlation of each unit with each arrangement of the target."""
    own, other = centred_rank_rows(block.scores), centred_rank_rows(target[None])[0]
    spread = np.sqrt((own**2).sum(axis=1) * (other @ other))
    out = np.full((len(own), len(source)), np.nan)
    np.divide(own @ other[source].T, spread[:, None], out=out, where=spread[:, None] > 0)
    return out
