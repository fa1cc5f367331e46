"""What the evaluation costs: metrics of many units at once against one at a time, and a whole cell.

CPU seconds on one thread, variants in one process, their agreement beside the ratio.

    OMP_NUM_THREADS=1 POLARS_MAX_THREADS=1 python benchmarks/evaluation.py
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import polars as pl

from taprobe_core.evaluation.blocks import ScoreBlocks, make_blocks
from taprobe_core.evaluation.evaluate import evaluate
from taprobe_core.evaluation.nulls import null_distributions
from taprobe_core.evaluation.units import measure_units
from taprobe_core.metrics import pr_auc, recall_at_k, spearman
from taprobe_core.study.config import Evaluation, Target
from taprobe_core.tables import SCORES, schema_of

N_PROBLEMS, N_SENTENCES = 20, 130


def make_labels(rng: np.random.Generator) -> pl.DataFrame:
    """Return labels of problems of 65 to 195 sentences, a tenth of them anchors."""
    parts = []
    for problem_id in range(N_PROBLEMS):
        n = int(N_SENTENCES * (0.5 + problem_id / (N_PROBLEMS - 1)))
        signed = rng.normal(0, 0.1, n).clip(-1, 1)
        parts.append(
            pl.DataFrame(
                {
                    "problem_id": np.full(n, problem_id),
                    "sentence_idx": np.arange(n),
                    "importance_signed": signed,
                    "importance_abs": np.abs(signed),
                    "is_anchor": np.abs(signed) >= np.quantile(np.abs(signed), 0.9),
                }
            )
        )
    nothing = {"true_importance": pl.Float64, "is_true_anchor": pl.Boolean}
    return pl.concat(parts).with_columns(
        pl.lit(None, kind).alias(name) for name, kind in nothing.items()
    )


def make_scores(labels: pl.DataFrame, n_recipes: int, seed: int, holdout: bool) -> pl.DataFrame:
    """Return scores of every fold; the first half of the recipes do not depend on the seed."""
    of = dict(enumerate(labels.partition_by("problem_id", maintain_order=True)))
    folds = [
        ("lopo", fold, {"val": [(fold + step) % N_PROBLEMS for step in (1, 2, 3)], "test": [fold]})
        for fold in range(N_PROBLEMS)
    ]
    if holdout:
        folds.insert(0, ("holdout", 0, {"val": [0, 1, 2], "test": [3, 4, 5]}))
    parts = []
    for recipe in range(n_recipes):
        rng = np.random.default_rng([recipe, seed if recipe >= n_recipes // 2 else 0])
        for protocol, fold, sides in folds:
            for split, problems in sides.items():
                own = pl.concat([of[problem] for problem in problems])
                raw = 5 * own["importance_abs"].to_numpy() + rng.normal(size=own.height)
                place = {"recipe": f"r{recipe}", "protocol": protocol, "fold": fold, "split": split}
                parts.append(
                    own.select(
                        "problem_id",
                        "sentence_idx",
                        *(pl.lit(value).alias(name) for name, value in place.items()),
                        pl.Series("score", 1 / (1 + np.exp(-raw))),
                        pl.col("importance_abs").alias("target_value"),
                        pl.col("is_anchor").alias("is_positive"),
                    )
                )
    return pl.concat(parts).cast(schema_of(SCORES))


def one_at_a_time(scored: ScoreBlocks) -> np.ndarray:
    """Return PR-AUC, Spearman and recall at 5 and 10 of every unit by the scalar metrics."""
    found = np.empty((scored.units.height, 4))
    for block in scored.blocks:
        for row, unit in enumerate(block.units):
            score, target = block.scores[row], block.target[row]
            found[unit] = (
                pr_auc(block.positive[row], score),
                spearman(target, score),
                recall_at_k(target, score, 5),
                recall_at_k(target, score, 10),
            )
    return found


def seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    """Return the CPU seconds of `work`, and what it returned."""
    start = time.process_time()
    result = work()
    return time.process_time() - start, result


def main() -> None:
    """Print the three comparisons."""
    labels = make_labels(np.random.default_rng(0))
    targets: dict[str, Target] = {f"r{recipe}": "anchor_binary" for recipe in range(40)}
    by_seed = {seed: make_scores(labels, 40, seed, holdout=False) for seed in range(10)}
    laying, scored = seconds(lambda: make_blocks(by_seed, labels))
    batched, table = seconds(lambda: measure_units(scored, (5, 10), targets, {}))
    scalar, reference = seconds(lambda: one_at_a_time(scored))
    n = scored.units.height
    names = ["pr_auc", "spearman", "recall_at_5", "recall_at_10"]
    apart = np.abs(table.select(names).to_numpy() - reference).max()
    print(f"{n} units, {len(scored.score)} scores: laying out {laying:.2f} s, {n / laying:,.0f}/s")
    print(f"metrics, all seven at once    {batched:.2f} s, {n / batched:,.0f} units/s")
    print(f"four of them one at a time    {scalar:.2f} s, {n / scalar:,.0f} units/s, "
          f"{scalar / batched:.0f} x, largest distance {apart:.1e}")  # fmt: skip
    taken, _ = seconds(lambda: null_distributions(scored, targets, 1000, 0))
    n_test = int((scored.units["split"] == "test").sum())
    print(f"both nulls, 1000 draws        {taken:.2f} s, {1e3 * taken / n_test:.3f} ms/test unit")
    cell = {seed: make_scores(labels, 10, seed, holdout=True) for seed in range(5)}
    study = Evaluation(baselines=("r0", "r1"))
    evaluate(cell, labels, study, targets)
    taken, tables = seconds(lambda: evaluate(cell, labels, study, targets))
    print(f"a cell (10 recipes, 2 protocols, 5 seeds, {N_PROBLEMS} problems; "
          f"{tables.problem_metrics.height} units): evaluate {taken:.2f} s")  # fmt: skip


if __name__ == "__main__":
    main()
