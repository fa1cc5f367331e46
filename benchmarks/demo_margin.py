"""Does an activation probe beat position and text on the demo, and does an untrained twin?

    python benchmarks/demo_margin.py [DATA_FOLDER]

Runs the demo's four model-settings twice, leave one problem out: with the bundled reasoners, and
with twins of the same architecture whose weights are random, on the same rollouts, labels, texts
and folds. In each fold validation alone chooses among all activation recipes and layers. Prints
the PR-AUC of position, text, probe and twin, and paired differences with 95 % intervals (bootstrap
over problems); then the same probe's scores against labels and truth, beside chance, the oracle
(the true importance as a score) and the ceiling (how often a sentence would become an anchor if the
labels were drawn again). Nothing is tuned here: the recipes are the demo study's own.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import yaml

from taprobe_core.demo.task import problem
from taprobe_core.demo.truth import exact_rates, simulated_importance
from taprobe_core.evaluation.evaluate import compare_values
from taprobe_core.evaluation.selection import ANY_ACTIVATION_PROBE, chosen_values
from taprobe_core.evaluation.summary import chance_pr_auc
from taprobe_core.labels import trigram_masked_dissimilar
from taprobe_core.labels.make import anchors
from taprobe_core.metrics import pr_auc
from taprobe_core.pipeline import (
    Plan,
    cells_of,
    open_plan,
    read_evaluation,
    run_stage,
    stages_of,
)
from taprobe_core.study import parse_study, shipped_studies

N_DRAWS = 1000
BASELINES = ("position_baseline", "text_only_baseline")


def study_values(untrained: bool) -> dict[str, Any]:
    """Return the demo study under leave-one-problem-out, with its reasoners or their twins."""
    values: dict[str, Any] = yaml.safe_load(shipped_studies()["demo"].read_text(encoding="utf-8"))
    values["splits"] = {"protocols": ["lopo"]}
    if untrained:
        for name, model in values["models"].items():
            model["checkpoint"] = {
                "kind": "stand_in",
                "architecture": name.removeprefix("tiny-"),
                "n_layers": model["n_layers"],
                "d_model": model["d_model"],
            }
    return values


def values_by_problem(plan: Plan) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Run a plan; return the chosen probe's and the baselines' values on each test problem."""
    stages = stages_of(plan.study)
    for stage in stages[: stages.index("evaluation") + 1]:
        for _ in run_stage(plan, stage, cells_of(plan.study, stage)):
            pass
    cells = [
        (site, setting, read_evaluation(plan, site, setting))
        for site in plan.study.sites
        for setting in plan.study.settings
    ]
    chosen = chosen_values(cells, recipes=plan.study.recipes).filter(recipe=ANY_ACTIVATION_PROBE)
    baselines = pl.concat(
        tables.problem_metrics.filter(pl.col("recipe").is_in(BASELINES), split="test")
        .group_by("recipe", "problem_id", maintain_order=True)
        .agg(pl.col("pr_auc").mean().alias("value"))
        .with_columns(model=pl.lit(site.model), setting=pl.lit(setting))
        for site, setting, tables in cells
        if site.layer == 0
    )
    return chosen, baselines


def main(folder: Path) -> None:
    """Run both studies and print the two tables."""
    plans = [
        open_plan(parse_study(yaml.safe_dump(study_values(untrained)), "demo_margin"), folder)
        for untrained in (False, True)
    ]
    (probe, baselines), (twin, _) = map(values_by_problem, plans)
    evaluation = plans[0].study.evaluation
    head = f"{'model':11} {'setting':24} {'position':>8} {'text':>6} {'probe':>6} {'twin':>6}"
    print(f"{head}   probe - position       probe - text           probe - twin           "
          f"twin - text")  # fmt: skip
    for (model, setting), own in probe.group_by("model", "setting", maintain_order=True):
        where = {"model": model, "setting": setting}
        own = own.select("problem_id", "value")
        other = twin.filter(**where).select("problem_id", "value")
        position, text = (
            baselines.filter(recipe=name, **where).select("problem_id", "value")
            for name in BASELINES
        )
        means = [frame["value"].mean() for frame in (position, text, own, other)]
        pairs = [(own, position), (own, text), (own, other), (other, text)]
        found = [compare_values(a, b, evaluation) for a, b in pairs]
        shown = "  ".join(
            f"{c.delta:+.3f} [{c.delta_low:+.3f}, {c.delta_high:+.3f}]" for c in found
        )
        numbers = f"{means[0]:8.3f} " + " ".join(f"{mean:6.3f}" for mean in means[1:])
        print(f"{model:11} {setting:24} {numbers}  {shown}")
    print("\nPR-AUC of the same probe against            labels, R = 100                 truth")
    print(f"{'model':11} {'setting':24} {'chance':>6} {'probe':>6} {'oracle':>6} {'ceiling':>7}   "
          f"{'probe':>6} {'labels':>6}")  # fmt: skip
    for (model, setting), own in probe.group_by("model", "setting", maintain_order=True):
        chance = sum(
            chance_pr_auc(n, k) for n, k in own.select("n_sentences", "n_anchors").iter_rows()
        )
        ceiling, labels = levels(plans[0], str(model), str(setting))
        print(
            f"{model:11} {setting:24} {chance / own.height:6.3f} {own['value'].mean():6.3f} "
            f"{own['oracle_pr_auc'].mean():6.3f} {ceiling:7.3f}   "
            f"{own['true_pr_auc'].mean():6.3f} {labels:6.3f}"
        )


def levels(plan: Plan, model: str, setting: str) -> tuple[float, float]:
    """Return the ceiling on noisy labels, and what the noisy labels reach against the truth.

    The ceiling knows true effect and noise: it scores a sentence by how often it becomes an anchor
    when the labels are drawn again from the exact rates.
    """
    labels = plan.read("labels", (model, setting), "labels")
    rollouts = plan.read("rollouts", (model, setting), "sentences")
    rng, rule = np.random.default_rng(0), plan.study.labels
    ceilings, on_truth = [], []
    for (problem_id,), group in labels.group_by("problem_id", maintain_order=True):
        texts = rollouts.filter(problem_id=problem_id).sort("sentence_idx")["sentence"].to_list()
        rates = exact_rates(problem(int(str(problem_id))), texts, trigram_masked_dissimilar)
        drawn = np.abs(simulated_importance(rates, 100, N_DRAWS, rng))[:, : group.height]
        often = np.mean([anchors(each, rule.percentile, rule.tie_rule) for each in drawn], axis=0)
        ceilings.append(pr_auc(group["is_anchor"].to_numpy(), often))
        on_truth.append(
            pr_auc(group["is_true_anchor"].to_numpy(), group["importance_abs"].to_numpy())
        )
    return float(np.mean(ceilings)), float(np.mean(on_truth))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(Path(temporary))
