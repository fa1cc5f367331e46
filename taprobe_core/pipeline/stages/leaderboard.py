"""Leaderboard of a study: every recipe at every site and setting, ranked."""

from __future__ import annotations

import polars as pl

from taprobe_core.keys import parse_site
from taprobe_core.pipeline.commit import Files, commit_cell
from taprobe_core.pipeline.grid import Cell
from taprobe_core.pipeline.plan import Plan
from taprobe_core.pipeline.stage import (
    Description,
    Outcome,
    Stage,
    cell_by_cell,
    largest,
    mean,
    present,
)
from taprobe_core.pipeline.stages.evaluation import read_evaluation


def _make(plan: Plan, cell: Cell) -> Outcome:
    """Rank every recipe of the study, commit.

    Raises:
        MissingArtifactError: an evaluation is not there yet.
    """

    def compute() -> Files:
        from taprobe_core.report.leaderboard import build_leaderboard

        places = [
            (parse_site(site), setting)
            for site, setting in plan.stages.cells(plan.study, "evaluation")
        ]
        board = build_leaderboard(
            [(site, setting, read_evaluation(plan, site, setting)) for site, setting in places],
            recipes=plan.study.recipes,
        )
        return {"leaderboard": board}

    return commit_cell(plan, "leaderboard", cell, compute, {"study": plan.study.name})


def _describe(plan: Plan, cell: Cell) -> Description:
    from taprobe_core.report import plots

    board = plan.read("leaderboard", cell, "leaderboard")
    block = board.filter(setting=board["setting"][0], protocol=board["protocol"][0])
    metrics = {
        "n_configurations": block.height,
        "best_value": largest(block["value"]),
        "chance": mean(block["chance"]),
    }
    layer = pl.col("layer").cast(pl.String).str.zfill(2)
    site = pl.concat_str("model", pl.lit("@L") + layer, ignore_nulls=True)
    picture = plots.leaderboard_bars(
        block.head(10).with_columns(label=pl.format("{} · {}", "recipe", site)),
        metric=str(block["metric"][0]),
        chance=metrics["chance"],
        title=f"{block['setting'][0]} · {block['protocol'][0]}",
    )
    return Description(present(metrics), board.height, plots.to_data_uri(picture))


LEADERBOARD = Stage(
    name="leaderboard",
    title="Every recipe of the study, ranked, beside chance and its baselines.",
    grid=(),
    reads=("evaluation",),
    code_version="2",
    make=cell_by_cell(_make),
    describe=_describe,
    tables={"leaderboard": "LEADERBOARD"},
    op="publish_study",
    is_provenance=True,
)
