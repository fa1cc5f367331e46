"""Blocks of scores to metrics: one row per unit, and one per unit and fifth of the trace.

Each recipe is judged by its own target; beside that by the study's labels, so that recipes of
different targets can be compared on one; and by the true importance where it is known. Importance
falls along a trace, so a recipe can rank a whole trace by knowing where it is; within a fifth that
helps little. What does not belong here: means over seeds and problems (`summary`), and nulls that
keep position (`nulls`).

Invariants: a metric that has no value, or no meaning for the recipe's target, is null; a fifth
without sentences, or with one class, has no value and is counted, not averaged.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import polars as pl
from numpy.typing import NDArray

from taprobe_core.errors import DataError
from taprobe_core.evaluation.blocks import UNIT, Block, ScoreBlocks
from taprobe_core.evaluation.summary import chance_levels
from taprobe_core.metrics import (
    centred_rank_rows,
    metric_names,
    pearson_rows,
    pr_auc_rows,
    primary_metric,
    rank_rows,
    recall_rows,
    spearman,
    spearman_rows,
    top_rows,
)
from taprobe_core.probes.control_task import position_bin
from taprobe_core.study.probes import Residualize
from taprobe_core.study.targets import TARGETS, Target, TargetEntry
from taprobe_core.tables import POSITION_BINS, schema_of

Doubles = NDArray[np.float64]


def measure_units(
    scored: ScoreBlocks,
    recall_at: Sequence[int],
    targets: Mapping[str, Target],
    residualize: Mapping[str, Residualize],
) -> pl.DataFrame:
    """Measure every unit.

    Args:
        scored: from `make_blocks`.
        recall_at: values of k.
        targets: recipe -> what its scores predict.
        residualize: recipe -> what was taken from its target; `none` if absent.

    Returns:
        One row per unit, sorted: `UNIT`, then

        - `primary`: the recipe's primary metric, `pr_auc` or `spearman`;
        - `pr_auc`, `spearman`, `pearson`, `recall_at_<k>`: by the recipe's own target. Recall is of
          the k sentences whose target is largest. Scores of signed targets rank no anchors: PR-AUC
          and recall are null;
        - `label_pr_auc`, `label_spearman`: by the study's anchors and its absolute importance
          (signed targets by the signed one; null for targets that are no importance, whose sign
          and span are others). For a residualised recipe this is its value on the raw target;
        - with the truth: `true_pr_auc`, by the true anchors; `oracle_pr_auc` and
          `oracle_spearman`, what the true importance as a score reaches by the recipe's target
          (null if residualised, or no importance);
        - `n_sentences` judged; `n_anchors`, null where the recipe ranks none.

    Raises:
        DataError: a recipe without a target, or of a class without anchors.
    """
    recipes = scored.units["recipe"]
    unknown = sorted(set(recipes.unique()) - set(targets))
    if unknown:
        raise DataError(
            f"no target given of the recipes {unknown}", "targets", "name the target of each recipe"
        )
    target = recipes.replace_strict(dict(targets), return_dtype=pl.String)
    is_signed = ~_told(target, lambda entry: entry.ranks_anchors)
    is_change = ~_told(target, lambda entry: entry.is_importance)
    is_residual = (
        recipes.replace_strict(dict(residualize), default="none", return_dtype=pl.String) != "none"
    ).to_numpy()
    names = metric_names(recall_at, scored.has_truth)
    table = {name: np.full(len(recipes), np.nan) for name in names}
    counts = np.zeros((2, len(recipes)), dtype=np.int64)
    for block in scored.blocks:
        signed, change = is_signed[block.units], is_change[block.units]
        found = _own(block, recall_at, signed) | _by_labels(block, signed, change)
        if scored.has_truth:
            found |= _by_truth(block, signed, change | is_residual[block.units])
        for name, values in found.items():
            table[name][block.units] = values
        counts[0, block.units] = len(block.sentence_idx)
        counts[1, block.units] = np.where(block.ranks_anchors, block.positive.sum(axis=1), -1)
    primary = target.replace_strict({name: primary_metric(name) for name in set(targets.values())})
    _check_anchors(scored.units, (primary == "pr_auc").to_numpy() & (counts[1] < 0))
    ranks = (primary == "pr_auc").to_numpy()
    table = {"primary": np.where(ranks, table["pr_auc"], table["spearman"]), **table}
    return scored.units.with_columns(
        *(pl.Series(name, values, pl.Float64).fill_nan(None) for name, values in table.items()),
        pl.Series("n_sentences", counts[0]),
        pl.Series("n_anchors", counts[1]).replace({-1: None}),
    ).sort(UNIT)


def _told(target: pl.Series, fact: Callable[[TargetEntry], bool]) -> NDArray[np.bool_]:
    """What the entries of targets say, [unit] bool."""
    known = {name: fact(TARGETS[name]) for name in target.unique()}
    return target.replace_strict(known, return_dtype=pl.Boolean).to_numpy()


def _own(block: Block, recall_at: Sequence[int], signed: NDArray[np.bool_]) -> dict[str, Doubles]:
    first, kind = block.target_of
    distinct = block.target[first]
    found = {
        "pr_auc": _where(block.ranks_anchors, pr_auc_rows(block.positive, block.ranking)),
        "spearman": spearman_rows(centred_rank_rows(distinct)[kind], block.ranking),
        "pearson": pearson_rows(block.target, block.scores),
    }
    for k in recall_at:
        recall = recall_rows(top_rows(distinct, k)[kind], block.ranking, k)
        found[f"recall_at_{k}"] = _where(~signed, recall)
    return found


def _by_labels(
    block: Block, signed: NDArray[np.bool_], change: NDArray[np.bool_]
) -> dict[str, Doubles]:
    anchors = np.broadcast_to(block.labels["is_anchor"], block.scores.shape)
    sides = np.stack([block.labels["importance_abs"], block.labels["importance_signed"]])
    ranks = centred_rank_rows(sides)[signed.astype(int)]
    return {
        "label_pr_auc": _where(~signed, pr_auc_rows(anchors, block.ranking)),
        "label_spearman": _where(~change, spearman_rows(ranks, block.ranking)),
    }


def _by_truth(
    block: Block, signed: NDArray[np.bool_], has_no_oracle: NDArray[np.bool_]
) -> dict[str, Doubles]:
    true = block.labels["true_importance"]
    anchors = np.broadcast_to(block.labels["is_true_anchor"], block.scores.shape)
    first, kind = block.target_of
    oracle_ranking = rank_rows(np.broadcast_to(np.abs(true), (len(first), len(true))))
    oracle = pr_auc_rows(block.positive[first], oracle_ranking)[kind]
    ranked = [[spearman(side, row) for side in (np.abs(true), true)] for row in block.target[first]]
    correlation = np.array(ranked).reshape(-1, 2)[kind, signed.astype(int)]
    return {
        "true_pr_auc": _where(~signed, pr_auc_rows(anchors, block.ranking)),
        "oracle_pr_auc": _where(block.ranks_anchors & ~has_no_oracle, oracle),
        "oracle_spearman": _where(~has_no_oracle, correlation),
    }


def _where(has_meaning: NDArray[np.bool_], values: Doubles) -> Doubles:
    return np.where(has_meaning, values, np.nan)


def _check_anchors(units: pl.DataFrame, lacks: NDArray[np.bool_]) -> None:
    if lacks.any():
        first = units.row(int(np.flatnonzero(lacks)[0]), named=True)
        raise DataError(
            f"{int(lacks.sum())} units predict anchors and name none (is_positive is null)",
            "recipe {recipe!r}, {protocol}, fold {fold}, problem {problem_id}".format(**first),
            "fit the probes again: scores carry the anchors that they are judged by",
        )


def position_metrics(scored: ScoreBlocks, targets: Mapping[str, Target]) -> pl.DataFrame:
    """Measure every recipe within each fifth of the trace, on test.

    Args:
        scored: from `make_blocks`.
        targets: recipe -> what its scores predict.

    Returns:
        `tables.POSITION_BINS`: the primary metric, seeds averaged inside a problem, then problems;
        `chance` is the mean expected PR-AUC of a random ranking where it is defined (0 for rank
        correlation); n_problems are those with sentences in the fifth.
    """
    metric = {name: primary_metric(target) for name, target in targets.items()}
    by_precision = (
        scored.units["recipe"].replace_strict(metric, return_dtype=pl.String) == "pr_auc"
    ).to_numpy()
    parts = [
        measured
        for block in scored.of_split("test")
        for measured in _measure(block, by_precision[block.units])
    ]
    if not parts:
        return schema_of(POSITION_BINS).to_frame()
    unit, place, value, chance = (np.concatenate(column) for column in zip(*parts, strict=True))
    measured = pl.DataFrame({"bin": place, "value": value, "chance": chance}, nan_to_null=True)
    key = ["recipe", "protocol", "bin"]
    return (
        scored.units[unit]
        .hstack(measured)
        .sort(*key, "problem_id", "fold", "seed")
        .group_by(*key, "problem_id", maintain_order=True)
        .agg(pl.col("value", "chance").mean())
        .group_by(key, maintain_order=True)
        .agg(
            pl.col("value").mean(),
            pl.col("chance").filter(pl.col("value").is_not_null()).mean(),
            pl.len().cast(pl.Int64).alias("n_problems"),
            pl.col("value").count().cast(pl.Int64).alias("n_defined"),
        )
        .with_columns(pl.col("recipe").replace_strict(metric).alias("metric"))
        .select(schema_of(POSITION_BINS).names())
        .sort(key)
    )


def _measure(
    block: Block, by_precision: NDArray[np.bool_]
) -> list[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]]:
    """Return unit, bin, value and chance of every unit in each bin that has sentences."""
    fifth = position_bin(block.relative_position)
    found = []
    for place in np.unique(fifth):
        columns = fifth == place
        ranking = rank_rows(block.scores[:, columns])
        positive = block.positive[:, columns]
        first, kind = block.target_of
        ranks = centred_rank_rows(block.target[first][:, columns])[kind]
        value = np.where(
            by_precision, pr_auc_rows(positive, ranking), spearman_rows(ranks, ranking)
        )
        n, k = np.full(len(value), columns.sum()), positive.sum(axis=1)
        chance = np.where(by_precision, chance_levels(n, k), 0.0)
        found.append((block.units, np.full(len(value), place), value, chance))
    return found
