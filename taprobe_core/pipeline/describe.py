"""What to show of an artifact: numbers that plot over cells, and one picture.

Read from the store, not from the computation, so an artifact that was reused is shown like one that
was made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import polars as pl

from taprobe_core import plots
from taprobe_core.findings import main_protocol
from taprobe_core.keys import parse_site, parse_trial
from taprobe_core.pipeline.cells import Cell, check_stage
from taprobe_core.pipeline.describe_attention import (
    describe_receiver_heads,
    describe_vertical_attention,
)
from taprobe_core.pipeline.describe_sweep import (
    describe_sweep_deltas,
    describe_sweep_leaderboard,
    describe_sweep_shortlist,
    describe_sweep_stability,
    describe_sweep_stage,
)
from taprobe_core.pipeline.description import Description, largest, mean, median, present
from taprobe_core.pipeline.fit import read_scores
from taprobe_core.pipeline.inputs import read_activations
from taprobe_core.pipeline.judge import read_evaluation
from taprobe_core.pipeline.plan import Plan


def describe(plan: Plan, stage: str, cell: Cell) -> Description:
    """Describe a cell's artifact.

    Args:
        plan: the plan.
        stage: a stage that the study has (`cells.stages_of`).
        cell: a cell whose artifact is in the store.

    Raises:
        ConfigError: the study has no such stage.
        MissingArtifactError: it is not there.
        CorruptArtifactError: its bytes differ from its manifest.
    """
    return _DESCRIBE[check_stage(plan.study, stage)](plan, cell)


def _rollouts(plan: Plan, cell: Cell) -> Description:
    artifact = plan.store.open(plan.rollouts(*cell))
    sentences = artifact.read_table("sentences.parquet")
    return Description(
        {
            "n_problems": artifact.read_table("problems.parquet").height,
            "n_sentences": sentences.height,
            "n_repeated_sentences": _repeated(sentences),
            "n_skipped": artifact.read_table("skipped.parquet").height,
        },
        sentences.height,
    )


def _repeated(sentences: pl.DataFrame) -> int:
    """How many sentences are said, word for word, in another problem too."""
    n_problems = pl.col("problem_id").n_unique().over("sentence")
    return int(sentences.select((n_problems > 1).sum()).item())


def _labels(plan: Plan, cell: Cell) -> Description:
    artifact = plan.store.open(plan.labels(*cell))
    labels = artifact.read_table("labels.parquet")
    metrics = {
        "n_sentences": labels.height,
        "n_skipped": artifact.read_table("skipped.parquet").height,
        "n_anchors": int(labels["is_anchor"].sum()),
        "mean_importance_abs": mean(labels["importance_abs"]),
        "median_importance_se": median(labels["importance_se"]),
        **{
            f"n_{status}": count
            for status, count in labels["label_status"].cast(pl.String).value_counts().iter_rows()
        },
    }
    picture = plots.importance_by_position(labels, title=" · ".join(cell))
    return Description(present(metrics), labels.height, plots.to_data_uri(picture))


def _spans(plan: Plan, cell: Cell) -> Description:
    artifact = plan.store.open(plan.spans(*cell))
    spans, texts = artifact.read_table("spans.parquet"), artifact.read_table("texts.parquet")
    metrics = {
        "n_problems": texts.height,
        "n_spans": spans.height,
        "n_tokens": int(texts["n_tokens"].sum()),
        "median_span_tokens": median(spans["n_tokens"]),
        "n_skipped": artifact.read_table("skipped.parquet").height,
    }
    picture = plots.span_lengths(spans["n_tokens"].to_numpy(), title=" · ".join(cell))
    return Description(present(metrics), spans.height, plots.to_data_uri(picture))


def _activations(plan: Plan, cell: Cell) -> Description:
    site, setting = parse_site(cell[0]), cell[1]
    index = plan.store.open(plan.activations(site, setting)).read_table("shards.parquet")
    poolings = plan.study.activations.poolings
    rows = read_activations(plan, site, setting, poolings[0])
    first = next(iter(rows))
    norms = {problem_id: np.linalg.norm(each, axis=1) for problem_id, each in rows.items()}
    n_rows = sum(len(each) for each in rows.values())
    metrics = {
        "n_shards": index.height,
        "n_tokens" if poolings[0] == "tokens" else "n_sentences": n_rows,
        "d_model": rows[first].shape[1],
        "max_abs": largest(index["max_abs"]),
        "mean_norm": float(np.concatenate(list(norms.values())).mean()),
        "n_widened": int((index["dtype"] != plan.study.activations.storage).sum()),
    }
    picture = plots.activation_norms(
        norms[first].astype(np.float64), title=f"{' · '.join(cell)} · problem {first}"
    )
    return Description(present(metrics), n_rows, plots.to_data_uri(picture))


def _probe_fits(plan: Plan, cell: Cell) -> Description:
    scores = read_scores(plan, parse_site(cell[0]), parse_trial(cell[1]))
    metrics = {
        "n_recipes": scores["recipe"].n_unique(),
        "n_folds": scores.select(pl.struct("protocol", "fold").n_unique()).item(),
        "n_scores": scores.height,
    }
    return Description(metrics, scores.height)


def _deferral_plans(plan: Plan, cell: Cell) -> Description:
    key = plan.deferral_plans(parse_site(cell[0]), parse_trial(cell[1]))
    plans = plan.store.open(key).read_table("plans.parquet")
    if plans.is_empty():
        return Description({}, 0)
    first = plans.filter(
        protocol=plans["protocol"][0],
        objective=plans["objective"][0],
        objective_value=plans["objective_value"][0],
    )
    metrics: dict[str, float | None] = {}
    for row in first.iter_rows(named=True):
        metrics[f"deferral_rate/{row['recipe']}"] = row["deferral_rate"]
        metrics[f"accepted_error/{row['recipe']}"] = row["accepted_error"]
    return Description(present(metrics), plans.height)


def _evaluation(plan: Plan, cell: Cell) -> Description:
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


def _leaderboard(plan: Plan, _: Cell) -> Description:
    board = plan.store.open(plan.leaderboard()).read_table("leaderboard.parquet")
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


def _study_report(plan: Plan, _: Cell) -> Description:
    artifact = plan.store.open(plan.study_report())
    return Description({"size_bytes": artifact.manifest.files["report.html"].size_bytes})


_DESCRIBE: Mapping[str, Callable[[Plan, Cell], Description]] = {
    "rollouts": _rollouts,
    "labels": _labels,
    "spans": _spans,
    "activations": _activations,
    "vertical_attention": describe_vertical_attention,
    "receiver_heads": describe_receiver_heads,
    "probe_fits": _probe_fits,
    "deferral_plans": _deferral_plans,
    "evaluation": _evaluation,
    "leaderboard": _leaderboard,
    "study_report": _study_report,
    "sweep_stage1": lambda plan, cell: describe_sweep_stage(plan, "stage1", cell),
    "sweep_shortlist_stage2": lambda plan, _: describe_sweep_shortlist(plan, "stage2"),
    "sweep_stage2": lambda plan, cell: describe_sweep_stage(plan, "stage2", cell),
    "sweep_shortlist_stage3": lambda plan, _: describe_sweep_shortlist(plan, "stage3"),
    "sweep_stage3": lambda plan, cell: describe_sweep_stage(plan, "stage3", cell),
    "sweep_leaderboard": describe_sweep_leaderboard,
    "sweep_paired_deltas": describe_sweep_deltas,
    "sweep_stability": describe_sweep_stability,
}
