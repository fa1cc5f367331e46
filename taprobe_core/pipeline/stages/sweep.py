"""The stages of a sweep: fits of every configuration, what they reach, and who goes on.

A stage's cell fits what its configurations ask for at one site and setting, each distinct fit once,
and keeps three tables: `configurations`, `recipes` and `results`. Shortlists and boards are made of
those of all cells. There is no registry beside the store: a configuration is there if its fits are.

What does not belong here: what configurations there are, how they rank (`taprobe_core.sweep`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import polars as pl

from taprobe_core.errors import ConfigError, TaprobeError, attempted
from taprobe_core.keys import parse_site
from taprobe_core.pipeline.commit import Files, commit_cell
from taprobe_core.pipeline.fit_rows import View
from taprobe_core.pipeline.grid import Cell
from taprobe_core.pipeline.plan import Plan
from taprobe_core.pipeline.stage import (
    Condition,
    Description,
    Made,
    Outcome,
    Stage,
    cell_by_cell,
    largest,
    present,
)
from taprobe_core.pipeline.stages.probe_fits import FITS, unconverged
from taprobe_core.study import Study, Sweep
from taprobe_core.study.targets import TargetFactors

if TYPE_CHECKING:
    from taprobe_core.pipeline.fit import WantedFit
    from taprobe_core.sweep import Configuration, SweepSpace, SweptRecipe

_FITS = ("sweep_stage1", "sweep_stage2", "sweep_stage3")
"""The stages that fit."""


def _sweep(plan: Plan) -> Sweep:
    if plan.study.sweep is None:
        raise ConfigError("no sweep", f"study {plan.study.name}", "add `sweep` to the study")
    return plan.study.sweep


def _protocol(plan: Plan) -> str:
    """The protocol whose validation problems decide."""
    known = plan.study.splits.protocols
    return _sweep(plan).shortlists.protocol or ("lopo" if "lopo" in known else known[0])


# --- fits of a stage's configurations at one site and setting


def _fits_config(fields: frozenset[str], plan: Plan, cell: Cell) -> dict[str, Any]:
    # The configurations of the later stages follow from a shortlist, whose key stands for them.
    study = plan.study
    return {
        "sweep": _sweep(plan).model_dump(mode="json", include=set(fields)),
        "recipes": [recipe.model_dump(mode="json") for recipe in study.recipes],
        "baselines": list(study.evaluation.baselines),
        "seeds": list(study.seeds),
        "folds": plan.folds_config(),
        "keep": study.probes.keep,
        **plan.precision_config(),
    }


def _make_fits(stage: str, plan: Plan, cells: Sequence[Cell]) -> Iterator[tuple[Cell, Made]]:
    """Fit what a stage asks for at each cell, and measure it.

    Tables are empty where no configuration of the stage stands at the cell. A recipe that fails
    leaves the other fits of its cell committed.

    Raises:
        MissingArtifactError: the shortlist is not there yet.
    """
    from taprobe_core.devices import side_by_side
    from taprobe_core.sweep import sweep_space

    space = sweep_space(_sweep(plan), plan.study)
    configurations = _configurations(plan, space, stage)

    def fit(cell: Cell) -> Made:
        site, setting = parse_site(cell[0]), cell[1]
        place = (site.model, site.layer, setting)
        here = [each for each in configurations if (each.model, each.layer, each.setting) == place]
        make = partial(_make_cell, plan, stage, cell, space, here)
        return attempted(make, f"{stage} {'/'.join(cell)}")

    yield from zip(cells, side_by_side(fit, cells), strict=True)


def _configurations(plan: Plan, space: SweepSpace, stage: str) -> tuple[Configuration, ...]:
    if stage == "sweep_stage1":
        return space.stage1()
    if stage == "sweep_stage2":
        return space.stage2(plan.read("sweep_shortlist_stage2", (), "shortlist"))
    return space.stage3(plan.read("sweep_shortlist_stage3", (), "shortlist"))


def _make_cell(
    plan: Plan, stage: str, cell: Cell, space: SweepSpace, here: Sequence[Configuration]
) -> Outcome | dict[str, TaprobeError]:
    from taprobe_core.pipeline.fit import ensure_fits
    from taprobe_core.sweep import configuration_table, recipe_table, uses_of

    start = time.monotonic()
    site, setting = parse_site(cell[0]), cell[1]
    swept = {use.swept.name: use.swept for each in here for use in uses_of(space, each)}
    wanted = {name: wanted_fits(plan.study, recipe) for name, recipe in swept.items()}
    done = ensure_fits(plan, site, setting, [fit for fits in wanted.values() for fit in fits])
    if done.failed:
        return done.errors_of(done.failed)

    def compute() -> Files:
        from taprobe_core.pipeline.stages.sweep_results import measure_fits

        return {
            "configurations": configuration_table(space, here),
            "recipes": recipe_table(space, here),
            "results": measure_fits(plan, site, setting, wanted),
        }

    provenance = {"site": cell[0], "setting": setting, "n_configurations": len(here)}
    outcome = commit_cell(plan, stage, cell, compute, provenance, list(done.is_reused))
    is_reused = outcome.is_reused and not done.new
    return Outcome(outcome.artifact, is_reused, time.monotonic() - start)


def wanted_fits(study: Study, swept: SweptRecipe) -> list[WantedFit]:
    """Return the fits of a swept recipe: one per seed, or one in all.

    Args:
        study: whose seeds and labels they have.
        swept: a recipe of its sweep.
    """
    from taprobe_core.pipeline.fit import WantedFit

    recipe = swept.recipe
    # Labels that have dropped the last sentence have nothing left to drop.
    drops = swept.drop_last_sentence and not study.labels.drop_last_sentence
    seeds = study.seeds if recipe.is_stochastic else study.seeds[:1]
    return [WantedFit(recipe, seed, View(drops, swept.attention)) for seed in seeds]


def _describe_fits(stage: str, plan: Plan, cell: Cell) -> Description:
    artifact = plan.open(stage, cell)
    results = artifact.read_table("results.parquet")
    configurations = artifact.read_table("configurations.parquet")
    recipes = artifact.read_table("recipes.parquet")
    metrics = {
        "n_configurations": configurations.height,
        "n_recipes": recipes["recipe"].n_unique(),
        "n_fits": len(plan.part_keys(artifact.manifest)),
    }
    shown = unconverged(plan, artifact)
    return Description(metrics | shown.metrics, results.height, None, shown.tables)


# --- what follows from the cells of a stage, or of all


def read_sweep(plan: Plan, stages: Sequence[str]) -> dict[str, pl.DataFrame]:
    """Read the tables of all cells of some stages.

    Returns:
        `configurations`, `recipes` and `results`.

    Raises:
        MissingArtifactError: a cell is not there yet.
    """
    cells = [
        plan.open(stage, (str(site), setting))
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


def _board(plan: Plan, tables: Mapping[str, pl.DataFrame]) -> pl.DataFrame:
    from taprobe_core.sweep import sweep_leaderboard

    return sweep_leaderboard(
        tables["configurations"],
        tables["recipes"],
        tables["results"],
        protocol=_protocol(plan),
        rank_by=_sweep(plan).shortlists.rank_by,
    )


def _make_shortlist(stage: str, before: str, plan: Plan, cell: Cell) -> Outcome:
    """Choose the configurations that go on from the stage before, commit.

    Raises:
        MissingArtifactError: a cell of the stage before is not there yet.
        NotEnoughDataError: no configuration has a rank.
    """
    shortlists = _sweep(plan).shortlists

    def compute() -> Files:
        from taprobe_core import sweep

        is_first = before == "sweep_stage1"
        choose = sweep.shortlist_stage2 if is_first else sweep.shortlist_stage3
        return {"shortlist": choose(_board(plan, read_sweep(plan, [before])), shortlists)}

    provenance = {"study": plan.study.name, "rank_by": shortlists.rank_by}
    return commit_cell(plan, stage, cell, compute, provenance)


def _describe_shortlist(stage: str, plan: Plan, cell: Cell) -> Description:
    shortlist = plan.read(stage, cell, "shortlist")
    metrics = {
        "n_shortlisted": shortlist.height,
        "n_tried": int(shortlist.unique("target")["n_tried"].sum()),
        "best_score": largest(shortlist["score"]),
    }
    columns = ["rank", "target", "target_rank", "score", "kind", "config_id"]
    tables = {"shortlist": shortlist.select(columns).head(_SHOWN)}
    return Description(present(metrics), shortlist.height, None, tables)


def _make_table(
    stage: str, compute: Callable[[Plan], dict[str, pl.DataFrame]], plan: Plan, cell: Cell
) -> Outcome:
    """Make a table over all stages, commit.

    Raises:
        MissingArtifactError: a cell of a stage is not there yet.
    """
    return commit_cell(plan, stage, cell, lambda: compute(plan), {"study": plan.study.name})


def _leaderboard(plan: Plan) -> dict[str, pl.DataFrame]:
    from taprobe_core.sweep import sweep_choices

    tables = read_sweep(plan, _FITS)
    choices = sweep_choices(
        tables["configurations"], tables["recipes"], tables["results"], protocol=_protocol(plan)
    )
    return {"leaderboard": _board(plan, tables), "choices": choices}


def _paired_deltas(plan: Plan) -> dict[str, pl.DataFrame]:
    from taprobe_core.sweep import sweep_paired_deltas

    tables = read_sweep(plan, _FITS)
    deltas = sweep_paired_deltas(
        tables["configurations"],
        tables["recipes"],
        tables["results"],
        evaluation=plan.study.evaluation,
        protocol=_protocol(plan),
    )
    return {"deltas": deltas}


def _stability(plan: Plan) -> dict[str, pl.DataFrame]:
    from taprobe_core.sweep import sweep_stability

    tables = read_sweep(plan, _FITS)
    sweep = _sweep(plan)
    stability = sweep_stability(
        _board(plan, tables),
        tables["results"],
        protocol=_protocol(plan),
        n_draws=sweep.stability_draws,
        seed=sweep.stability_seed,
    )
    return {"stability": stability}


_SHOWN = 20


def _describe_leaderboard(plan: Plan, cell: Cell) -> Description:
    """The best of each target on validation, and its test."""
    from taprobe_core.report import plots

    board = plan.read("sweep_leaderboard", cell, "leaderboard")
    ranked = board.filter(pl.col("rank").is_not_null())
    best = ranked.filter(pl.col("rank") == 1).sort("stage", "target")
    metrics: dict[str, float | None] = {
        "n_configurations": board.height,
        "n_missing": int((board["status"] == "missing").sum()),
    }
    for row in best.iter_rows(named=True):
        metrics[f"val_skill/{row['stage']}/{row['target']}"] = row["val_skill"]
        metrics[f"test_skill/{row['stage']}/{row['target']}"] = row["test_skill"]
    columns = ["stage", "target", "rank", "kind", "model", "layer", "setting"]
    numbers = ["val_skill", "test_skill", "metric", "test_value", "n_tried"]
    tables = {"best": best.select(*columns, *numbers).head(_SHOWN)}
    last = ranked.filter(pl.col("stage") == ranked["stage"].max()).head(10)
    picture = plots.leaderboard_bars(
        last.select(
            pl.format("{} · {}@L{}", "kind", "model", "layer").alias("label"),
            pl.col("test_skill").alias("value"),
            *(pl.col(name) for name in ("setting",)),
        ),
        metric="test skill",
        chance=0.0,
        title=f"{plan.study.name}, last stage",
    )
    return Description(present(metrics), board.height, plots.to_data_uri(picture), tables)


def _describe_deltas(plan: Plan, cell: Cell) -> Description:
    """How many configurations beat their baselines once all tests are counted."""
    deltas = plan.read("sweep_paired_deltas", cell, "deltas")
    metrics: dict[str, float | None] = {"n_comparisons": deltas.height}
    for (baseline,), rows in deltas.group_by("baseline", maintain_order=True):
        is_better = (rows["delta"] > 0) & (rows["p_holm"] < 0.05)
        metrics[f"n_better_holm/{baseline}"] = int(is_better.sum())
        metrics[f"largest_delta/{baseline}"] = largest(rows["delta"])
    return Description(present(metrics), deltas.height)


def _describe_stability(plan: Plan, cell: Cell) -> Description:
    """How far the ranking holds when seeds, problems or settings change."""
    stability = plan.read("sweep_stability", cell, "stability")
    columns = ["stage", "target", "source", "n_configurations", "rank_correlation"]
    rows = stability.select(*columns, "p_winner_changes").filter(
        pl.col("rank_correlation").is_not_null()
    )
    metrics = {
        f"rank_correlation/{row['source']}": row["rank_correlation"]
        for row in rows.group_by("source", maintain_order=True)
        .agg(pl.col("rank_correlation").mean())
        .iter_rows(named=True)
    }
    return Description(present(metrics), stability.height, None, {"stability": rows.head(40)})


# --- the stages

_SWEPT = Condition(lambda study: study.sweep is not None, "give the study a `sweep`")


def _fits_stage(
    name: str, title: str, reads: tuple[str, ...], fields: frozenset[str]
) -> Stage[Plan]:
    """A stage that fits; `fields` of the sweep decide its configurations, beside its shortlist."""
    return Stage(
        name=name,
        title=title,
        grid=("site", "setting"),
        # The spans are in the key of the activations.
        reads=reads,
        code_version="2",
        config=partial(_fits_config, fields),
        part=FITS,
        make=partial(_make_fits, name),
        describe=partial(_describe_fits, name),
        tables={
            "configurations": "SWEEP_CONFIGURATIONS",
            "recipes": "SWEEP_RECIPES",
            "results": "SWEEP_RESULTS",
        },
        asked_by=_SWEPT,
        op=f"fit_{name}",
        group="sweep",
        kinds=frozenset({"torch", "parquet"}),
    )


def _shortlist_stage(name: str, title: str, before: str) -> Stage[Plan]:
    return Stage(
        name=name,
        title=title,
        grid=(),
        reads=(before,),
        code_version="1",
        config=lambda plan, cell: {"shortlists": _sweep(plan).shortlists.model_dump(mode="json")},
        make=cell_by_cell(partial(_make_shortlist, name, before)),
        describe=partial(_describe_shortlist, name),
        tables={"shortlist": "SWEEP_SHORTLIST"},
        asked_by=_SWEPT,
        op=name.replace("sweep_shortlist", "choose_sweep"),
        group="sweep",
    )


def _table_stage(
    name: str,
    title: str,
    tables: Mapping[str, str],
    compute: Callable[[Plan], dict[str, pl.DataFrame]],
    describe: Callable[[Plan, Cell], Description],
) -> Stage[Plan]:
    return Stage(
        name=name,
        title=title,
        grid=(),
        reads=_FITS,
        code_version="1",
        config=lambda plan, cell: {
            "evaluation": plan.study.evaluation.model_dump(mode="json"),
            "sweep": _sweep(plan).model_dump(mode="json"),
        },
        make=cell_by_cell(partial(_make_table, name, compute)),
        describe=describe,
        tables=tables,
        asked_by=_SWEPT,
        op="publish_sweep",
        group="sweep",
    )


SWEEP: tuple[Stage[Plan], ...] = (
    _fits_stage(
        "sweep_stage1",
        "Every target, pooling and residualisation of the sweep, fitted and measured.",
        ("labels", "activations"),
        frozenset(
            {
                "targets",
                *TargetFactors.model_fields,
                "drop_last_sentence",
                "poolings",
                "residualize",
                "residualized",
            }
        ),
    ),
    _shortlist_stage(
        "sweep_shortlist_stage2",
        "Configurations of stage 1 that go on, chosen on validation.",
        "sweep_stage1",
    ),
    _fits_stage(
        "sweep_stage2",
        "The shortlisted configurations with every way to read attention.",
        ("sweep_shortlist_stage2", "labels", "activations", "vertical_attention"),
        frozenset({"attention", "poolings", "residualized"}),
    ),
    _shortlist_stage(
        "sweep_shortlist_stage3",
        "Configurations of stage 2 that are tuned, chosen on validation.",
        "sweep_stage2",
    ),
    _fits_stage(
        "sweep_stage3",
        "The finalists under every setting of their probe.",
        ("sweep_shortlist_stage3", "labels", "activations", "vertical_attention"),
        frozenset({"tuning", "attention", "poolings", "residualized"}),
    ),
    _table_stage(
        "sweep_leaderboard",
        "Every configuration of all stages, ranked on validation, with its test.",
        {"leaderboard": "SWEEP_LEADERBOARD", "choices": "SWEEP_CHOICES"},
        _leaderboard,
        _describe_leaderboard,
    ),
    _table_stage(
        "sweep_paired_deltas",
        "Configurations against position and text, paired over problems.",
        {"deltas": "SWEEP_DELTAS"},
        _paired_deltas,
        _describe_deltas,
    ),
    _table_stage(
        "sweep_stability",
        "How far the ranking depends on seeds, problems and settings.",
        {"stability": "SWEEP_STABILITY"},
        _stability,
        _describe_stability,
    ),
)
