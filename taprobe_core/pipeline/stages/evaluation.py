"""Evaluation of one site and setting over all seeds: how well each recipe ranks, against what.

Its checks are the tripwires of fits: they look at the rows and folds that the probes of one site
and setting are fitted on. The pipeline is the same for all layers, so each model and setting is
looked at once, at its middle layer: a false alarm is rare (`tripwires`), and with every layer of a
deep model it would not stay so.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import polars as pl

from taprobe_core.errors import NotEnoughDataError
from taprobe_core.keys import Site, Trial, parse_site
from taprobe_core.pipeline.commit import Files, commit_cell
from taprobe_core.pipeline.grid import Cell
from taprobe_core.pipeline.plan import Plan
from taprobe_core.pipeline.stage import (
    Check,
    Description,
    Found,
    Outcome,
    Stage,
    cell_by_cell,
    present,
)
from taprobe_core.pipeline.stages.probe_fits import read_control_scores, read_scores
from taprobe_core.store import ArtifactKey

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from taprobe_core.evaluation.evaluate import EvaluationTables
    from taprobe_core.probes.features import ProbeData
    from taprobe_core.study import Pooling

_EVALUATED = {
    "metrics": "METRICS",
    "problem_metrics": "PROBLEM_METRICS",
    "deltas": "DELTAS",
    "contrasts": "CONTRASTS",
    "nulls": "NULLS",
    "position_bins": "POSITION_BINS",
    "calibration": "CALIBRATION",
    "reliability_bins": "RELIABILITY_BINS",
    "best_seeds": "BEST_SEEDS",
    "selectivity": "SELECTIVITY",
}
"""The tables of `EvaluationTables`."""


def _config(plan: Plan, cell: Cell) -> dict[str, Any]:
    return {
        **plan.study.evaluation.model_dump(mode="json"),
        "recipes": [recipe.name for recipe in plan.study.recipes],
    }


def _make(plan: Plan, cell: Cell) -> Outcome:
    """Measure every recipe, gather the plans of all seeds, commit.

    Raises:
        MissingArtifactError: a trial's fits or plans are not there yet.
    """
    site, setting = parse_site(cell[0]), cell[1]
    trials, recipes = [Trial(setting, seed) for seed in plan.study.seeds], plan.study.recipes

    def compute() -> Files:
        from taprobe_core.evaluation.evaluate import evaluate

        for key in plan.upstream("evaluation", cell):
            plan.store.open(key)
        tables = evaluate(
            {trial.seed: read_scores(plan, site, trial) for trial in trials},
            plan.read("labels", (site.model, setting), "labels"),
            plan.study.evaluation,
            {recipe.name: recipe.target or plan.study.probes.target for recipe in recipes},
            {recipe.name: recipe.residualize for recipe in recipes},
            {trial.seed: read_control_scores(plan, site, trial) for trial in trials},
        )
        plans = pl.concat(
            plan.read("deferral_plans", (cell[0], str(trial)), "plans").with_columns(
                seed=pl.lit(trial.seed, pl.Int64)
            )
            for trial in trials
        )
        return {**{name: getattr(tables, name) for name in _EVALUATED}, "plans": plans}

    provenance = {"site": cell[0], "setting": setting, "seeds": list(plan.study.seeds)}
    return commit_cell(plan, "evaluation", cell, compute, provenance)


def read_evaluation(plan: Plan, site: Site, setting: str) -> EvaluationTables:
    """Read one site and setting's evaluation.

    Raises:
        MissingArtifactError: it is not there yet.
    """
    from taprobe_core.evaluation.evaluate import EvaluationTables

    cell = (str(site), setting)
    return EvaluationTables(**{name: plan.read("evaluation", cell, name) for name in _EVALUATED})


def _describe(plan: Plan, cell: Cell) -> Description:
    from taprobe_core.report import plots
    from taprobe_core.report.findings import main_protocol

    tables = read_evaluation(plan, parse_site(cell[0]), cell[1])
    protocol = main_protocol(tables.metrics)
    test = tables.metrics.filter(split="test", protocol=protocol)
    metric = str(test["primary_metric"][0])
    metrics = {row["recipe"]: row[metric] for row in test.iter_rows(named=True)}
    for row in tables.selectivity.filter(protocol=protocol).iter_rows(named=True):
        for name in ("control_value", "selectivity"):
            metrics[f"{name}/{row['recipe']}"] = row[name]
    rows = tables.deltas.filter(protocol=protocol).with_columns(
        label=pl.format("{} minus {}", "recipe", "baseline")
    )
    title = f"{' · '.join(cell)} · {protocol}"
    picture = plots.delta_intervals(rows, metric=metric, title=title)
    return Description(present(metrics), tables.metrics.height, plots.to_data_uri(picture))


def shuffled_labels_at_chance(plan: Plan, cell: Cell) -> Found:
    """A probe of shuffled labels ranks held-out problems no better than chance."""
    from taprobe_core.devices import threads_for
    from taprobe_core.evaluation.tripwires import ridge_probe, row_identity, shuffled_labels
    from taprobe_core.splits import make_folds

    data, X = _rows(plan, cell)
    folds = make_folds(plan.problem_ids(), plan.study.splits, present=data.problems)
    try:
        with threads_for(X.size):
            verdict = shuffled_labels(
                ridge_probe(X),
                data.problem_id,
                data.labels["is_anchor"].to_numpy(),
                folds,
                identity=row_identity(X),
                seed=plan.study.seeds[0],
            )
    except NotEnoughDataError as error:
        return Found(not_run=error.what)
    return Found(
        () if verdict.passes else (verdict.text,),
        numbers={"p": verdict.p, "pr_auc": verdict.value, "chance": verdict.chance},
    )


def one_problem_is_memorised(plan: Plan, cell: Cell) -> Found:
    """A network learns the labels of the largest problem by heart, without early stopping."""
    from taprobe_core.devices import threads_for
    from taprobe_core.evaluation.tripwires import memorises_one_problem, network

    data, X = _rows(plan, cell)
    try:
        with threads_for(X.size):
            verdict = memorises_one_problem(
                network(),
                X,
                data.problem_id,
                data.labels["is_anchor"].to_numpy(),
                seed=plan.study.seeds[0],
            )
    except NotEnoughDataError as error:
        return Found(not_run=error.what)
    return Found(
        () if verdict.passes else (verdict.text,),
        numbers={"pr_auc": verdict.value, "n_repeated_rows": verdict.n_repeated},
    )


def _is_looked_at(plan: Plan, cell: Cell) -> bool:
    """Whether the tripwires of fits look at a cell: once per model and setting, at one layer."""
    site = parse_site(cell[0])
    sites = sorted(plan.sites(site.model), key=lambda site: site.layer)
    return _pooling_read(plan) is not None and site == sites[len(sites) // 2]


def _pooling_read(plan: Plan) -> Pooling | None:
    """The states that the first recipe of activations reads; None where no recipe reads any."""
    readers = [recipe for recipe in plan.study.recipes if "activations" in recipe.features]
    return readers[0].pooling if readers else None


def _rows(plan: Plan, cell: Cell) -> tuple[ProbeData, NDArray[np.float32]]:
    """The rows of a cell that is looked at, and the states that the first recipe of them reads."""
    from taprobe_core.pipeline.inputs import read_probe_data
    from taprobe_core.study import ProbeRecipe

    site, pooling = parse_site(cell[0]), _pooling_read(plan)
    if pooling is None:
        raise ValueError("no recipe reads activations")
    recipe = ProbeRecipe(name="tripwire", features=("activations",), pooling=pooling)
    data = read_probe_data(plan, site.model, cell[1], site, [recipe])
    return data, data.activations[recipe.pooling]


def _reads_rows(plan: Plan, cell: Cell) -> list[ArtifactKey]:
    of_model = (parse_site(cell[0]).model, cell[1])
    return [
        *(plan.key(stage, of_model) for stage in ("rollouts", "labels", "spans")),
        plan.key("activations", cell),
    ]


def _settings(plan: Plan) -> dict[str, Any]:
    return {
        "folds": plan.folds_config(),
        "seed": plan.study.seeds[0],
        "pooling": _pooling_read(plan),
    }


_TRIPPED = "docs/tripwires.md says where to look, under 'When one trips'"

EVALUATION = Stage(
    name="evaluation",
    title="Metrics over problems, and paired deltas against position and text.",
    grid=("site", "setting"),
    reads=("probe_fits", "deferral_plans"),
    code_version="4",
    config=_config,
    make=cell_by_cell(_make),
    describe=_describe,
    tables={**_EVALUATED, "plans": "PLANS_OF_SEEDS"},
    checks={
        look.__name__: Check(
            look, _reads_rows, _TRIPPED, settings=_settings, looks_at=_is_looked_at, version=version
        )
        for look, version in ((shuffled_labels_at_chance, "2"), (one_problem_is_memorised, "1"))
    },
    op="evaluate_probes",
)
