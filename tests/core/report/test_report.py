from __future__ import annotations

import base64
import dataclasses
import hashlib
import re
from html.parser import HTMLParser

import numpy as np
import polars as pl
import pytest

from taprobe_core.deferral.plans import plan_deferrals
from taprobe_core.evaluation.evaluate import evaluate
from taprobe_core.evaluation.selection import select_on_validation
from taprobe_core.keys import Site
from taprobe_core.report import plots
from taprobe_core.report.findings import diagnose
from taprobe_core.report.leaderboard import build_leaderboard
from taprobe_core.report.page import MAX_SENTENCES, Example, ReportData, render_report
from taprobe_core.study.config import DEFAULT_RECIPES, Deferral, Evaluation
from taprobe_core.tables import PROTOCOLS, SPLITS

HOSTILE = (
    "</td></style><script>alert(1)</script><img src=x onerror=alert(2)>"
    "![x](http://evil.example/x.png)\x1b]8;;http://evil.example\x07"
    "\x1b[31m\u202egnp.exe' \" onload=x"
)
RECIPES = DEFAULT_RECIPES[:3]
TARGETS = dict.fromkeys((recipe.name for recipe in RECIPES), "anchor_binary")
EVALUATION = Evaluation(n_bootstrap=100, n_null=40)
N = 14


class _Page(HTMLParser):
    """Every tag and attribute of a page, and its visible text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_data(self, data):
        self.text += data


CONTROL = (pl.col("sentence_idx") % 5 == 0).alias("is_positive")


def _scores(labels: pl.DataFrame, recipe: str, noise: float) -> pl.DataFrame:
    rng = np.random.default_rng(len(recipe))
    truth = {key: group for (key,), group in labels.group_by("problem_id")}
    rows = []
    for protocol, folds in (
        ("holdout", [([0], [1, 2])]),
        ("lopo", [([(fold + 1) % 7], [fold]) for fold in range(7)]),
    ):
        for fold, sides in enumerate(folds):
            for split, problems in zip(("val", "test"), sides, strict=True):
                for problem in problems:
                    own = truth[problem]
                    score = own["importance_abs"].to_numpy() + noise * rng.normal(size=N)
                    judged = zip(own["importance_abs"], own["is_anchor"], strict=True)
                    rows += [
                        (
                            problem,
                            index,
                            recipe,
                            protocol,
                            fold,
                            split,
                            1 / (1 + np.exp(-value)),
                            *by,
                        )
                        for index, (value, by) in enumerate(zip(score, judged, strict=True))
                    ]
    schema = {
        "problem_id": pl.Int64,
        "sentence_idx": pl.Int64,
        "recipe": pl.String,
        "protocol": pl.Enum(PROTOCOLS),
        "fold": pl.Int32,
        "split": pl.Enum(SPLITS),
        "score": pl.Float32,
        "target_value": pl.Float64,
        "is_positive": pl.Boolean,
    }
    return pl.DataFrame(rows, schema, orient="row")


@pytest.fixture(scope="module")
def data() -> ReportData:
    rng = np.random.default_rng(1)
    labels = pl.DataFrame(
        {
            "problem_id": np.repeat(np.arange(7), N),
            "sentence_idx": np.tile(np.arange(N), 7),
            "importance_signed": rng.normal(0, 0.2, 7 * N).clip(-1, 1),
        }
    ).with_columns(importance_abs=pl.col("importance_signed").abs())
    rank = pl.col("importance_abs").rank("ordinal", descending=True).over("problem_id")
    labels = labels.with_columns(
        is_anchor=rank <= 2,
        true_importance=pl.col("importance_signed") / 2,
        is_true_anchor=rank <= 2,
    )
    cells, plans = [], []
    for layer in range(2):
        noise = {
            "position_baseline": 0.4,
            "text_only_baseline": 0.6,
            "linear_probe": 0.3 - 0.2 * layer,
        }
        scores = pl.concat(_scores(labels, recipe, each) for recipe, each in noise.items())
        cells.append(
            (
                Site("tiny", layer),
                "correct",
                evaluate(
                    {0: scores, 1: scores},
                    labels,
                    EVALUATION,
                    TARGETS,
                    controls_by_seed={0: scores.filter(_is_probe()).with_columns(CONTROL)},
                ),
            )
        )
        place = {"setting": "correct", "model": "tiny"}
        plans.append(
            plan_deferrals(scores, labels, Deferral()).plans.with_columns(
                layer=pl.lit(layer, pl.Int32), seed=pl.lit(0, pl.Int64), **_literals(place)
            )
        )
    sentences = labels.filter(problem_id=3).with_columns(
        sentence=pl.format("Sentence number {}.", "sentence_idx"),
        importance_se=pl.lit(0.05),
        label_status=pl.lit("measured"),
        score=pl.lit(0.5, pl.Float32),
    )
    return ReportData(
        study="tiny-study",
        description="Two layers.",
        target="anchor_binary",
        dataset={"kind": "mirror", "folder": "rollouts"},
        settings=("correct",),
        models=pl.DataFrame({"model": ["tiny"], "n_layers": [2]}),
        untrained_models=(),
        leaderboard=build_leaderboard(cells, recipes=RECIPES),
        selected=select_on_validation(cells, recipes=RECIPES, evaluation=EVALUATION),
        plans=pl.concat(plans),
        skipped=pl.DataFrame({"problem_id": [9], "what": ["no rollouts"]}),
        example=Example("tiny · problem 3", "linear_probe, layer 1", "What is 1 + 1?", sentences),
        diagnostics=diagnose(cells, recipes=RECIPES),
        figures={"importance": plots.importance_histogram(labels, title="importance")},
        versions={"taprobe": "0.1.0"},
        fingerprints=pl.DataFrame({"stage": ["labels"], "fingerprint": ["abcd"]}),
    )


def _is_probe() -> pl.Expr:
    return pl.col("recipe") == "linear_probe"


def _literals(values: dict[str, str]) -> dict[str, pl.Expr]:
    return {name: pl.lit(value) for name, value in values.items()}


@pytest.fixture(scope="module")
def html(data) -> str:
    return render_report(data)


def test_page_holds_every_section_and_is_the_same_again(data, html):
    text = _Page(html).text
    for heading in (
        "Does any activation probe beat position and text?",
        "What was run",
        "Leaderboard",
        "PR-AUC by layer",
        "Layer chosen on validation",
        "What the figures rest on",
        "Could the probe have memorised it?",
        "Deferral plans",
        "One trace",
        "Problems left out",
        "Provenance",
    ):
        assert heading in text
    assert "point\nestimates, not guarantees" in text
    assert "no rollouts" in text
    assert "Sentence number 13." in text
    assert render_report(data) == html


def test_page_loads_nothing_and_runs_nothing(html):
    page = _Page(html)
    assert not {"script", "iframe", "link", "object", "form", "a", "base"} & set(page.tags)
    sources = [value for _, name, value in page.attributes if name in ("src", "href", "srcset")]
    assert sources
    assert all(value.startswith("data:image/png;base64,") for value in sources)
    assert not [name for _, name, _ in page.attributes if name.startswith("on") or name == "style"]
    assert "url(" not in html
    assert "@import" not in html


def test_policy_allows_this_style_and_no_other(html):
    css = re.search(r"<style>(.*?)</style>", html, re.DOTALL).group(1)
    digest = base64.b64encode(hashlib.sha256(css.encode()).digest()).decode()
    policy = next(
        value for _, name, value in _Page(html).attributes if value.startswith("default-src")
    )
    assert policy == (
        f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'; "
        "base-uri 'none'; form-action 'none'"
    )


def test_hostile_text_stays_text(data, html):
    renamed = {"model": pl.lit(HOSTILE), "setting": pl.lit(HOSTILE), "recipe": pl.lit(HOSTILE)}
    poisoned = dataclasses.replace(
        data,
        study=HOSTILE,
        description=HOSTILE,
        dataset={HOSTILE: HOSTILE},
        settings=(HOSTILE,),
        models=pl.DataFrame({HOSTILE: [HOSTILE]}),
        untrained_models=(HOSTILE,),
        leaderboard=data.leaderboard.with_columns(**renamed),
        selected=data.selected.with_columns(
            interval_note=pl.lit(HOSTILE),
            baseline=pl.lit(HOSTILE),
            correction=pl.lit(HOSTILE),
            **renamed,
        ),
        diagnostics=data.diagnostics.with_columns(metric=pl.lit(HOSTILE), **renamed),
        plans=data.plans.with_columns(**renamed),
        skipped=pl.DataFrame({"what": [HOSTILE]}),
        example=Example(
            HOSTILE,
            HOSTILE,
            HOSTILE,
            data.example.sentences.with_columns(
                sentence=pl.lit(HOSTILE), label_status=pl.lit(HOSTILE)
            ),
        ),
        figures={HOSTILE: next(iter(data.figures.values()))},
        versions={HOSTILE: HOSTILE},
        fingerprints=pl.DataFrame({"stage": [HOSTILE]}),
    )
    attacked = render_report(poisoned)
    page, honest = _Page(attacked), _Page(html)
    assert set(page.tags) == set(honest.tags)
    assert {name for _, name, _ in page.attributes} == {name for _, name, _ in honest.attributes}
    assert {value for tag, name, value in page.attributes if (tag, name) == ("meta", "name")} == {
        "referrer",
        "viewport",
    }
    assert not [
        value for _, name, value in page.attributes if name == "src" and "data:" not in value
    ]
    assert not {"\x1b", "\x07", "\u202e"} & set(attacked)
    assert "<script>alert(1)</script>" in page.text
    assert "\u241b[31m" in page.text


def test_untrained_weights_are_said_only_when_used(data, html):
    assert "Untrained weights" not in html
    warned = render_report(dataclasses.replace(data, untrained_models=("tiny",)))
    assert "Random weights stand in for the checkpoint of tiny" in warned
    assert "tiny (untrained)" in warned


def test_anchors_and_shades_follow_the_labels(data, html):
    anchors = int(data.example.sentences["is_anchor"].sum())
    assert html.count('<tr class="anchor"') == anchors
    strongest = data.example.sentences.sort("importance_abs")["sentence_idx"][-1]
    assert re.search(rf'sub">{strongest}</td>\s*<td class="n i8">', html)


def test_unmeasured_labels_show_their_status_instead_of_an_error(data):
    example = data.example
    rows = example.sentences.with_columns(
        label_status=pl.lit("no_dissimilar"),
        importance_abs=pl.lit(0.0),
        score=pl.lit(None, pl.Float32),
    )
    page = render_report(
        dataclasses.replace(data, example=dataclasses.replace(example, sentences=rows))
    )
    assert page.count('<span class="sub">no dissimilar<br>true') == N
    assert "i8" not in _classes(page)


def _classes(html: str) -> set[str]:
    body = html.split("<main>")[1].split('<div class="wide scroll">')[1]
    return {name for value in re.findall(r'class="([^"]*)"', body) for name in value.split()}


def test_long_traces_are_cut_and_said(data):
    sentences = data.example.sentences.sort("sentence_idx", descending=True)
    long = pl.concat([sentences] * 20).with_columns(sentence_idx=pl.int_range(pl.len(), 0, -1) - 1)
    page = render_report(
        dataclasses.replace(data, example=dataclasses.replace(data.example, sentences=long))
    )
    assert f"The first {MAX_SENTENCES} of {long.height} sentences are shown" in page
    shown = [int(index) for index in re.findall(r'class="n sub">(\d+)<', page)]
    assert shown == list(range(MAX_SENTENCES))


def test_two_metrics_are_told_apart(data):
    other = data.leaderboard.with_columns(metric=pl.lit("spearman"), recipe=pl.lit("ridge_probe"))
    both = pl.concat([data.leaderboard, other])
    page = render_report(dataclasses.replace(data, leaderboard=both))
    text = _Page(page).text
    assert "Mean PR-AUC or Spearman over test problems" in text
    assert "tiny, layer 1, Spearman" in text
    assert "tiny, layer 1, PR-AUC" in text
    assert page.count('alt="PR-AUC or Spearman by layer') == 2


def test_words_and_tables_carry_the_corrected_test(data, html):
    text = _Page(html).text
    assert "p is corrected for 2 planned comparisons (Holm)." in text
    assert "Holm over 2" in text
    assert "BH over 2" in text
    assert " at " in text
    board = data.leaderboard.filter(pl.col("layer") == 1, protocol="lopo").row(0, named=True)
    assert f"alone {board['p_position']:.3f}" in text
    fifths = data.diagnostics.filter(protocol="lopo")["n_defined"].list.sum().sum()
    assert len(re.findall(r'<span class="sub">of \d</span></td>', html)) >= 15
    assert fifths > 0


def test_selectivity_stands_between_task_and_control_with_its_interval(data, html):
    (row,) = data.diagnostics.drop_nulls("n_control").filter(protocol="lopo").to_dicts()
    section = _Page(html.split("Could the probe have memorised it?")[1].split("<h2>")[0]).text
    for value in (row["task_value"], row["control_value"], row["control_chance"]):
        assert f"{value:.3f}" in section
    assert f"{row['selectivity']:+.3f}" in section
    assert f"{row['selectivity_low']:+.3f} to {row['selectivity_high']:+.3f}" in section
    assert f"better on {row['n_selective']}" in section
    assert section.count("linear_probe") == 1
    assert "position_baseline" not in section
    without = data.diagnostics.with_columns(n_control=pl.lit(None, pl.Int64))
    page = render_report(dataclasses.replace(data, diagnostics=without))
    assert "memorised" not in page


def test_an_empty_study_still_renders(data):
    page = render_report(
        dataclasses.replace(
            data,
            leaderboard=data.leaderboard.clear(),
            selected=data.selected.clear(),
            diagnostics=pl.DataFrame(),
            plans=data.plans.clear(),
            skipped=data.skipped.clear(),
            example=None,
            figures={},
            fingerprints=pl.DataFrame(),
        )
    )
    for phrase in ("nothing to compare", "Nothing was ranked", "None."):
        assert phrase in page
