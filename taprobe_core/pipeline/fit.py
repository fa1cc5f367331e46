"""Probe fits of any set of (site, trial) cells: each distinct fit once, each committed at once.

What shares a feature matrix is done on one loaded matrix: cells are grouped by (site, setting).
A fit is keyed by what it depends on, so baselines are solved once for all sites of a model and
deterministic recipes once for all seeds; a trial's artifact is an index of its fits.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import polars as pl
import torch

from taprobe_core.activations.shards import ACTIVATIONS_FILE
from taprobe_core.errors import ConfigError
from taprobe_core.features import ProbeData, join_features
from taprobe_core.keys import Site, Trial
from taprobe_core.pipeline.outcome import Outcome, commit_once
from taprobe_core.pipeline.plan import Plan
from taprobe_core.probes import fit_recipe, save_probes
from taprobe_core.splits import make_folds
from taprobe_core.store import ArtifactKey, write_table
from taprobe_core.study import Pooling, ProbeRecipe


def read_shards(
    plan: Plan, site: Site, setting: str
) -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
    """Read one site and setting's activations, one problem at a time.

    Yields:
        problem id, and the tensors of its shard by pooling (`activations.ActivationShard`), in the
        number type they are stored in, on the CPU.

    Raises:
        MissingArtifactError: they are not extracted yet.
        CorruptArtifactError: a shard differs from its manifest.
    """
    index = plan.store.open(plan.activations(site, setting)).read_table("shards.parquet")
    for problem_id, shard in index.select("problem_id", "shard_fingerprint").iter_rows():
        partition = (str(site), setting, f"problem_{problem_id}")
        artifact = plan.store.open(ArtifactKey("activation_shards", partition, shard))
        yield problem_id, artifact.read_tensors(ACTIVATIONS_FILE)


def read_activations(
    plan: Plan, site: Site, setting: str, pooling: Pooling = "mean"
) -> dict[int, np.ndarray]:
    """Read one pooling of one site and setting's activations.

    Returns:
        problem id -> [sentence, d_model], float32, in sentence order; for `tokens` [token, d_model]
        of all sentences.

    Raises:
        ConfigError: the study does not keep this pooling.
        MissingArtifactError: they are not extracted yet.
        CorruptArtifactError: a shard differs from its manifest.
    """
    kept = plan.study.activations.poolings
    if pooling not in kept:
        raise ConfigError(
            f"no pooling {pooling!r}",
            f"study {plan.study.name}, activations.poolings",
            f"add it there, or use one of {', '.join(kept)}",
        )
    return {
        problem_id: tensors[pooling].float().numpy()
        for problem_id, tensors in read_shards(plan, site, setting)
    }


def read_probe_data(plan: Plan, model: str, setting: str, site: Site | None) -> ProbeData:
    """Join labels, spans, sentences and, for a site, its activations into one matrix set.

    Raises:
        MissingArtifactError: an upstream artifact is not there yet.
    """
    return join_features(
        plan.store.open(plan.labels(model, setting)).read_table("labels.parquet"),
        plan.store.open(plan.spans(model, setting)).read_table("spans.parquet"),
        plan.store.open(plan.rollouts(model, setting)).read_table("sentences.parquet"),
        None if site is None else read_activations(plan, site, setting),
    )


def read_scores(plan: Plan, site: Site, trial: Trial) -> pl.DataFrame:
    """Read the scores of every recipe of one site and trial (`tables.SCORES`)."""
    fits = [
        plan.fit(site, trial.setting, recipe, trial.seed) for recipe in plan.study.probes.recipes
    ]
    return pl.concat([plan.store.open(key).read_table("scores.parquet") for key in fits])


class _Bench:
    """One (site, setting): its features, read only when a fit really needs them."""

    def __init__(self, plan: Plan, site: Site, setting: str) -> None:
        self._plan, self._site, self._setting = plan, site, setting

    @cached_property
    def with_activations(self) -> ProbeData:
        return read_probe_data(self._plan, self._site.model, self._setting, self._site)

    @cached_property
    def without_activations(self) -> ProbeData:
        return read_probe_data(self._plan, self._site.model, self._setting, None)

    def data(self, recipe: ProbeRecipe) -> ProbeData:
        return self.with_activations if recipe.reads_activations else self.without_activations


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
    for (site, setting), trials in groups.items():
        bench = _Bench(plan, site, setting)
        for trial in trials:
            yield _ensure_cell(plan, site, trial, bench)


def _ensure_cell(plan: Plan, site: Site, trial: Trial, bench: _Bench) -> Outcome:
    recipes = plan.study.probes.recipes
    outcomes = [_ensure_fit(plan, site, trial, recipe, bench) for recipe in recipes]

    def write(folder: Path) -> None:
        table = pl.DataFrame(
            {
                "recipe": [recipe.name for recipe in recipes],
                "scope": [outcome.key.partition[0] for outcome in outcomes],
                "fit": [outcome.key.partition[2] for outcome in outcomes],
                "fit_fingerprint": [outcome.key.fingerprint for outcome in outcomes],
            }
        )
        write_table(folder / "fits.parquet", table)

    outcome = commit_once(
        plan,
        plan.probe_fits(site, trial),
        write,
        {"site": str(site), "trial": str(trial), "target": plan.study.probes.target},
        [outcome.key for outcome in outcomes],
    )
    return Outcome(
        outcome.artifact,
        all(each.is_reused for each in (outcome, *outcomes)),
        sum(each.duration_s for each in (outcome, *outcomes)),
    )


def _ensure_fit(
    plan: Plan, site: Site, trial: Trial, recipe: ProbeRecipe, bench: _Bench
) -> Outcome:
    setting = trial.setting
    upstream = [plan.labels(site.model, setting), plan.spans(site.model, setting)]
    if recipe.reads_activations:
        upstream.append(plan.activations(site, setting))

    def write(folder: Path) -> None:
        data = bench.data(recipe)
        folds = make_folds(data.problems, plan.study.splits)
        fit = fit_recipe(recipe, plan.study.probes.target, data, folds, trial.seed)
        save_probes(folder, fit)
        write_table(folder / "scores.parquet", fit.scores)

    provenance = {"recipe": recipe.name, "target": plan.study.probes.target, "setting": setting}
    return commit_once(
        plan, plan.fit(site, setting, recipe, trial.seed), write, provenance, upstream
    )
