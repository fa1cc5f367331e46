"""A small campaign of three stages, without Dagster: what is fitted, reused, measured and shown."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from taprobe_core.attention.tables import variant_scores
from taprobe_core.errors import ConfigError, NumericsError
from taprobe_core.keys import Site
from taprobe_core.pipeline import (
    STAGES,
    Plan,
    cells_of,
    describe,
    is_complete,
    open_plan,
    read_attention,
    run_stage,
    stages_of,
)
from taprobe_core.pipeline.stages.sweep import read_sweep
from taprobe_core.probes import fit as probe_fit
from taprobe_core.study.sweep import AttentionVariant

STUDY = """
name: campaign
rollouts:
  source: {kind: policy, n_problems: 4, n_rollouts: 4}
models:
  tiny:
    rollouts_dir: tiny
    checkpoint: {kind: stand_in, architecture: llama, n_layers: 2, d_model: 16}
    n_layers: 2
    dtype: float32
    layers: [0, 1]
settings: [correct_base_solution]
seeds: [0, 1]
labels: {percentile: 70, drop_last_sentence: false}
activations: {poolings: [mean, tokens]}
attention: {mode: full}
probes:
  keep: scores
  recipes:
    - {name: position_baseline, features: [position]}
    - {name: text_only_baseline, features: [text]}
    - {name: linear_probe, features: [activations]}
    - {name: multimax_probe, features: [tokens], estimator: multimax,
       token_probe: {width: 4, n_heads: 2, max_epochs: 2}}
    - {name: vertical_attention_plus_position, features: [vertical_attention, position]}
splits: {protocols: [lopo]}
evaluation: {n_bootstrap: 10, n_null: 0}
sweep:
  targets: [anchor_binary, importance_abs]
  percentiles: [70]
  drop_last_sentence: [true, false]
  residualize: [none, position]
  attention:
    - {mode: "off"}
    - {mode: light, last_n: 2}
    - {mode: full}
    - {mode: full, max_tokens: 1024}
  tuning: {regularization: [0.1, 1.0], n_heads: [2], depth: [1], width: [4],
           learning_rate: [0.01], weight_decay: [0.0], training: [hard], window: [5]}
  shortlists: {to_stage2: 2, to_stage3: 2}
  stability_draws: 3
"""
SWEEP_STAGES = tuple(stage for stage in STAGES if stage.startswith("sweep_"))
SITE, SETTING = Site("tiny", 1), "correct_base_solution"


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    folder = tmp_path_factory.mktemp("campaign")
    (folder / "campaign.yaml").write_text(STUDY)
    made = open_plan(folder / "campaign.yaml", folder / "data")
    for stage in stages_of(made.study):
        if stage not in ("deferral_plans", "evaluation", "leaderboard", "study_report"):
            list(run_stage(made, stage, cells_of(made.study, stage)))
    return made


def test_every_stage_of_the_sweep_is_there_and_is_shown(plan: Plan) -> None:
    assert set(stages_of(plan.study)) >= set(SWEEP_STAGES)
    shown = {}
    for stage in SWEEP_STAGES:
        for cell in cells_of(plan.study, stage):
            assert is_complete(plan, stage, cell)
            shown[stage] = describe(plan, stage, cell)
    assert shown["sweep_stage1"].metrics["n_configurations"] == 2 * 2 * (2 + 1)
    assert shown["sweep_stage1"].metrics["n_fits"] > 10
    assert shown["sweep_shortlist_stage2"].metrics["n_shortlisted"] == 4
    assert shown["sweep_leaderboard"].metrics["n_missing"] == 0
    assert str(shown["sweep_leaderboard"].picture).startswith("data:image/png")
    assert shown["sweep_paired_deltas"].metrics["n_comparisons"] > 0
    assert "stability" in shown["sweep_stability"].tables


def test_running_again_computes_nothing(plan: Plan) -> None:
    for stage in SWEEP_STAGES:
        assert all(
            done.is_reused for _, done in run_stage(plan, stage, cells_of(plan.study, stage))
        )


def test_a_configuration_that_fails_costs_its_own_fit(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = open_plan(plan.study, shutil.copytree(plan.data_root, tmp_path / "data"))
    cell = (str(SITE), SETTING)
    index = own.open("sweep_stage1", cell)
    of_site = [key for key in own.part_keys(index.manifest) if key.partition[0] == str(SITE)]
    poisoned, sound = [key for key in of_site if "@s" not in key.partition[-1]][:2]
    for key in (index.key, poisoned, sound):
        own.store.discard(key)
    linear = probe_fit.SOLVERS["linear"]

    def solve(design: Any, fits: Any, *rest: Any) -> Any:
        if any(fit.recipe.name == poisoned.partition[-1] for fit in fits):
            raise NumericsError("a column did not converge", "a solve", "lower C")
        return linear.solve(design, fits, *rest)

    with monkeypatch.context() as poison:
        poison.setitem(probe_fit.SOLVERS, "linear", replace(linear, solve=solve))
        with pytest.raises(NumericsError, match=f"recipe {poisoned.partition[-1]}: a column"):
            list(run_stage(own, "sweep_stage1", [cell]))
    assert own.store.find(sound) is not None
    assert own.store.find(poisoned) is None
    assert not is_complete(own, "sweep_stage1", cell)
    # What is chosen from all cells waits for the one.
    with pytest.raises(NumericsError, match="sweep_shortlist_stage2 cannot be made"):
        list(run_stage(own, "sweep_shortlist_stage2", [()]))
    ((_, outcome),) = run_stage(own, "sweep_stage1", [cell])
    assert not outcome.is_reused
    assert own.store.find(poisoned) is not None
    list(run_stage(own, "sweep_shortlist_stage2", [()]))


def test_configurations_of_equal_content_share_their_fits(plan: Plan) -> None:
    tables = read_sweep(plan, ["sweep_stage1"])
    recipes = tables["recipes"]
    # A text baseline knows neither pooling nor residualisation: one fit for each drop and target.
    text = recipes.filter(kind="text_only_baseline", layer=1)
    assert text["config_id"].n_unique() == 12
    assert text["recipe"].n_unique() == 3
    twice = read_sweep(plan, ["sweep_stage2"])["configurations"].filter(attention="full_1024_mean")
    assert twice["duplicate_of"].null_count() == 0


def test_a_dropped_last_sentence_is_neither_scored_nor_counted(plan: Plan) -> None:
    tables = read_sweep(plan, ["sweep_stage1"])
    dropped = tables["configurations"].filter(target="anchor_binary", residualize="none", layer=1)
    labels = plan.read("labels", ("tiny", SETTING), "labels")
    n_sentences = dict(labels.group_by("problem_id").len().iter_rows())
    for drop in (True, False):
        (config_id,) = dropped.filter(drop_last_sentence=drop, pooling="mean")["config_id"]
        uses = tables["recipes"].filter(config_id=config_id, kind="linear_probe")
        rows = tables["units"].filter(pl.col("recipe").is_in(uses["recipe"].to_list()), layer=1)
        assert rows.height
        for row in rows.iter_rows(named=True):
            assert row["n_sentences"] == n_sentences[row["problem_id"]] - drop


def test_baselines_stand_beside_fits_of_many_seeds_and_of_residuals(plan: Plan) -> None:
    tables = read_sweep(plan, ["sweep_stage1"])
    recipes = tables["recipes"].unique(["layer", "recipe", "role"])
    level = recipes.select("layer", "recipe", "kind", "residualize").unique()
    key = ["layer", "protocol", "fold", "problem_id"]
    test = tables["units"].filter(split="test").group_by(*key, "recipe").agg(pl.mean("primary"))
    judged = (
        tables["contrasts"]
        .join(level, on=["layer", "recipe"])
        .join(test, on=[*key, "recipe"])
        .join(test.rename({"recipe": "baseline"}), on=[*key, "baseline"], suffix="_baseline")
    )
    own, by_itself = judged["value"], judged["primary"]
    assert own.equals(by_itself, null_equal=True) or (own - by_itself).abs().max() < 1e-12
    plain = judged.filter(residualize="none")
    assert set(plain["kind"]) == {"linear_probe", "multimax_probe"}
    assert (plain["baseline_value"] - plain["primary_baseline"]).abs().max() < 1e-12
    # Beside a fit to residuals, the baseline is asked about the residuals.
    residual = judged.filter(residualize="position")
    assert (residual["baseline_value"] - residual["primary_baseline"]).abs().max() > 0.01
    n_seeds = tables["units"].join(level, on=["layer", "recipe"]).group_by("kind")
    found = dict(n_seeds.agg(pl.col("seed").n_unique()).iter_rows())
    assert found == {
        "position_baseline": 1,
        "text_only_baseline": 1,
        "linear_probe": 1,
        "multimax_probe": 2,
    }


def test_attention_variants_follow_from_the_stored_mass(plan: Plan) -> None:
    full = variant_scores(read_attention(plan, SITE, SETTING), AttentionVariant(mode="full"))
    stored = plan.read("vertical_attention", (str(SITE), SETTING), "scores")
    assert full.equals(stored)

    light = AttentionVariant(mode="light", last_n=2)
    scores = variant_scores(read_attention(plan, SITE, SETTING), light)
    for problem_id, tensors in read_attention(plan, SITE, SETTING):
        share = tensors["mass"].double() / tensors["n_tokens"].double()[None, :, None]
        by_query = share.mean(0)[-2:]
        expected = by_query.mean(0)
        expected[-2], expected[-1] = by_query[1, -2], 0  # only what stands after a sentence asks
        found = scores.filter(problem_id=problem_id)["attention_score"].to_numpy()
        np.testing.assert_allclose(found, expected.numpy(), atol=1e-6)
    tail = ((1, {"tail_mass": tensors["mass"][:, -3:], "is_after": tensors["mass"][0, -3:] > 0}),)
    with pytest.raises(ConfigError, match="full_mean of attention from the last 3 tokens"):
        variant_scores(tail, AttentionVariant(mode="full"))


def test_a_study_without_a_sweep_says_so(plan: Plan, tmp_path: Path) -> None:
    bare = STUDY[: STUDY.index("sweep:")]
    (tmp_path / "bare.yaml").write_text(bare)
    other = open_plan(tmp_path / "bare.yaml", tmp_path / "data")
    with pytest.raises(ConfigError, match="give the study a `sweep`"):
        list(run_stage(other, "sweep_stage1", []))
    ((_, found),) = STAGES["sweep_shortlist_stage2"].make(other, [()])
    assert isinstance(found, ConfigError)
    assert "no sweep" in str(found)
