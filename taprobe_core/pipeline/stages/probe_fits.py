"""Probe fits of one site and trial: an index of fits, one for each recipe of the study.

How what is missing is fitted (each distinct fit once, in few batched solves) is in `fit`.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import polars as pl

from taprobe_core.errors import TaprobeError, attempted
from taprobe_core.keys import Site, Trial, parse_site, parse_trial
from taprobe_core.pipeline.commit import Files, commit_cell
from taprobe_core.pipeline.grid import Cell
from taprobe_core.pipeline.plan import Plan
from taprobe_core.pipeline.stage import Check, Description, Found, Made, Outcome, Part, Stage
from taprobe_core.store import Artifact, ArtifactKey

FITS = Part("fits", code_version="5")
"""One recipe's fits over all folds: probes, and scores of validation and test sentences."""


def _fits(plan: Plan, cell: Cell) -> list[ArtifactKey]:
    site, trial = parse_site(cell[0]), parse_trial(cell[1])
    return [plan.fit(site, trial.setting, recipe, trial.seed) for recipe in plan.study.fitted]


def _make(plan: Plan, cells: Sequence[Cell]) -> Iterator[tuple[Cell, Made]]:
    """Fit what the cells lack and yield what became of each.

    Cells are grouped by site and setting: what shares a feature matrix is done on one. A recipe
    that fails leaves the other fits of its cell committed.
    """
    from taprobe_core.devices import side_by_side
    from taprobe_core.pipeline.fit import Fits, WantedFit, ensure_fits

    groups: dict[tuple[Site, str], list[Trial]] = defaultdict(list)
    for cell in cells:
        trial = parse_trial(cell[1])
        groups[parse_site(cell[0]), trial.setting].append(trial)

    def fit(group: tuple[Site, str]) -> Fits | TaprobeError:
        trials = groups[group]
        wanted = [WantedFit(recipe, trial.seed) for trial in trials for recipe in plan.study.fitted]
        return attempted(lambda: ensure_fits(plan, *group, wanted), f"fits of {group[0]}")

    start = time.monotonic()
    results = side_by_side(fit, list(groups))
    for ((site, _), trials), done in zip(groups.items(), results, strict=True):
        new = set() if isinstance(done, TaprobeError) else done.new
        for trial in trials:
            cell = (str(site), str(trial))
            fits = _fits(plan, cell)
            made: Made = done if isinstance(done, TaprobeError) else done.errors_of(fits)
            if not made:
                made = attempted(partial(_commit_index, plan, cell), f"fits of {'/'.join(cell)}")
            if isinstance(made, Outcome):
                # A fit that trials share is the first one's work.
                is_reused = made.is_reused and new.isdisjoint(fits)
                new -= set(fits)
                made = Outcome(made.artifact, is_reused, time.monotonic() - start)
            yield cell, made
            start = time.monotonic()


def _commit_index(plan: Plan, cell: Cell) -> Outcome:
    def compute() -> Files:
        recipes, keys = plan.study.fitted, _fits(plan, cell)
        table = pl.DataFrame(
            {
                "recipe": [recipe.name for recipe in recipes],
                "target": [recipe.target for recipe in recipes],
                "scope": [key.partition[0] for key in keys],
                "fit": [key.partition[2] for key in keys],
                "fit_fingerprint": [key.fingerprint for key in keys],
            }
        )
        return {"fits": table}

    return commit_cell(plan, "probe_fits", cell, compute, {"site": cell[0], "trial": cell[1]})


def read_scores(plan: Plan, site: Site, trial: Trial) -> pl.DataFrame:
    """Read the scores of every recipe of one site and trial (`tables.SCORES`).

    Raises:
        MissingArtifactError: a recipe is not fitted yet.
    """
    fits = [plan.fit(site, trial.setting, recipe, trial.seed) for recipe in plan.study.recipes]
    return pl.concat([plan.store.open(key).read_table("scores.parquet") for key in fits])


def read_control_scores(plan: Plan, site: Site, trial: Trial) -> pl.DataFrame:
    """Read the scores of the control tasks, under the names of the recipes that they control.

    Returns:
        `tables.SCORES`; without rows where the study asks for none.

    Raises:
        MissingArtifactError: a control is not fitted yet.
    """
    from taprobe_core.tables import SCORES, schema_of

    parts = [schema_of(SCORES).to_frame()]
    for name, control in plan.study.controls.items():
        artifact = plan.store.open(plan.fit(site, trial.setting, control, trial.seed))
        scores = artifact.read_table("scores.parquet")
        parts.append(scores.with_columns(pl.lit(name).alias("recipe")))
    return pl.concat(parts)


def _describe(plan: Plan, cell: Cell) -> Description:
    scores = read_scores(plan, parse_site(cell[0]), parse_trial(cell[1]))
    metrics = {
        "n_recipes": scores["recipe"].n_unique(),
        "n_folds": scores.select(pl.struct("protocol", "fold").n_unique()).item(),
        "n_scores": scores.height,
    }
    shown = unconverged(plan, plan.open("probe_fits", cell))
    return Description(metrics | shown.metrics, scores.height, None, shown.tables)


class Unconverged(NamedTuple):
    """Linear models that are not within their tolerance, as metadata: nothing where all are."""

    metrics: dict[str, int]
    tables: dict[str, pl.DataFrame]


def unconverged(plan: Plan, index: Artifact) -> Unconverged:
    """Return the linear models that an index lists and that did not converge; their scores count.

    Args:
        plan: the plan.
        index: an artifact that lists fits.
    """
    rows = []
    for key in plan.part_keys(index.manifest):
        provenance = plan.store.open(key).manifest.provenance
        for fold, bound in provenance.get("not_converged", {}).items():
            rows.append({"recipe": provenance["recipe"], "fold": fold, "error_bound": bound})
    if not rows:
        return Unconverged({}, {})
    return Unconverged({"n_not_converged": len(rows)}, {"not_converged": pl.DataFrame(rows)})


def _of_model(cell: Cell) -> Cell:
    return parse_site(cell[0]).model, parse_trial(cell[1]).setting


def _problems(plan: Plan, cell: Cell) -> list[ArtifactKey]:
    return [plan.key("spans", _of_model(cell)), plan.key("labels", _of_model(cell))]


def split_coverage(plan: Plan, cell: Cell) -> Found:
    """No problem stands on two sides; under LOPO every problem is test exactly once."""
    from taprobe_core.splits import check_no_leakage, make_folds

    spans = plan.read("spans", _of_model(cell), "spans")
    labels = plan.read("labels", _of_model(cell), "labels")
    problem_ids = sorted({*spans["problem_id"]} & {*labels["problem_id"]})
    scores = read_scores(plan, parse_site(cell[0]), parse_trial(cell[1]))
    faults = []
    splits = plan.study.splits
    for fold in make_folds(plan.problem_ids(), splits, present=problem_ids):
        check_no_leakage(fold)
        scored = scores.filter(protocol=fold.protocol, fold=fold.index)
        val = fold.train if splits.inner_folds else fold.val
        for split, side in (("val", val), ("test", fold.test)):
            found = set(scored.filter(split=split)["problem_id"])
            if found != set(side):
                faults.append(
                    f"{fold.protocol} fold {fold.index}: {split} has problems {sorted(found)}, "
                    f"the split says {sorted(side)}"
                )
    tested = (
        scores.filter(protocol="lopo", split="test")
        .group_by("recipe")
        .agg(n=pl.col("problem_id").n_unique())
    )
    faults += [
        f"recipe {recipe}: {n} of {len(problem_ids)} problems are test under LOPO"
        for recipe, n in tested.iter_rows()
        if n != len(problem_ids)
    ]
    return Found(tuple(faults))


PROBE_FITS = Stage(
    name="probe_fits",
    title="Every recipe fitted on every fold; scores of validation and test sentences.",
    grid=("site", "trial"),
    reads=("labels", "spans", "activations", "vertical_attention"),
    code_version="3",
    # Each fit is keyed by what it reads: another pooling leaves the text baselines where they are.
    keyed_by=_fits,
    part=FITS,
    make=_make,
    describe=_describe,
    tables={"fits": "FITS"},
    checks={
        "split_coverage": Check(
            split_coverage,
            reads=_problems,
            settings=lambda plan: {"folds": plan.folds_config()},
        )
    },
    op="fit_probes",
    kinds=frozenset({"torch", "safetensors"}),
)
