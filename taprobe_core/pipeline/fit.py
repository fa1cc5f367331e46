"""Probe fits of any set of (site, trial) cells: each distinct fit once, in few batched solves.

What shares a feature matrix is done on one loaded matrix: cells are grouped by (site, setting), and
all that their trials lack goes into the solvers together. A fit is keyed by what it depends on, so
baselines are solved once for all sites of a model and deterministic recipes once for all seeds; it
is committed as soon as its solve is done, and a trial's artifact is an index of its fits. A setting
that repeats another's rows takes over its fits.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

import polars as pl

from taprobe_core.attention_tables import variant_scores
from taprobe_core.checkpoints import pick_devices
from taprobe_core.features import ProbeData
from taprobe_core.keys import Site, Trial
from taprobe_core.pipeline.attention import read_attention
from taprobe_core.pipeline.inputs import read_probe_data
from taprobe_core.pipeline.outcome import Outcome, commit_once
from taprobe_core.pipeline.plan import Plan
from taprobe_core.pipeline.skips import folds_of
from taprobe_core.pipeline.twins import find_twin, take_over
from taprobe_core.pipeline.view import WHOLE, View, kept_rows, take_rows, with_attention
from taprobe_core.probes import Contents, Design, Fit, RecipeFit, fit_batches, save_probes
from taprobe_core.probes.threads import side_by_side
from taprobe_core.store import ArtifactKey, write_table
from taprobe_core.study import ProbeRecipe
from taprobe_core.tables import SCORES, schema_of


class Wanted(NamedTuple):
    """A fit that somebody asks for.

    Attributes:
        recipe: with its target filled in (`Study.recipes`).
        seed: of a stochastic recipe.
        view: which rows it sees, and how attention is scored.
    """

    recipe: ProbeRecipe
    seed: int
    view: View = WHOLE


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
    parts = [schema_of(SCORES).to_frame()]
    for name, control in plan.study.controls.items():
        artifact = plan.store.open(plan.fit(site, trial.setting, control, trial.seed))
        scores = artifact.read_table("scores.parquet")
        parts.append(scores.with_columns(pl.lit(name).alias("recipe")))
    return pl.concat(parts)


def ensure_probe_fits(plan: Plan, cells: Sequence[tuple[Site, Trial]]) -> Iterator[Outcome]:
    """Fit what the cells lack and yield one outcome per cell.

    Args:
        plan: the plan.
        cells: (site, trial) pairs in any order.

    Yields:
        One outcome per cell: the index of its fits, table `fits`.

    Raises:
        MissingArtifactError: labels, spans or activations are not there yet.
        PlanError: a split side would be empty.
    """
    groups: dict[tuple[Site, str], list[Trial]] = defaultdict(list)
    for site, trial in cells:
        groups[site, trial.setting].append(trial)

    def fit(group: tuple[Site, str]) -> dict[ArtifactKey, bool]:
        trials = groups[group]
        wanted = [Wanted(recipe, trial.seed) for trial in trials for recipe in plan.study.fitted]
        return ensure_fits(plan, *group, wanted)

    start = time.monotonic()
    results = side_by_side(fit, list(groups))
    for ((site, _), trials), done in zip(groups.items(), results, strict=True):
        new = {key for key, is_reused in done.items() if not is_reused}
        for trial in trials:
            index, fits = _commit_index(plan, site, trial)
            # A fit that trials share is the first one's work.
            is_reused = index.is_reused and new.isdisjoint(fits)
            new -= set(fits)
            yield Outcome(index.artifact, is_reused, time.monotonic() - start)
            start = time.monotonic()


def fit_key(plan: Plan, site: Site, setting: str, fit: Wanted) -> ArtifactKey:
    """Key of a wanted fit at one site and setting."""
    return plan.fit(site, setting, fit.recipe, fit.seed, fit.view)


def ensure_fits(
    plan: Plan, site: Site, setting: str, wanted: Sequence[Wanted]
) -> dict[ArtifactKey, bool]:
    """Fit what the store lacks of one (site, setting), each distinct fit once.

    Unlike other artifacts, fits are computed before the lock of their partition is taken, so two
    processes that want the same fits at the same time both compute them; one is kept.

    Args:
        plan: the plan.
        site: model and layer.
        setting: the setting.
        wanted: what to fit.

    Returns:
        Key of every wanted fit -> whether it stood in the store before.

    Raises:
        MissingArtifactError: labels, spans or activations are not there yet.
        PlanError: a split side would be empty.
    """
    keys = {fit_key(plan, site, setting, fit): fit for fit in wanted}
    lacking = {key: fit for key, fit in keys.items() if plan.store.adopt(key) is None}
    by_view: dict[View, dict[Fit, ArtifactKey]] = defaultdict(dict)
    for key, each in lacking.items():
        by_view[each.view][Fit(each.recipe, each.seed)] = key
    if lacking:
        bench = _Bench(plan, site, setting, tuple(lacking.values()))
        for view, fits in by_view.items():
            bench.make(view, fits)
    return {key: key not in lacking for key in keys}


def _commit_index(plan: Plan, site: Site, trial: Trial) -> tuple[Outcome, list[ArtifactKey]]:
    recipes = plan.study.fitted
    keys = [plan.fit(site, trial.setting, recipe, trial.seed) for recipe in recipes]

    def write(folder: Path) -> None:
        table = pl.DataFrame(
            {
                "recipe": [recipe.name for recipe in recipes],
                "target": [recipe.target for recipe in recipes],
                "scope": [key.partition[0] for key in keys],
                "fit": [key.partition[2] for key in keys],
                "fit_fingerprint": [key.fingerprint for key in keys],
            }
        )
        write_table(folder / "fits.parquet", table)

    provenance = {"site": str(site), "trial": str(trial)}
    return commit_once(plan, plan.probe_fits(site, trial), write, provenance, keys), keys


@dataclass(frozen=True)
class _Bench:
    """What one (site, setting) needs to fit what it lacks."""

    plan: Plan
    site: Site
    setting: str
    wanted: tuple[Wanted, ...]

    @cached_property
    def device(self) -> str:
        return str(pick_devices(self.plan.study.activations.device)[0])

    @cached_property
    def _data(self) -> ProbeData:
        recipes = [each.recipe for each in self.wanted]
        return read_probe_data(self.plan, self.site.model, self.setting, self.site, recipes)

    def design(self, view: View) -> Design:
        data = self._data
        if view.attention is not None:
            masses = read_attention(self.plan, self.site, self.setting)
            data = with_attention(data, variant_scores(masses, view.attention))
        data = take_rows(data, kept_rows(data, view))
        splits = self.plan.study.splits
        folds = folds_of(self.plan, self.site.model, self.setting, data.problems)
        return Design(data, tuple(folds), splits, self.plan.study.labels)

    def make(self, view: View, keys: Mapping[Fit, ArtifactKey]) -> None:
        """Commit fits of one view: those of a twin as they are, the others solved together."""
        plan, probes = self.plan, self.plan.study.probes
        design = self.design(view)
        contents = Contents(design, probes.precision)
        names = {fit: contents.of(fit) for fit in keys}
        rest = []
        for fit, key in keys.items():
            twin = find_twin(plan, self.site, self.setting, fit, view, names[fit])
            if twin is None:
                rest.append(fit)
            else:
                same = {"content_sha256": names[fit], "twin": str(twin.key)}
                self._commit(key, fit, partial(take_over, twin), same)
        for fit, result in fit_batches(
            design,
            rest,
            self.device,
            keep_probes=probes.keep == "probes",
            precision=probes.precision,
        ):
            write = partial(_write, result)
            self._commit(keys[fit], fit, write, {"content_sha256": names[fit]})

    def _commit(
        self, key: ArtifactKey, fit: Fit, write: Callable[[Path], None], more: Mapping[str, str]
    ) -> None:
        provenance = {
            "recipe": fit.recipe.name,
            "target": fit.recipe.target,
            "setting": self.setting,
            "seed": fit.seed if fit.recipe.is_stochastic else None,
            **more,
        }
        upstream = self.plan.fit_inputs(self.site, self.setting, fit.recipe)
        commit_once(self.plan, key, write, provenance, upstream)


def _write(result: RecipeFit, folder: Path) -> None:
    if result.probes:
        save_probes(folder, result.probes)
    write_table(folder / "scores.parquet", result.scores)
