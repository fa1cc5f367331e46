"""The stages of a sweep: fits of every configuration, what they reach, and who goes on.

A stage's cell fits the recipes that its configurations ask for at one site and setting, each
distinct fit once, has them measured by the evaluation, and keeps four tables: `configurations`,
`recipes`, and the evaluation's `problem_metrics` (the primary one) and `contrasts`. Shortlists and
boards are made of those of all cells. There is no registry beside the store: a configuration is
there if its fits are.

What does not belong here: what configurations there are, how they rank (`taprobe_core.sweep`).
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Any

import polars as pl

from taprobe_core.errors import ConfigError, TaprobeError, attempted
from taprobe_core.keys import Site, parse_site
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
from taprobe_core.store.fingerprint import canonical_json
from taprobe_core.study import Study, Sweep
from taprobe_core.study.targets import TargetFactors, target_settings

if TYPE_CHECKING:
    from taprobe_core.pipeline.fit import WantedFit
    from taprobe_core.sweep.recipes import Configuration, SweptRecipe
    from taprobe_core.sweep.recipes import Stage as SweepStage
    from taprobe_core.sweep.space import SweepSpace

Tables = Mapping[str, pl.DataFrame]
"""From `read_sweep`."""

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


def _fits_config(fields: Sequence[str], plan: Plan, cell: Cell) -> dict[str, Any]:
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
    """
    from taprobe_core.devices import side_by_side
    from taprobe_core.sweep.space import SweepSpace

    space = SweepSpace(_sweep(plan), plan.study)
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
    from taprobe_core.sweep.boards import configuration_table, recipe_table
    from taprobe_core.sweep.space import recipes_of

    start = time.monotonic()
    site, setting = parse_site(cell[0]), cell[1]
    swept = recipes_of(space, here)
    fits = [fit for each in swept.values() for fit in wanted_fits(plan.study, each)]
    done = ensure_fits(plan, site, setting, fits)
    if done.failed:
        return done.errors_of(done.failed)

    def compute() -> Files:
        return {
            "configurations": configuration_table(space, here),
            "recipes": recipe_table(space, here),
            **_evaluate(plan, site, setting, swept),
        }

    provenance = {"site": cell[0], "setting": setting, "n_configurations": len(here)}
    outcome = commit_cell(plan, stage, cell, compute, provenance, list(done.is_reused))
    is_reused = outcome.is_reused and not done.new
    return Outcome(outcome.artifact, is_reused, time.monotonic() - start)


def wanted_fits(study: Study, swept: SweptRecipe) -> list[WantedFit]:
    """Return the fits of a swept recipe: one per seed of the study, or one in all."""
    from taprobe_core.pipeline.fit import WantedFit

    recipe = swept.recipe
    # Labels that have dropped the last sentence have nothing left to drop.
    drops = swept.drop_last_sentence and not study.labels.drop_last_sentence
    seeds = study.seeds if recipe.is_stochastic else study.seeds[:1]
    return [WantedFit(recipe, seed, View(drops, swept.attention)) for seed in seeds]


_RECIPES_AT_ONCE = 32
"""Whose scores are read together: bounds memory."""


def _evaluate(
    plan: Plan, site: Site, setting: str, swept: Mapping[str, SweptRecipe]
) -> dict[str, pl.DataFrame]:
    """Measure recipes, and beside them the baselines that predict the same of the same rows."""
    from taprobe_core.tables import CONTRASTS, PROBLEM_METRICS, schema_of

    alike: dict[str, list[str]] = defaultdict(list)
    for name, each in swept.items():
        factors = [each.template.target, each.drop_last_sentence]
        factors += [getattr(each.template, setting) for setting in target_settings()]
        alike[canonical_json(factors)].append(name)
    metrics = schema_of(PROBLEM_METRICS)
    schema = {name: metrics[name] for name in metrics if not name.startswith("^")}
    units = [pl.DataFrame(schema=schema | {"primary": pl.Float64})]
    contrasts = [schema_of(CONTRASTS).to_frame()]
    for names in alike.values():
        plain = [name for name in names if swept[name].template.residualize == "none"]
        known = plan.study.evaluation.baselines
        baselines = [name for name in plain if swept[name].template.name in known]
        # What does not depend on the seed is measured once, unless it stands beside what does.
        rest = [name for name in names if name not in baselines]
        rest.sort(key=lambda name: swept[name].template.is_stochastic)
        chunks = [rest[at : at + _RECIPES_AT_ONCE] for at in range(0, len(rest), _RECIPES_AT_ONCE)]
        for own in filter(None, [baselines, *chunks]):
            wanted = {name: wanted_fits(plan.study, swept[name]) for name in (*baselines, *own)}
            measured, judged = _measure(plan, site, setting, wanted, baselines)
            units.append(measured.filter(pl.col("recipe").is_in(own)))
            contrasts.append(judged.filter(~pl.col("recipe").is_in(baselines)))
    by_unit = pl.concat([each.select(units[0].columns) for each in units])
    order = ["recipe", "protocol", "fold", "split", "seed", "problem_id"]
    return {"problem_metrics": by_unit.sort(order), "contrasts": pl.concat(contrasts)}


def _measure(
    plan: Plan,
    site: Site,
    setting: str,
    wanted: Mapping[str, Sequence[WantedFit]],
    baselines: Sequence[str],
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Have recipes of one target measured and judged, each by its seeds or its only one."""
    from taprobe_core.evaluation.blocks import make_blocks
    from taprobe_core.evaluation.contrasts import contrast_values
    from taprobe_core.evaluation.units import measure_units
    from taprobe_core.pipeline.fit import fit_key

    study, scores = plan.study, defaultdict[int, list[pl.DataFrame]](list)
    seeds = max(([fit.seed for fit in fits] for fits in wanted.values()), key=len)
    for fits in wanted.values():
        for fit in fits:
            table = plan.store.open(fit_key(plan, site, setting, fit)).read_table("scores.parquet")
            # Beside seeds, scores that do not depend on them stand for themselves in each.
            for seed in [fit.seed] if len(fits) > 1 else seeds:
                scores[seed].append(table)
    labels = plan.read("labels", (site.model, setting), "labels")
    if any(fits[0].view.drop_last_sentence for fits in wanted.values()):
        last = pl.col("sentence_idx").max().over("problem_id")
        labels = labels.filter(pl.col("sentence_idx") < last)
    scored = make_blocks({seed: pl.concat(scores[seed]) for seed in seeds}, labels)
    recipes = {name: fits[0].recipe for name, fits in wanted.items()}
    targets = {name: recipe.target or study.probes.target for name, recipe in recipes.items()}
    residualize = {name: recipe.residualize for name, recipe in recipes.items()}
    units = measure_units(scored, (), targets, residualize)
    contrasts = contrast_values(scored, units, tuple(baselines), targets)
    is_first = pl.col("seed") == study.seeds[0]
    repeats = [name for name, fits in wanted.items() if len(fits) == 1]
    return units.filter(is_first | ~pl.col("recipe").is_in(repeats)), contrasts


def _describe_fits(stage: str, plan: Plan, cell: Cell) -> Description:
    artifact = plan.open(stage, cell)
    metrics = {
        "n_configurations": artifact.read_table("configurations.parquet").height,
        "n_recipes": artifact.read_table("recipes.parquet")["recipe"].n_unique(),
        "n_fits": len(plan.part_keys(artifact.manifest)),
    }
    shown = unconverged(plan, artifact)
    n_rows = artifact.read_table("problem_metrics.parquet").height
    return Description(metrics | shown.metrics, n_rows, None, shown.tables)


def read_sweep(plan: Plan, stages: Sequence[str]) -> dict[str, pl.DataFrame]:
    """Read configurations, recipes, units (problem metrics) and contrasts of all cells of stages.

    Units and contrasts stand behind model, layer and setting.
    """
    found: dict[str, list[pl.DataFrame]] = defaultdict(list)
    for stage, setting, site in product(stages, plan.study.settings, plan.study.sites):
        cell = plan.open(stage, (str(site), setting))
        place = [
            pl.lit(site.model).alias("model"),
            pl.lit(site.layer, pl.Int64).alias("layer"),
            pl.lit(setting).alias("setting"),
        ]
        for name in ("configurations", "recipes"):
            found[name].append(cell.read_table(f"{name}.parquet"))
        for name, table in (("units", "problem_metrics"), ("contrasts", "contrasts")):
            found[name].append(cell.read_table(f"{table}.parquet").select(*place, pl.all()))
    return {name: pl.concat(parts) for name, parts in found.items()}


def _board(plan: Plan, tables: Tables) -> pl.DataFrame:
    from taprobe_core.sweep.boards import sweep_leaderboard

    rank_by = _sweep(plan).shortlists.rank_by
    return sweep_leaderboard(*_fitted(tables), protocol=_protocol(plan), rank_by=rank_by)


def _fitted(tables: Tables) -> tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame]:
    return tables["configurations"], tables["recipes"], tables["units"]


def _shortlist(stage: SweepStage, plan: Plan, tables: Tables) -> Files:
    from taprobe_core.sweep.shortlist import shortlist

    return {"shortlist": shortlist(_board(plan, tables), stage, _sweep(plan).shortlists)}


def _leaderboard(plan: Plan, tables: Tables) -> Files:
    from taprobe_core.sweep.shortlist import sweep_choices

    choices = sweep_choices(*_fitted(tables), protocol=_protocol(plan))
    return {"leaderboard": _board(plan, tables), "choices": choices}


def _paired_deltas(plan: Plan, tables: Tables) -> Files:
    from taprobe_core.sweep.boards import sweep_paired_deltas

    contrasts, evaluation = tables["contrasts"], plan.study.evaluation
    deltas = sweep_paired_deltas(
        *_fitted(tables), contrasts, protocol=_protocol(plan), evaluation=evaluation
    )
    return {"deltas": deltas}


def _stability(plan: Plan, tables: Tables) -> Files:
    from taprobe_core.sweep.stability import sweep_stability

    sweep = _sweep(plan)
    stability = sweep_stability(
        _board(plan, tables),
        tables["recipes"],
        tables["units"],
        protocol=_protocol(plan),
        n_draws=sweep.stability_draws,
        seed=sweep.stability_seed,
    )
    return {"stability": stability}


_SHOWN = 20


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
    columns = ["stage", "target", "rank", "kind", "model", "layer", "setting", "val_skill"]
    columns += ["test_skill", "metric", "test_value", "n_tried"]
    last = ranked.filter(pl.col("stage") == ranked["stage"].max()).head(10)
    label = pl.format("{} · {}@L{}", "kind", "model", "layer").alias("label")
    rows = last.select(label, "setting", value="test_skill")
    title = f"{plan.study.name}, last stage"
    picture = plots.leaderboard_bars(rows, metric="test skill", chance=0.0, title=title)
    tables = {"best": best.select(columns).head(_SHOWN)}
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
    rows = stability.filter(pl.col("rank_correlation").is_not_null())
    means = rows.group_by("source", maintain_order=True).agg(pl.col("rank_correlation").mean())
    metrics = {f"rank_correlation/{source}": value for source, value in means.iter_rows()}
    columns = ["stage", "target", "source", "n_configurations", "rank_correlation"]
    shown = rows.select(*columns, "p_winner_changes").head(40)
    return Description(present(metrics), stability.height, None, {"stability": shown})


_SWEPT = Condition(lambda study: study.sweep is not None, "give the study a `sweep`")


def _fits_stage(
    name: str, title: str, reads: tuple[str, ...], fields: Sequence[str]
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
            "problem_metrics": "PROBLEM_METRICS",
            "contrasts": "CONTRASTS",
        },
        asked_by=_SWEPT,
        op=f"fit_{name}",
        group="sweep",
        kinds=frozenset({"torch", "parquet"}),
    )


def _view(
    name: str,
    title: str,
    reads: tuple[str, ...],
    compute: Callable[[Plan, Tables], Files],
    describe: Callable[[Plan, Cell], Description],
    tables: Mapping[str, str],
) -> Stage[Plan]:
    """A stage of one artifact, made of the tables of all cells of the stages that it reads."""

    def make(plan: Plan, cell: Cell) -> Outcome:
        def tables_of() -> Files:
            return compute(plan, read_sweep(plan, reads))

        return commit_cell(plan, name, cell, tables_of, {"study": plan.study.name})

    def config(plan: Plan, cell: Cell) -> dict[str, Any]:
        found: dict[str, Any] = {"shortlists": _sweep(plan).shortlists.model_dump(mode="json")}
        if reads == _FITS:
            found["evaluation"] = plan.study.evaluation.model_dump(mode="json")
            found["sweep"] = _sweep(plan).model_dump(mode="json")
        return found

    return Stage(
        name=name,
        title=title,
        grid=(),
        reads=reads,
        code_version="2",
        config=config,
        make=cell_by_cell(make),
        describe=describe,
        tables=tables,
        asked_by=_SWEPT,
        op="publish_sweep" if reads == _FITS else name.replace("sweep_shortlist", "choose_sweep"),
        group="sweep",
    )


_READ = ("poolings", "residualized")
"""What the expansion of a configuration to recipes reads of the sweep."""

SWEEP: tuple[Stage[Plan], ...] = (
    _fits_stage(
        "sweep_stage1",
        "Every target, pooling and residualisation of the sweep, fitted and measured.",
        ("labels", "activations"),
        ("targets", "drop_last_sentence", "residualize", *TargetFactors.model_fields, *_READ),
    ),
    _view(
        "sweep_shortlist_stage2",
        "Configurations of stage 1 that go on, chosen on validation.",
        ("sweep_stage1",),
        partial(_shortlist, "stage1"),
        partial(_describe_shortlist, "sweep_shortlist_stage2"),
        {"shortlist": "SWEEP_SHORTLIST"},
    ),
    _fits_stage(
        "sweep_stage2",
        "The shortlisted configurations with every way to read attention.",
        ("sweep_shortlist_stage2", "labels", "activations", "vertical_attention"),
        ("attention", *_READ),
    ),
    _view(
        "sweep_shortlist_stage3",
        "Configurations of stage 2 that are tuned, chosen on validation.",
        ("sweep_stage2",),
        partial(_shortlist, "stage2"),
        partial(_describe_shortlist, "sweep_shortlist_stage3"),
        {"shortlist": "SWEEP_SHORTLIST"},
    ),
    _fits_stage(
        "sweep_stage3",
        "The finalists under every setting of their probe.",
        ("sweep_shortlist_stage3", "labels", "activations", "vertical_attention"),
        ("tuning", "attention", *_READ),
    ),
    _view(
        "sweep_leaderboard",
        "Every configuration of all stages, ranked on validation, with its test.",
        _FITS,
        _leaderboard,
        _describe_leaderboard,
        {"leaderboard": "SWEEP_LEADERBOARD", "choices": "SWEEP_CHOICES"},
    ),
    _view(
        "sweep_paired_deltas",
        "Configurations against position and text, paired over problems.",
        _FITS,
        _paired_deltas,
        _describe_deltas,
        {"deltas": "SWEEP_DELTAS"},
    ),
    _view(
        "sweep_stability",
        "How far the ranking depends on seeds, problems and settings.",
        _FITS,
        _stability,
        _describe_stability,
        {"stability": "SWEEP_STABILITY"},
    ),
)
