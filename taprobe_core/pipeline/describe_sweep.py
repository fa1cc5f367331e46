"""What to show of a sweep: how much is there, who leads, who goes on, and how sure that is."""

from __future__ import annotations

import polars as pl

from taprobe_core import plots
from taprobe_core.keys import parse_site
from taprobe_core.pipeline.cells import Cell
from taprobe_core.pipeline.description import Description, largest, present
from taprobe_core.pipeline.plan import Plan

_SHOWN = 20


def describe_sweep_stage(plan: Plan, stage: str, cell: Cell) -> Description:
    """Describe what one stage found at one site and setting."""
    artifact = plan.store.open(plan.sweep_fits(stage, parse_site(cell[0]), cell[1]))
    results = artifact.read_table("results.parquet")
    configurations = artifact.read_table("configurations.parquet")
    recipes = artifact.read_table("recipes.parquet")
    metrics = {
        "n_configurations": configurations.height,
        "n_recipes": recipes["recipe"].n_unique(),
        "n_fits": sum(key.stage == "fits" for key in artifact.manifest.upstream_keys),
    }
    return Description(metrics, results.height)


def describe_sweep_shortlist(plan: Plan, stage: str) -> Description:
    """Describe who goes on to a stage."""
    shortlist = plan.store.open(plan.sweep_shortlist(stage)).read_table("shortlist.parquet")
    metrics = {
        "n_shortlisted": shortlist.height,
        "n_tried": int(shortlist.unique("target")["n_tried"].sum()),
        "best_score": largest(shortlist["score"]),
    }
    columns = ["rank", "target", "target_rank", "score", "kind", "config_id"]
    tables = {"shortlist": shortlist.select(columns).head(_SHOWN)}
    return Description(present(metrics), shortlist.height, None, tables)


def describe_sweep_leaderboard(plan: Plan, _: Cell) -> Description:
    """Describe the ranking of all stages: the best of each target on validation, and its test."""
    key = plan.sweep_table("sweep_leaderboard")
    board = plan.store.open(key).read_table("leaderboard.parquet")
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


def describe_sweep_deltas(plan: Plan, _: Cell) -> Description:
    """Describe how many configurations beat their baselines once all tests are counted."""
    key = plan.sweep_table("sweep_paired_deltas")
    deltas = plan.store.open(key).read_table("deltas.parquet")
    metrics: dict[str, float | None] = {"n_comparisons": deltas.height}
    for (baseline,), rows in deltas.group_by("baseline", maintain_order=True):
        is_better = (rows["delta"] > 0) & (rows["p_holm"] < 0.05)
        metrics[f"n_better_holm/{baseline}"] = int(is_better.sum())
        metrics[f"largest_delta/{baseline}"] = largest(rows["delta"])
    return Description(present(metrics), deltas.height)


def describe_sweep_stability(plan: Plan, _: Cell) -> Description:
    """Describe how far the ranking holds when seeds, problems or settings change."""
    key = plan.sweep_table("sweep_stability")
    stability = plan.store.open(key).read_table("stability.parquet")
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
