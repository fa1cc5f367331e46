"""Probe fits of any set of (site, trial) cells: each distinct fit once, in few batched solves.

What shares a feature matrix is done on one loaded matrix: cells are grouped by (site, setting), and
all that their trials lack goes into the solvers together. A fit is keyed by what it depends on, so
baselines are solved once for all sites of a model and deterministic recipes once for all seeds; it
is committed as soon as its solve is done, and a trial's artifact is an index of its fits. A setting
that repeats another's rows takes over its fits. A fit that fails costs itself, and the index of the
trials that want it.
"""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

from taprobe_core.attention.tables import variant_scores
from taprobe_core.checkpoints import pick_devices
from taprobe_core.errors import TaprobeError, attempted
from taprobe_core.keys import Site
from taprobe_core.pipeline.commit import commit_once
from taprobe_core.pipeline.fit_rows import WHOLE, View, kept_rows, take_rows, with_attention
from taprobe_core.pipeline.inputs import read_attention, read_probe_data
from taprobe_core.pipeline.plan import Plan
from taprobe_core.pipeline.skips import folds_of
from taprobe_core.probes import Contents, Design, Fit, RecipeFit, fit_each, save_probes
from taprobe_core.probes.features import ProbeData
from taprobe_core.store import Artifact, ArtifactKey, write_table
from taprobe_core.study import ProbeRecipe


class WantedFit(NamedTuple):
    """A fit that somebody asks for.

    Attributes:
        recipe: with its target filled in (`Study.recipes`).
        seed: of a stochastic recipe.
        view: which rows it sees, and how attention is scored.
    """

    recipe: ProbeRecipe
    seed: int
    view: View = WHOLE


class Fits(NamedTuple):
    """What became of the fits that were asked for.

    Attributes:
        is_reused: key of every fit that is there -> whether it stood in the store before.
        failed: key of every other -> its error.
    """

    is_reused: dict[ArtifactKey, bool]
    failed: dict[ArtifactKey, TaprobeError]

    @property
    def new(self) -> set[ArtifactKey]:
        """Keys of the fits that were made now."""
        return {key for key, is_reused in self.is_reused.items() if not is_reused}

    def errors_of(self, wanted: Iterable[ArtifactKey]) -> dict[str, TaprobeError]:
        """The errors of those of some fits that failed, by the name of their recipe."""
        return {
            f"recipe {key.partition[-1]}": self.failed[key] for key in wanted if key in self.failed
        }


def fit_key(plan: Plan, site: Site, setting: str, fit: WantedFit) -> ArtifactKey:
    """Key of a wanted fit at one site and setting."""
    return plan.fit(site, setting, fit.recipe, fit.seed, fit.view)


def ensure_fits(plan: Plan, site: Site, setting: str, wanted: Sequence[WantedFit]) -> Fits:
    """Fit what the store lacks of one (site, setting), each distinct fit once.

    Unlike other artifacts, fits are computed before the lock of their partition is taken, so two
    processes that want the same fits at the same time both compute them; one is kept.

    Args:
        plan: the plan.
        site: model and layer.
        setting: the setting.
        wanted: what to fit.
    """
    keys = {fit_key(plan, site, setting, fit): fit for fit in wanted}
    lacking = {key: fit for key, fit in keys.items() if plan.store.adopt(key) is None}
    failed = _fit(plan, site, setting, lacking) if lacking else {}
    return Fits({key: key not in lacking for key in keys if key not in failed}, failed)


def _fit(
    plan: Plan, site: Site, setting: str, lacking: Mapping[ArtifactKey, WantedFit]
) -> dict[ArtifactKey, TaprobeError]:
    """Commit fits of one (site, setting); return the errors of those that fail."""
    job = _FitJob(plan, site, setting, tuple(lacking.values()))
    data = attempted(lambda: job.data, f"data of {site}, {setting}")
    failed: dict[ArtifactKey, TaprobeError] = {}
    if isinstance(data, TaprobeError):
        by_reads: dict[object, dict[ArtifactKey, WantedFit]] = defaultdict(dict)
        for key, fit in lacking.items():
            looks = "vertical_attention" in fit.recipe.features
            by_reads[frozenset(fit.recipe.poolings_read), looks][key] = fit
        if len(by_reads) == 1:
            return dict.fromkeys(lacking, data)
        # What one recipe reads cannot be read; the others do without it.
        for part in by_reads.values():
            failed |= _fit(plan, site, setting, part)
        return failed
    by_view: dict[View, dict[Fit, ArtifactKey]] = defaultdict(dict)
    for key, each in lacking.items():
        by_view[each.view][Fit(each.recipe, each.seed)] = key
    for view, fits in by_view.items():
        failed |= {fits[fit]: error for fit, error in job.make(view, fits).items()}
    return failed


@dataclass(frozen=True)
class _FitJob:
    """What one (site, setting) needs to fit what it lacks."""

    plan: Plan
    site: Site
    setting: str
    wanted: tuple[WantedFit, ...]

    @cached_property
    def device(self) -> str:
        return str(pick_devices(self.plan.study.activations.device)[0])

    @cached_property
    def data(self) -> ProbeData:
        recipes = [each.recipe for each in self.wanted]
        return read_probe_data(self.plan, self.site.model, self.setting, self.site, recipes)

    def design(self, view: View) -> Design:
        data = self.data
        if view.attention is not None:
            masses = read_attention(self.plan, self.site, self.setting)
            data = with_attention(data, variant_scores(masses, view.attention))
        data = take_rows(data, kept_rows(data, view))
        splits = self.plan.study.splits
        folds = folds_of(self.plan, self.site.model, self.setting, data.problems)
        return Design(data, tuple(folds), splits, self.plan.study.labels)

    def make(self, view: View, keys: Mapping[Fit, ArtifactKey]) -> dict[Fit, TaprobeError]:
        """Commit fits of one view: equal ones of another setting as they are, the rest solved.

        Returns:
            The fits that fail, each with its error.
        """
        plan, probes = self.plan, self.plan.study.probes
        where = f"{self.site}, {self.setting}"
        design = attempted(lambda: self.design(view), where)
        if isinstance(design, TaprobeError):
            return dict.fromkeys(keys, design)
        contents = Contents(design, probes.precision)
        names: dict[Fit, str] = {}
        failed: dict[Fit, TaprobeError] = {}

        def is_there(fit: Fit) -> bool:
            names[fit] = contents.of(fit)
            equal = _find_equal(plan, self.site, self.setting, fit, view, names[fit])
            if equal is not None:
                kept = equal.manifest.provenance.get("not_converged", {})
                same = {"content_sha256": names[fit], "twin": str(equal.key), **_marked(kept)}
                self._commit(keys[fit], fit, partial(_take_over, equal), same)
            return equal is not None

        rest = []
        for fit in keys:
            there = attempted(partial(is_there, fit), f"{where}, recipe {fit.recipe.name}")
            if isinstance(there, TaprobeError):
                failed[fit] = there
            elif not there:
                rest.append(fit)
        for fit, result in fit_each(
            design,
            rest,
            self.device,
            keep_probes=probes.keep == "probes",
            precision=probes.precision,
        ):
            if isinstance(result, TaprobeError):
                failed[fit] = result
                continue
            commit = partial(
                self._commit,
                keys[fit],
                fit,
                partial(_write, result),
                {"content_sha256": names[fit], **_marked(result.not_converged)},
            )
            done = attempted(commit, f"{where}, recipe {fit.recipe.name}")
            if done is not None:
                failed[fit] = done
        return failed

    def _commit(
        self, key: ArtifactKey, fit: Fit, write: Callable[[Path], None], more: Mapping[str, Any]
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


def _marked(not_converged: Mapping[str, float]) -> dict[str, Any]:
    """What the provenance of a fit says of folds that did not converge; nothing of others."""
    return {"not_converged": dict(not_converged)} if not_converged else {}


def _write(result: RecipeFit, folder: Path) -> None:
    if result.probes:
        save_probes(folder, result.probes)
    write_table(folder / "scores.parquet", result.scores)


def _find_equal(
    plan: Plan, site: Site, setting: str, fit: Fit, view: View, content: str
) -> Artifact | None:
    """Return a stored fit of another setting of the study that saw the same; None without one.

    What a fit saw stands in its manifest (`probes.design`).

    Args:
        plan: the plan.
        site: model and layer of both.
        setting: that of the fit.
        fit: recipe and seed of both.
        view: rows and attention of both.
        content: `probes.Contents.of` the fit.
    """
    for other in plan.study.settings:
        if other == setting:
            continue
        found = plan.store.adopt(plan.fit(site, other, fit.recipe, fit.seed, view))
        if found is not None and found.manifest.provenance.get("content_sha256") == content:
            return found
    return None


def _take_over(equal: Artifact, folder: Path) -> None:
    """Copy the files of an equal fit into a folder.

    Raises:
        CorruptArtifactError: a file is not what its manifest says.
    """
    for name in equal.manifest.files:
        shutil.copyfile(equal.file(name), folder / name)
