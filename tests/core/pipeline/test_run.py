from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
import yaml

from taprobe_core.activations.extraction import Extracted
from taprobe_core.checkpoints import LoadedModel
from taprobe_core.errors import ConfigError, MissingArtifactError, NonFiniteError
from taprobe_core.evaluation.evaluate import evaluate
from taprobe_core.keys import Site, Trial
from taprobe_core.pipeline import (
    STAGES,
    Plan,
    cells_of,
    demo_data,
    describe,
    extract,
    is_complete,
    key_of,
    missing_cells,
    open_plan,
    read_activations,
    read_probe_data,
    read_scores,
    run_stage,
    stages_of,
)
from taprobe_core.pipeline.stages.probe_fits import read_control_scores
from taprobe_core.store import Store
from taprobe_core.study import parse_study

MADE = (
    "rollouts",
    "labels",
    "spans",
    "activations",
    "probe_fits",
    "deferral_plans",
    "evaluation",
    "leaderboard",
    "study_report",
)
"""Those of a study that asks for no attention."""

CORRECT, INCORRECT = "correct_base_solution", "incorrect_base_solution"
SITE = Site("tiny", 0)


@pytest.fixture(scope="module")
def plan(built: Any) -> Plan:
    return open_plan(built.study, built.data)


@pytest.fixture
def own(built: Any, copied: Path) -> Plan:
    return open_plan(built.study, copied)


def run_all(plan: Plan) -> dict[str, list[bool]]:
    """Run every stage; stage -> whether each cell was reused."""
    return {
        stage: [
            outcome.is_reused for _, outcome in run_stage(plan, stage, cells_of(plan.study, stage))
        ]
        for stage in MADE
    }


def written(store: Store) -> dict[str, Any]:
    return {str(key): store.open(key).manifest.created_at for key in store.keys(None)}


class Passes:
    """Counts (problem, layer) pairs that go through the model."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[tuple[int, int]] = []
        self.n_texts = 0
        real = extract.extract

        def counting(*args: Any, **options: Any) -> Iterator[Extracted]:
            for item in real(*args, **options):
                self.n_texts += 1
                self.seen += [(item.problem_id, layer) for layer in item.shards]
                yield item

        monkeypatch.setattr(extract, "extract", counting)


def test_every_stage_makes_every_cell_and_yields_it_under_its_key(built: Any, plan: Plan) -> None:
    assert stages_of(plan.study) == MADE
    for stage in MADE:
        cells = cells_of(plan.study, stage)
        outcomes = built.outcomes[stage]
        assert sorted(cell for cell, _ in outcomes) == sorted(cells)
        assert {outcome.key for _, outcome in outcomes} == {
            key_of(plan, stage, cell) for cell in cells
        }
        assert not any(outcome.is_reused for _, outcome in outcomes)
        assert all(outcome.duration_s > 0 for _, outcome in outcomes)
        assert list(missing_cells(plan, stage, cells)) == []


def test_a_second_run_reuses_everything_and_writes_nothing(own: Plan) -> None:
    before = written(own.store)
    reused = run_all(open_plan(own.study, own.data_root))
    assert {stage for stage, flags in reused.items() if not all(flags)} == set()
    assert written(own.store) == before
    assert all(verdict.is_sound for verdict in own.store.verify())


def test_an_equal_run_elsewhere_gives_equal_keys_and_equal_numbers(
    built: Any, plan: Plan, tmp_path: Path
) -> None:
    again = open_plan(built.study, tmp_path)
    for stage in ("rollouts", "labels", "spans", "activations"):
        list(
            run_stage(
                again, stage, [each for each in cells_of(plan.study, stage) if each[1] == CORRECT]
            )
        )
    for key in again.store.keys(None):
        assert {
            name: each.sha256 for name, each in plan.store.open(key).manifest.files.items()
        } == {name: each.sha256 for name, each in again.store.open(key).manifest.files.items()}


def test_a_longer_list_of_layers_extracts_the_missing_layer_alone(
    built: Any, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = yaml.safe_load(built.study.read_text())
    kept = open_plan(built.study, copied)
    without_activations(kept)
    values["models"]["tiny"]["layers"] = [0]
    shorter = open_plan(parse_study(yaml.safe_dump(values), "shorter.yaml"), copied)
    list(run_stage(shorter, "activations", cells_of(shorter.study, "activations")))
    assert list(missing_cells(shorter, "activations", cells_of(shorter.study, "activations"))) == []
    before = written(kept.store)
    passes = Passes(monkeypatch)

    outcomes = dict(run_stage(kept, "activations", cells_of(kept.study, "activations")))

    problems = kept.read("rollouts", ("tiny", CORRECT), "problems")
    assert passes.n_texts == 2 * problems.height
    assert {layer for _, layer in passes.seen} == {1}
    assert {cell: outcome.is_reused for cell, outcome in outcomes.items()} == {
        (site, setting): site == "tiny@L00"
        for site in ("tiny@L00", "tiny@L01")
        for setting in (CORRECT, INCORRECT)
    }
    assert before.items() <= written(kept.store).items()


@pytest.mark.parametrize(
    ("stage", "part", "scope", "reused"),
    [
        ("activations", "activation_shards", "tiny", [False, False]),
        ("probe_fits", "fits", "tiny@L00", [False, True]),
    ],
)
def test_a_lost_part_makes_its_cells_incomplete_and_is_made_again_alone(
    own: Plan,
    stage: str,
    part: str,
    scope: str,
    reused: list[bool],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cells = cells_of(own.study, stage)
    lost = next(key for key in own.store.keys(part) if key.partition[:2] == (scope, CORRECT))
    before = written(own.store)
    own.store.discard(lost)

    wanted = list(missing_cells(own, stage, cells))
    assert wanted == [
        cell for cell in cells if cell[0].startswith(scope) and cell[1].startswith(CORRECT)
    ]
    assert not is_complete(own, stage, wanted[0])
    passes = Passes(monkeypatch)
    outcomes = list(run_stage(own, stage, wanted))

    assert [outcome.is_reused for _, outcome in outcomes] == reused
    assert (passes.n_texts, len(passes.seen)) == ((1, 2) if stage == "activations" else (0, 0))
    after = written(own.store)
    assert {name for name in after if after[name] != before[name]} == {str(lost)}
    assert list(missing_cells(own, stage, cells)) == []


def test_lineage_of_activations_reaches_the_dataset(plan: Plan) -> None:
    key = plan.key("activations", (str(SITE), CORRECT))
    tree = plan.store.lineage(key)
    (spans,) = [node for node in tree.upstream if node.key.stage == "spans"]
    (rollouts,) = spans.upstream
    assert rollouts.key == plan.key("rollouts", ("tiny", CORRECT))
    assert rollouts.provenance["dataset_kind"] == "policy"
    assert rollouts.provenance["dataset_n_problems"] == "6"
    assert rollouts.provenance["setting"] == CORRECT
    assert tree.provenance["checkpoint_architecture"] == "qwen2"
    shards = [node for node in tree.upstream if node.key.stage == "activation_shards"]
    assert len(shards) == 6
    assert {node.provenance["dtype_computed"] for node in shards} == {"float32"}
    assert str(plan.key("rollouts", ("tiny", CORRECT))) in "\n".join(
        plan.store.lineage(plan.key("study_report")).render()
    )


@pytest.mark.parametrize("stage", MADE[1:])
def test_a_missing_input_is_named_with_a_fix(built: Any, stage: str, tmp_path: Path) -> None:
    plan = Plan(open_plan(built.study, built.data).study, Store(tmp_path), built.data, STAGES)
    with pytest.raises(MissingArtifactError, match=r"never built.*\nFix: run the stage") as caught:
        list(run_stage(plan, stage, cells_of(plan.study, stage)))
    assert str(tmp_path) in str(caught.value)
    assert list(plan.store.keys()) == []


def test_an_unknown_stage_is_refused(plan: Plan) -> None:
    with pytest.raises(ConfigError, match=r"'label' in study small\nFix: use one of rollouts, lab"):
        next(run_stage(plan, "label", []))


def scaled(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    real = extract.load_base_model

    def load(*args: Any) -> LoadedModel:
        loaded = real(*args)
        loaded.module.embed_tokens.weight.data *= factor
        return loaded

    monkeypatch.setattr(extract, "load_base_model", load)


def without_activations(plan: Plan) -> Plan:
    for stage in ("activation_shards", "activations"):
        for key in list(plan.store.keys(stage)):
            plan.store.discard(key)
    return plan


def test_values_too_large_for_float16_are_kept_in_float32_and_said_so(
    own: Plan, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    without_activations(own)
    scaled(monkeypatch, 1e8)
    cell = (str(SITE), CORRECT)
    with caplog.at_level(logging.WARNING, "taprobe_core"):
        list(run_stage(own, "activations", [cell]))
    assert sum("stored as float32" in record.message for record in caplog.records) == 6
    assert describe(own, "activations", cell).metrics["n_widened"] == 6
    rows = read_activations(own, SITE, CORRECT)
    assert max(abs(each).max() for each in rows.values()) > 65504
    assert all(np.isfinite(each).all() for each in rows.values())


def test_nan_in_the_model_is_refused_and_nothing_is_committed(
    own: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_activations(own)
    scaled(monkeypatch, float("nan"))
    with pytest.raises(NonFiniteError, match=r"problem \d+, layer 0") as caught:
        list(run_stage(own, "activations", [(str(SITE), CORRECT)]))
    assert "Fix:" in str(caught.value)
    assert list(own.store.keys("activation_shards")) == []
    assert list(own.store.keys("activations")) == []


def test_weights_are_loaded_once_for_all_sites_and_settings(
    own: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_activations(own)
    loads: list[object] = []
    real = extract.load_base_model
    monkeypatch.setattr(
        extract, "load_base_model", lambda *args: (loads.append(args), real(*args))[1]
    )
    passes = Passes(monkeypatch)
    list(run_stage(own, "activations", cells_of(own.study, "activations")))
    assert len(loads) == 1
    assert passes.n_texts == 12
    assert len(passes.seen) == 24


@pytest.mark.parametrize("storage", ["float16", "bfloat16", "float32"])
def test_every_storage_and_pooling_is_read_back_as_float32(own: Plan, storage: str) -> None:
    values = own.study.model_dump(mode="json")
    poolings = ["mean", "last", "tokens"]
    values["activations"] |= {"storage": storage, "poolings": poolings}
    other = open_plan(parse_study(yaml.safe_dump(values), "other.yaml"), own.data_root)
    cell = (str(SITE), CORRECT)
    list(run_stage(other, "activations", [cell]))
    kept, found = read_activations(own, SITE, CORRECT), read_activations(other, SITE, CORRECT)
    assert kept.keys() == found.keys()
    for problem_id, mean in found.items():
        assert mean.dtype == np.float32
        np.testing.assert_allclose(mean, kept[problem_id], rtol=1e-2, atol=1e-3)
    spans = table(own, "spans", ("tiny", CORRECT), "spans.parquet")
    tokens = read_activations(other, SITE, CORRECT, "tokens")
    assert sum(len(rows) for rows in tokens.values()) == spans["n_tokens"].sum()
    (check,) = STAGES["activations"].checks.values()
    assert check(other, cell) == []
    assert describe(other, "activations", cell).n_rows == spans.height
    with pytest.raises(ConfigError, match="no pooling 'max' in study small") as caught:
        read_activations(other, SITE, CORRECT, "max")
    assert str(caught.value).endswith("use one of mean, last, tokens")


def test_features_are_those_of_the_shards_in_sentence_order(plan: Plan) -> None:
    data = read_probe_data(plan, "tiny", CORRECT, SITE)
    rows = read_activations(plan, SITE, CORRECT)
    for problem_id, mean in rows.items():
        mine = data.keys["problem_id"].to_numpy() == problem_id
        index = data.keys.filter(problem_id=problem_id)["sentence_idx"].to_numpy()
        np.testing.assert_array_equal(data.activations["mean"][mine], mean[index])
    assert read_probe_data(plan, "tiny", CORRECT, None).activations == {}


def table(plan: Plan, stage: str, cell: tuple[str, ...], name: str) -> pl.DataFrame:
    return plan.store.open(key_of(plan, stage, cell)).read_table(name)


@pytest.mark.parametrize("stage", MADE)
def test_what_is_shown_of_an_artifact_is_finite_and_has_its_picture(plan: Plan, stage: str) -> None:
    shown = describe(plan, stage, cells_of(plan.study, stage)[0])
    assert shown.metrics
    assert all(np.isfinite(value) for value in shown.metrics.values())
    has_picture = stage in {"labels", "spans", "activations", "evaluation", "leaderboard"}
    assert (shown.picture or "").startswith("data:image/png;base64,") is has_picture


def test_the_numbers_shown_are_those_of_the_tables(plan: Plan) -> None:
    cell = ("tiny", CORRECT)
    sentences = table(plan, "rollouts", cell, "sentences.parquet")
    labels = table(plan, "labels", cell, "labels.parquet")
    texts = table(plan, "spans", cell, "texts.parquet")
    assert describe(plan, "rollouts", cell).metrics == {
        "n_problems": 6,
        "n_sentences": sentences.height,
        "n_repeated_sentences": sentences.filter(
            pl.col("problem_id").n_unique().over("sentence") > 1
        ).height,
        "n_skipped": 0,
    }
    assert describe(plan, "labels", cell).metrics["n_anchors"] == labels.filter("is_anchor").height
    assert describe(plan, "spans", cell).metrics["n_tokens"] == texts["token_ids"].list.len().sum()
    shown = describe(plan, "activations", (str(SITE), CORRECT))
    assert shown.n_rows == sentences.height
    assert (shown.metrics["n_texts"], shown.metrics["d_model"]) == (6, 16)
    scores = read_scores(plan, SITE, Trial(CORRECT, 0))
    assert describe(plan, "probe_fits", (str(SITE), f"{CORRECT}@s00")).metrics == {
        "n_recipes": 3,
        "n_folds": 6,
        "n_scores": scores.height,
    }
    board = table(plan, "leaderboard", (), "leaderboard.parquet")
    shown = describe(plan, "leaderboard", ())
    block = board.filter(setting=board["setting"][0])
    assert shown.metrics["best_value"] == block["value"].max()
    # Two baselines once for the model, the probe at two layers.
    assert shown.metrics["n_configurations"] == block.height


def test_controls_are_fitted_beside_the_recipes_and_stand_in_no_ranking(plan: Plan) -> None:
    cell = (str(SITE), f"{CORRECT}@s00")
    index = table(plan, "probe_fits", cell, "fits.parquet")
    assert index["recipe"].to_list()[3:] == ["linear_probe_control"]
    assert set(read_scores(plan, SITE, Trial(CORRECT, 0))["recipe"]) == {
        "position_baseline",
        "text_only_baseline",
        "linear_probe",
    }
    controls = read_control_scores(plan, SITE, Trial(CORRECT, 0))
    assert set(controls["recipe"]) == {"linear_probe"}
    assert "linear_probe_control" not in (
        set(table(plan, "leaderboard", (), "leaderboard.parquet")["recipe"])
    )
    # The control's anchors are the same in every fold, and of whole kinds of sentences.
    per_sentence = controls.group_by("problem_id", "sentence_idx").agg(
        pl.col("is_positive").n_unique()
    )
    assert per_sentence["is_positive"].to_list() == [1] * per_sentence.height
    (row,) = table(plan, "evaluation", (str(SITE), CORRECT), "selectivity.parquet").to_dicts()
    assert row["n_problems"] + row["n_undefined"] == 6
    assert row["task_value"] - row["control_value"] == pytest.approx(row["selectivity"])
    shown = describe(plan, "evaluation", (str(SITE), CORRECT)).metrics
    assert shown["selectivity/linear_probe"] == row["selectivity"]
    assert shown["control_value/linear_probe"] == row["control_value"]
    page = (plan.open("study_report").path / "report.html").read_text()
    assert "Could the probe have memorised it?" in page


def test_without_controls_nothing_is_said_of_them(own: Plan) -> None:
    values = own.study.model_dump(mode="json")
    values["evaluation"]["selectivity"] = {"recipes": []}
    plan = open_plan(parse_study(yaml.safe_dump(values), "s.yaml"), own.data_root)
    for stage in MADE:
        for cell, outcome in run_stage(plan, stage, cells_of(plan.study, stage)):
            if stage == "evaluation":
                tables = outcome.artifact.read_table("selectivity.parquet")
                assert tables.is_empty(), cell
    page = (plan.open("study_report").path / "report.html").read_text()
    assert "Could the probe have memorised it?" not in page


def test_the_report_says_what_the_leaderboard_says_and_loads_nothing(plan: Plan) -> None:
    ((_, outcome),) = run_stage(plan, "study_report", [()])
    page = (outcome.artifact.path / "report.html").read_text()
    assert outcome.is_reused
    for wanted in (
        "linear_probe",
        "text_only_baseline",
        CORRECT,
        plan.key("leaderboard").fingerprint,
    ):
        assert wanted in page
    for fetched in ("<script src", "<link", 'src="http', "url(http"):
        assert fetched not in page


def test_the_demo_world_is_built_once(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_data, "write_policy_world", lambda *args: pytest.fail("built again"))
    again = Plan(plan.study, plan.store, plan.data_root, STAGES)
    assert again.demo == plan.demo


def test_of_two_builders_of_the_demo_world_the_first_wins(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert plan.demo is not None
    name = plan.demo.rollouts_folder.parent.name

    def build(folder: Path, *args: object) -> None:
        for each, owner in ((folder, "second"), (tmp_path / "demo" / name, "first")):
            each.mkdir(parents=True)
            (each / "owner").write_text(owner)

    monkeypatch.setattr(demo_data, "write_policy_world", build)
    found = Plan(plan.study, plan.store, tmp_path, STAGES).demo
    assert found is not None
    assert found.rollouts_folder == tmp_path / "demo" / name / "rollouts"
    assert (tmp_path / "demo" / name / "owner").read_text() == "first"
    assert [entry.name for entry in (tmp_path / "demo").iterdir()] == [name]


def test_a_mirror_has_no_demo_world(plan: Plan) -> None:
    values: Mapping[str, Any] = plan.study.model_dump(mode="json")
    values["rollouts"]["source"] = {"kind": "mirror", "folder": "/nowhere"}
    values["models"]["tiny"]["tokenizer"] = "/nowhere/tokenizer"
    mirror = parse_study(yaml.safe_dump(values), "mirror.yaml")
    other = Plan(mirror, plan.store, plan.data_root, STAGES)
    assert other.demo is None
    assert other.source.identity() == {"kind": "mirror", "folder": "/nowhere"}


def test_torch_keeps_its_random_state(own: Plan) -> None:
    without_activations(own)
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    list(run_stage(own, "activations", [(str(SITE), CORRECT)]))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_an_evaluation_is_the_same_to_the_last_bit(plan: Plan) -> None:
    trials = [Trial(CORRECT, seed) for seed in plan.study.seeds]
    scores = {trial.seed: read_scores(plan, SITE, trial) for trial in trials}
    labels = table(plan, "labels", ("tiny", CORRECT), "labels.parquet")
    stored = table(plan, "evaluation", (str(SITE), CORRECT), "metrics.parquet")
    targets = {recipe.name: recipe.target for recipe in plan.study.recipes}
    for _ in range(20):
        tables = evaluate(scores, labels, plan.study.evaluation, targets)
        assert tables.metrics.equals(stored)
