"""The stages of a sweep: fits of every configuration, what they reach, and who goes on.

A stage's cell fits what its configurations ask for at one site and setting, each distinct fit once,
and keeps three tables: `configurations`, `recipes` and `results`. Shortlists and boards are made of
those of all cells. There is no registry beside the store: a configuration is there if its fits are.

What does not belong here: what configurations there are, how they rank (`taprobe_core.sweep`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import polars as pl

from taprobe_core.errors import ConfigError, TaprobeError, attempted
from taprobe_core.keys import Site, parse_site
from taprobe_core.pipeline.failures import Failure, failure_of
from taprobe_core.pipeline.fit import Wanted, ensure_fits
from taprobe_core.pipeline.measure import measure_fits
from taprobe_core.pipeline.outcome import Outcome, commit_once
from taprobe_core.pipeline.plan import Plan
from taprobe_core.pipeline.view import View
from taprobe_core.probes.threads import side_by_side
from taprobe_core.store import ArtifactKey, write_table
from taprobe_core.study import Study, Sweep
from taprobe_core.sweep import (
    Configuration,
    SweepSpace,
    SweptRecipe,
    configuration_table,
    recipe_table,
    shortlist_stage2,
    shortlist_stage3,
    sweep_choices,
    sweep_leaderboard,
    sweep_paired_deltas,
    sweep_space,
    sweep_stability,
    uses_of,
)
from taprobe_core.tables import SWEEP_STAGES


def ensure_sweep_fits(
    plan: Plan, stage: str, cells: Sequence[tuple[Site, str]]
) -> Iterator[Outcome | Failure]:
    """Fit what one stage of the sweep asks for at each cell, and measure it.

    Args:
        plan: the plan, of a study with a sweep.
        stage: `stage1`, `stage2` or `stage3`.
        cells: (site, setting) pairs.

    Yields:
        One outcome per cell: tables `configurations`, `recipes` and `results`
        (`tables.SWEEP_RESULTS`); empty where no configuration of the stage stands. A cell of
        which a fit fails is not there, and its failure names the recipe; its other fits are.

    Raises:
        MissingArtifactError: the shortlist is not there yet.
    """
    space = sweep_space(_sweep(plan), plan.study)
    configurations = _configurations(plan, space, stage)

    def fit(cell: tuple[Site, str]) -> Outcome | Failure:
        site, setting = cell
        place = (site.model, site.layer, setting)
        here = [each for each in configurations if (each.model, each.layer, each.setting) == place]
        named = (str(site), setting)
        made = attempted(
            lambda: _ensure_cell(plan, plan.sweep_fits(stage, site, setting), space, here),
            f"sweep_{stage} {'/'.join(named)}",
        )
        return failure_of(f"sweep_{stage}", named, made) if isinstance(made, TaprobeError) else made

    yield from side_by_side(fit, cells)


def _ensure_cell(
    plan: Plan, key: ArtifactKey, space: SweepSpace, configurations: Sequence[Configuration]
) -> Outcome | Failure:
    start = time.monotonic()
    site, setting = parse_site(key.partition[0]), key.partition[1]
    swept = {use.swept.name: use.swept for each in configurations for use in uses_of(space, each)}
    wanted = {name: wanted_fits(plan.study, recipe) for name, recipe in swept.items()}
    done = ensure_fits(plan, site, setting, [fit for fits in wanted.values() for fit in fits])
    failure = done.failure(key.stage, key.partition, done.failed)
    if failure is not None:
        return failure

    def write(folder: Path) -> None:
        tables = {
            "configurations": configuration_table(space, configurations),
            "recipes": recipe_table(space, configurations),
            "results": measure_fits(plan, site, setting, wanted),
        }
        for name, table in tables.items():
            write_table(folder / f"{name}.parquet", table)

    provenance = {
        "site": str(site),
        "setting": setting,
        "n_configurations": len(configurations),
    }
    outcome = commit_once(plan, key, write, provenance, list(done.is_reused))
    is_reused = outcome.is_reused and not done.new
    return Outcome(outcome.artifact, is_reused, time.monotonic() - start)


def read_sweep(plan: Plan, stages: Sequence[str]) -> dict[str, pl.DataFrame]:
    """Read the tables of all cells of some stages.

    Returns:
        `configurations`, `recipes` and `results`.

    Raises:
        MissingArtifactError: a cell is not there yet.
    """
    cells = [
        plan.store.open(plan.sweep_fits(stage, site, setting))
        for stage in stages
        for setting in plan.study.settings
        for site in plan.study.sites
    ]
    tables = {
        name: pl.concat(cell.read_table(f"{name}.parquet") for cell in cells)
        for name in ("configurations", "recipes", "results")
    }
    # A fit that several stages ask for is measured in each; the rows are equal.
    return {**tables, "results": tables["results"].unique(maintain_order=True)}


def ensure_sweep_shortlist(plan: Plan, stage: str) -> Outcome:
    """Choose the configurations that go on to `stage2` or `stage3`: table `shortlist`.

    Raises:
        MissingArtifactError: a cell of the stage before is not there yet.
        NotEnoughDataError: no configuration has a rank.
    """
    before, choose = {
        "stage2": ("stage1", shortlist_stage2),
        "stage3": ("stage2", shortlist_stage3),
    }[stage]
    sweep = _sweep(plan)

    def write(folder: Path) -> None:
        board = _board(plan, read_sweep(plan, [before]))
        write_table(folder / "shortlist.parquet", choose(board, sweep.shortlists))

    return commit_once(
        plan,
        plan.sweep_shortlist(stage),
        write,
        {"study": plan.study.name, "rank_by": sweep.shortlists.rank_by},
        _cells(plan, [before]),
    )


def ensure_sweep_table(plan: Plan, name: str) -> Outcome:
    """Make a table over all stages: `sweep_leaderboard`, `sweep_paired_deltas`, `sweep_stability`.

    Raises:
        MissingArtifactError: a cell of a stage is not there yet.
    """

    def write(folder: Path) -> None:
        for table, frame in _MAKE[name](plan).items():
            write_table(folder / f"{table}.parquet", frame)

    return commit_once(
        plan, plan.sweep_table(name), write, {"study": plan.study.name}, _cells(plan, SWEEP_STAGES)
    )


def _sweep(plan: Plan) -> Sweep:
    if plan.study.sweep is None:
        raise ConfigError("no sweep", f"study {plan.study.name}", "add `sweep` to the study")
    return plan.study.sweep


def _protocol(plan: Plan) -> str:
    """The protocol whose validation problems decide."""
    known = plan.study.splits.protocols
    return _sweep(plan).shortlists.protocol or ("lopo" if "lopo" in known else known[0])


def _cells(plan: Plan, stages: Sequence[str]) -> list[ArtifactKey]:
    return [
        plan.sweep_fits(stage, site, setting)
        for stage in stages
        for site in plan.study.sites
        for setting in plan.study.settings
    ]


def _configurations(plan: Plan, space: SweepSpace, stage: str) -> tuple[Configuration, ...]:
    if stage == "stage1":
        return space.stage1()
    shortlist = plan.store.open(plan.sweep_shortlist(stage)).read_table("shortlist.parquet")
    return space.stage2(shortlist) if stage == "stage2" else space.stage3(shortlist)


def wanted_fits(study: Study, swept: SweptRecipe) -> list[Wanted]:
    """Return the fits of a swept recipe: one per seed, or one in all.

    Args:
        study: whose seeds and labels they have.
        swept: a recipe of its sweep.
    """
    recipe = swept.recipe
    # Labels that have dropped the last sentence have nothing left to drop.
    drops = swept.drop_last_sentence and not study.labels.drop_last_sentence
    seeds = study.seeds if recipe.is_stochastic else study.seeds[:1]
    return [Wanted(recipe, seed, View(drops, swept.attention)) for seed in seeds]


def _board(plan: Plan, tables: Mapping[str, pl.DataFrame]) -> pl.DataFrame:
    return sweep_leaderboard(
        tables["configurations"],
        tables["recipes"],
        tables["results"],
        protocol=_protocol(plan),
        rank_by=_sweep(plan).shortlists.rank_by,
    )


def _leaderboard(plan: Plan) -> dict[str, pl.DataFrame]:
    tables = read_sweep(plan, SWEEP_STAGES)
    choices = sweep_choices(
        tables["configurations"], tables["recipes"], tables["results"], protocol=_protocol(plan)
    )
    return {"leaderboard": _board(plan, tables), "choices": choices}


def _paired_deltas(plan: Plan) -> dict[str, pl.DataFrame]:
    tables = read_sweep(plan, SWEEP_STAGES)
    deltas = sweep_paired_deltas(
        tables["configurations"],
        tables["recipes"],
        tables["results"],
        evaluation=plan.study.evaluation,
        protocol=_protocol(plan),
    )
    return {"deltas": deltas}


def _stability(plan: Plan) -> dict[str, pl.DataFrame]:
    tables = read_sweep(plan, SWEEP_STAGES)
    sweep = _sweep(plan)
    stability = sweep_stability(
        _board(plan, tables),
        tables["results"],
        protocol=_protocol(plan),
        n_draws=sweep.stability_draws,
        seed=sweep.stability_seed,
    )
    return {"stability": stability}


_MAKE: Mapping[str, Callable[[Plan], dict[str, pl.DataFrame]]] = {
    "sweep_leaderboard": _leaderboard,
    "sweep_paired_deltas": _paired_deltas,
    "sweep_stability": _stability,
}
