"""A study's tables to one self-contained HTML page: what it shows, and how it writes values.

The page holds its style and figures, loads nothing, runs nothing, and says so to the browser in a
content security policy. What does not belong here: reading the store, computing results, and the
words of the headline (`findings`).

Invariant: no value can become markup. Every string is escaped, and characters that would reorder or
hide text are shown as symbols (`canvas.visible`).
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

import jinja2
import polars as pl
from markupsafe import Markup

from taprobe_core.evaluation.selection import ANY_ACTIVATION_PROBE
from taprobe_core.report import plots
from taprobe_core.report.canvas import visible
from taprobe_core.report.findings import (
    CORRECTION_LABELS,
    METRIC_LABELS,
    VERDICT_LABELS,
    findings,
    headline_rows,
    main_protocol,
    p_text,
)
from taprobe_core.report.leaderboard import TRUTH_LEVELS, baselines_of


def report_template() -> jinja2.Template:
    """Return the template of the page; it escapes every value that it is given."""
    source = resources.files("taprobe_core.report").joinpath("page.html.jinja").read_text("utf-8")
    return _environment().from_string(source)


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        autoescape=True,
        finalize=_shown,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        num=_num, signed=_signed, share=_share, p_value=p_text, csp_hash=_csp_hash, layers=_layers
    )
    environment.globals.update(
        verdict_labels=VERDICT_LABELS,
        correction_labels=CORRECTION_LABELS,
        metric_labels=METRIC_LABELS,
        any_probe=ANY_ACTIVATION_PROBE,
    )
    return environment


def _shown(value: Any) -> Any:
    if value is None:
        return "–"
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _num(value: float | None) -> str | None:
    return None if value is None else f"{value:.3f}"


def _signed(value: float | None) -> str | None:
    return None if value is None else f"{value:+.3f}".replace("-", "\u2212")


def _share(value: float | None) -> str | None:
    return None if value is None else f"{value:.1%}"


def _csp_hash(css: str) -> str:
    digest = hashlib.sha256(str(css).encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode('ascii')}"


def _layers(chosen: Sequence[str]) -> str:
    """Say `recipe@L02` of every choice in words, the layers of a recipe together."""
    found: dict[str, list[str]] = {}
    for candidate in chosen:
        recipe, _, layer = candidate.rpartition("@L")
        found.setdefault(recipe, []).append(str(int(layer)))
    return "; ".join(f"{recipe} at {', '.join(layers)}" for recipe, layers in found.items())


TOP = 10
"""Ranked rows shown per setting and protocol, beside the recipes without activations."""

MAX_SENTENCES = 250
"""Sentences shown of the example trace."""

_N_SHADES = 8


@dataclass(frozen=True)
class Example:
    """One trace to look at.

    Attributes:
        title: what it is: model, setting, problem.
        recipe: whose scores stand beside the labels, with its layer.
        problem: the problem's text.
        sentences: sentence_idx, sentence, importance_signed, importance_abs, importance_se,
            is_anchor, label_status, true_importance (null where the truth is not known), score
            (null where the sentence was not scored).
    """

    title: str
    recipe: str
    problem: str
    sentences: pl.DataFrame


@dataclass(frozen=True)
class CheckSummary:
    """What the checks of a study found in every stored cell.

    Attributes:
        counts: one row per asset and check: asset, check, effect of a fault, and the number of
            cells that passed, failed, are waived, were not_run.
        faults: one row per check and cell that failed: check, asset, cell, state (`failed`,
            `waived` or `warning`), what, artifact, fix.
        waivers: one row per waiver of the study: check, cell, reason, state.
        not_run: one row per cell that a check could not look at: check, cell, reason.
    """

    counts: pl.DataFrame
    faults: pl.DataFrame
    waivers: pl.DataFrame
    not_run: pl.DataFrame


@dataclass(frozen=True)
class ReportData:
    """Everything the page shows.

    Attributes:
        study: name.
        description: one paragraph, may be empty.
        target: what the probes were fitted to.
        dataset: identity of the rollouts: kind, repository or folder, revision.
        settings: settings.
        models: one row per model; every column is shown as text.
        untrained_models: models whose weights are random.
        leaderboard: from `build_leaderboard`.
        selected: from `select_on_validation`.
        plans: `tables.PLANS` with setting, model, layer and seed.
        skipped: `tables.SKIPPED` with setting and model.
        example: one trace, or None.
        diagnostics: from `diagnose`; none leaves the section out.
        figures: title -> PNG of further figures, such as label histograms.
        versions: library -> version.
        fingerprints: stage, partition, fingerprint.
        checks: what the study's checks found; None leaves the section out.
        failed: cells that failed, whose failures the page does not depend on: stage, cell, what,
            fix; none leaves the section out.
    """

    study: str
    description: str
    target: str
    dataset: Mapping[str, str]
    settings: tuple[str, ...]
    models: pl.DataFrame
    untrained_models: tuple[str, ...]
    leaderboard: pl.DataFrame
    selected: pl.DataFrame
    plans: pl.DataFrame
    skipped: pl.DataFrame
    example: Example | None = None
    diagnostics: pl.DataFrame = field(default_factory=pl.DataFrame)
    figures: Mapping[str, bytes] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    fingerprints: pl.DataFrame = field(default_factory=pl.DataFrame)
    checks: CheckSummary | None = None
    failed: pl.DataFrame = field(default_factory=pl.DataFrame)


def render_report(data: ReportData) -> str:
    """Render the page.

    Args:
        data: the study's tables.

    Returns:
        HTML that needs no other file and no network. Equal data give equal text.
    """
    board = data.leaderboard
    protocol = main_protocol(board)
    metric = _metric_label(board)
    main_board = board.filter(pl.col("protocol").cast(pl.String) == pl.lit(protocol))
    page = report_template().render(
        data=data,
        metric=metric,
        findings=findings(data.selected),
        headline_figure=_headline_figure(data.selected, metric),
        boards=_boards(board, protocol),
        baselines=baselines_of(board),
        truth_levels={k: v for k, v in TRUTH_LEVELS.items() if k in board.columns},
        layer_figures=_layer_figures(main_board),
        comparisons=_comparisons(data.selected, protocol),
        diagnostics=_by_setting(data.diagnostics, protocol),
        plan_blocks=_plan_blocks(data.plans, board, protocol),
        sentences=_shaded(data.example.sentences) if data.example else [],
        figures=[(name, plots.to_data_uri(png)) for name, png in data.figures.items()],
        max_sentences=MAX_SENTENCES,
    )
    return page.strip() + "\n"


def _metric_label(board: pl.DataFrame) -> str:
    names = board["metric"].unique().sort().to_list() if board.height else ["pr_auc"]
    return " or ".join(METRIC_LABELS.get(name, name) for name in names)


def _boards(leaderboard: pl.DataFrame, protocol: str | None) -> list[dict[str, Any]]:
    boards = []
    for (setting, name), block in leaderboard.group_by("setting", "protocol", maintain_order=True):
        # Each metric is ranked on its own, so each has its first rows.
        ranked = block.with_columns(pl.int_range(pl.len()).over("metric").alias("place"))
        shown = ranked.filter((pl.col("place") < TOP) | pl.col("layer").is_null())
        boards.append(
            {
                "title": f"{setting} · {name}",
                "is_main": name == protocol,
                "rows": shown.to_dicts(),
                "n_problems": block["n_problems"].max(),
                "n_configurations": block["n_configurations"][0],
                "n_hidden": block.height - shown.height,
                "has_several_metrics": block["metric"].n_unique() > 1,
            }
        )
    return sorted(boards, key=lambda board: not board["is_main"])


def _layer_figures(leaderboard: pl.DataFrame) -> list[dict[str, str]]:
    figures = []
    rows = leaderboard.sort("setting", "model", maintain_order=True)
    keys = ["setting", "model", "metric"]
    for (setting, model, name), block in rows.group_by(keys, maintain_order=True):
        layered = block.drop_nulls("layer")
        if layered["layer"].n_unique() < 2:
            continue
        free = block.filter(pl.col("layer").is_null()).select("recipe", "value")
        levels = {**dict(free.iter_rows()), "chance": block["chance"][0]}
        title = f"{setting} · {model} · {block['protocol'][0]}"
        label = METRIC_LABELS.get(str(name), str(name))
        png = plots.metric_by_layer(layered, metric=label, levels=levels, title=title)
        figures.append({"title": title, "uri": plots.to_data_uri(png)})
    return figures


def _headline_figure(selected: pl.DataFrame, metric: str) -> str | None:
    label = pl.format("{} · {} − {}", "setting", "model", "baseline")
    rows = headline_rows(selected).with_columns(label.alias("label"))
    if not rows.drop_nulls("delta_low").height:
        return None
    title = "chosen activation probe minus baseline, 95 % interval"
    return plots.to_data_uri(plots.delta_intervals(rows, metric=metric, title=title))


def _comparisons(selected: pl.DataFrame, protocol: str | None) -> list[dict[str, Any]]:
    """One block per setting and protocol; a row per model and recipe, with a cell per baseline."""
    blocks = []
    for (setting, name), block in selected.group_by("setting", "protocol", maintain_order=True):
        rows = [
            {
                **group.row(0, named=True),
                "against": {row["baseline"]: row for row in group.to_dicts()},
            }
            for _, group in block.group_by("model", "recipe", maintain_order=True)
        ]
        title = f"{setting} · {name}"
        blocks.append({"title": title, "is_main": name == protocol, "rows": rows})
    return sorted(blocks, key=lambda block: not block["is_main"])


def _by_setting(diagnostics: pl.DataFrame, protocol: str | None) -> list[dict[str, Any]]:
    """One block per setting under the main protocol."""
    if diagnostics.is_empty():
        return []
    shown = diagnostics.filter(pl.col("protocol").cast(pl.String) == pl.lit(protocol))
    return [
        {"title": f"{setting} · {protocol}", "rows": block.to_dicts()}
        for (setting,), block in shown.group_by("setting", maintain_order=True)
    ]


def _plan_blocks(
    plans: pl.DataFrame, leaderboard: pl.DataFrame, protocol: str | None
) -> list[dict[str, Any]]:
    """Plans at one layer per setting and model: the best on validation, at the lowest seed."""
    place = ["setting", "model", "protocol"]
    best = (
        leaderboard.filter(pl.col("protocol").cast(pl.String) == pl.lit(protocol))
        .drop_nulls("layer")
        .sort(
            [*place, "val_value", "layer"], descending=[*[False] * 3, True, False], nulls_last=True
        )
        .group_by(place, maintain_order=True)
        .agg(pl.col("layer").first())
    )
    typed = plans.with_columns(pl.col("layer").cast(best.schema["layer"]))
    chosen = typed.join(best, on=[*place, "layer"]).filter(pl.col("seed") == pl.col("seed").min())
    blocks = []
    for (setting, model, name, layer), block in chosen.sort(place, maintain_order=True).group_by(
        *place, "layer", maintain_order=True
    ):
        title = f"{setting} · {model} at layer {layer} · {name}"
        png = plots.deferral_bars(block, title=title)
        blocks.append({"title": title, "rows": block.to_dicts(), "uri": plots.to_data_uri(png)})
    return blocks


def _shaded(sentences: pl.DataFrame) -> list[dict[str, Any]]:
    """Rows of the example with shades 0-8: importances by root of their share, score by rank."""
    rank = pl.col("score").rank("average") / pl.col("score").count()
    return (
        sentences.sort("sentence_idx")
        .with_columns(
            _share_shade(pl.col("importance_abs")).alias("importance_shade"),
            _share_shade(pl.col("true_importance").abs()).alias("true_shade"),
            (rank.pow(3) * _N_SHADES).round().cast(pl.Int64).fill_null(0).alias("score_shade"),
        )
        .head(MAX_SENTENCES)
        .to_dicts()
    )


def _share_shade(importance: pl.Expr) -> pl.Expr:
    share = pl.when(importance.max() > 0).then((importance / importance.max()).sqrt())
    return (share.otherwise(0.0) * _N_SHADES).round().cast(pl.Int64).fill_null(0)
