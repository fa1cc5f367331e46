"""Targets and estimators are entries: both sides of each registry, and a new one of each."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields, replace

import numpy as np
import polars as pl
import pytest
from numpy.typing import NDArray

from taprobe_core.errors import ConfigError
from taprobe_core.evaluation.evaluate import evaluate
from taprobe_core.evaluation.selection import select_on_validation
from taprobe_core.keys import Site
from taprobe_core.probes import Contents, Design, Fit, FittedProbe, Training, fit_batches
from taprobe_core.probes.features import ProbeData
from taprobe_core.probes.fitted import Rows, Solver, SolverResult, scores_of
from taprobe_core.probes.inputs import dense_matrix
from taprobe_core.probes.registry import SOLVERS
from taprobe_core.probes.targets import (
    MAKERS,
    MEASURED,
    Measurement,
    TargetMaker,
    setting_of,
    target_values,
)
from taprobe_core.solvers.networks.solve import NetworkOptions
from taprobe_core.solvers.tokens.pooling import TokenProbeOptions
from taprobe_core.splits import make_folds
from taprobe_core.study import (
    ESTIMATORS,
    TARGETS,
    EstimatorEntry,
    Labels,
    ProbeRecipe,
    Study,
    Sweep,
    TargetEntry,
    TokenProbe,
    parse_study,
)
from taprobe_core.study.estimators import EstimatorSetting, EstimatorSettings, Tuning
from taprobe_core.study.schema import study_schema
from taprobe_core.study.targets import (
    TargetConfiguration,
    TargetFactors,
    TargetSetting,
    TargetSettings,
    target_settings,
)
from taprobe_core.sweep.boards import configuration_table, recipe_table
from taprobe_core.sweep.space import SweepSpace, grid, uses_of
from taprobe_core.tables import LABEL_STATUS, LABELS, check_table, schema_of

# What a new target is: an entry, and how labels become its values.

ENDING = TargetEntry(
    "ending_importance",
    (TargetSetting("window", 2, 1, is_whole=True, factor="windows"),),
    is_importance=False,
    reads=("n_sentences",),
)


def ending(measured: Measurement) -> NDArray[np.float64]:
    """Importance of the last sentences of a trace, 0 elsewhere."""
    left = measured.rows["n_sentences"] - measured.rows["sentence_idx"]
    is_late = (left <= setting_of(measured.recipe, "window")).to_numpy()
    return np.where(is_late, np.abs(measured.effect), 0.0)


# What a new estimator is: an entry, and how it is solved and scores.

CENTROID = EstimatorEntry(
    "centroid", (EstimatorSetting("regularization", is_tuned=True),), is_stochastic=False
)


def solve(design: Design, fits: Sequence[Fit], device: str, keep_weights: bool) -> SolverResult:
    """Weigh each feature by how it goes along with the target."""
    X = dense_matrix(fits[0].recipe, design.data)
    assert X is not None
    columns, n_folds = design.columns(fits), len(design.folds)
    penalty = np.repeat([fit.recipe.regularization for fit in fits], n_folds)
    total = columns.weight.sum(axis=0)
    centred = columns.y - (columns.y * columns.weight).sum(axis=0) / total
    coef = X.T @ (columns.weight * centred) / (total + penalty)

    def probe(fit: Fit, column: int) -> FittedProbe:
        arrays = {"mean": np.zeros(X.shape[1]), "scale": np.ones(X.shape[1])}
        arrays["coef"] = coef[:, column]
        fold = design.folds[column % n_folds]
        return FittedProbe(fit.recipe, fold, fit.seed, arrays, None, Training(1, True))

    n_iter = np.ones(coef.shape[1], dtype=np.int64)
    return SolverResult(scores_of(X @ coef, fits[0].recipe), n_iter, probe)


def decide(probe: FittedProbe, X: Rows, texts: Sequence[str]) -> NDArray[np.float64]:
    return probe.inputs(X, texts) @ probe.arrays["coef"]


CENTROID_SOLVER = Solver(solve, decide, lambda recipe, n: n, per_model=("regularization",))


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TARGETS, ENDING.name, ENDING)
    monkeypatch.setitem(MAKERS, ENDING.name, TargetMaker(ending))
    monkeypatch.setitem(ESTIMATORS, CENTROID.name, CENTROID)
    monkeypatch.setitem(SOLVERS, CENTROID.name, CENTROID_SOLVER)


HEAD = """
name: registries
rollouts:
  source: {kind: policy, n_problems: 4, n_rollouts: 4}
models:
  tiny:
    rollouts_dir: tiny
    checkpoint: {kind: stand_in, architecture: llama, n_layers: 2, d_model: 16}
    n_layers: 2
    layers: [0]
settings: [correct_base_solution]
"""
STUDY = (
    HEAD
    + """
probes:
  target: ending_importance
  recipes:
    - {name: position_baseline, features: [position]}
    - {name: far, features: [activations], window: 5}
    - {name: centroid, features: [activations], estimator: centroid, regularization: 0.5}
    - {name: absolute, features: [activations], target: importance_abs}
evaluation: {baselines: [position_baseline], n_bootstrap: 20, n_null: 0}
"""
)
CAMPAIGN = (
    HEAD
    + """
labels: {drop_last_sentence: false}
activations: {poolings: [mean]}
probes:
  recipes:
    - {name: position_baseline, features: [position]}
    - {name: centroid, features: [activations], estimator: centroid}
evaluation: {baselines: [position_baseline]}
sweep:
  targets: [ending_importance, anchor_binary]
  percentiles: [80]
  windows: [1, 3]
  drop_last_sentence: [false, true]
  poolings: [mean]
  residualize: [none, position]
"""
)


def data_of(n_problems: int = 6, n_sentences: int = 8) -> ProbeData:
    rng = np.random.default_rng(5)
    n = n_problems * n_sentences
    problem_id = np.repeat(np.arange(n_problems), n_sentences)
    index = np.tile(np.arange(n_sentences), n_problems)
    activations = rng.normal(size=(n, 5)).astype(np.float32)
    signed = np.tanh(activations[:, 0].astype(np.float64))
    counts = dict.fromkeys(("n_rollouts", "n_correct", "n_dissimilar", "n_dissimilar_correct"), 9)
    labels = pl.DataFrame(
        {
            "problem_id": problem_id,
            "sentence_idx": index,
            "n_sentences": np.full(n, n_sentences),
            "function_tag": ["unknown"] * n,
            "importance_signed": signed,
            "importance_abs": np.abs(signed),
            "is_anchor": np.abs(signed) > 0.8,
            **counts,
            "importance_se": 0.1,
            "label_status": pl.Series(["measured"] * n, dtype=pl.Enum(LABEL_STATUS)),
            "true_importance": None,
            "is_true_anchor": None,
        }
    ).cast(schema_of(LABELS))
    position = np.column_stack([index, index / (n_sentences - 1)]).astype(np.float32)
    return ProbeData(
        labels=check_table(labels, LABELS, "test"),
        texts=["so we add"] * n,
        position=position,
        causal_position=position[:, :1],
        activations={"mean": activations},
        tokens=None,
    )


def design_of(study: Study, data: ProbeData) -> Design:
    return Design(data, tuple(make_folds(data.problems, study.splits)), study.splits, study.labels)


def test_both_sides_of_a_registry_know_the_same_names() -> None:
    assert set(TARGETS) == set(MAKERS)
    assert set(ESTIMATORS) == set(SOLVERS)
    assert all(name == entry.name for name, entry in (*TARGETS.items(), *ESTIMATORS.items()))


def test_an_entry_names_fields_that_there_are_and_no_field_is_nobody_s() -> None:
    own = set(target_settings())
    assert own == set(TargetSettings.model_fields)
    assert own == {each.name for each in fields(TargetConfiguration)}
    factors = {each.factor for each in target_settings().values()}
    assert factors == set(TargetFactors.model_fields)
    for target in TARGETS.values():
        assert set(target.factors.values()) <= set(Sweep.model_fields)
        assert target.value_of in {None, *TARGETS}
        assert set(target.undefined_by or ()) <= set(target.setting_names)
        assert set(target.reads) <= set(LABELS.columns) - set(MEASURED)
    read, tuned = set(), set()
    for estimator in ESTIMATORS.values():
        known = EstimatorSettings if estimator.part is None else TokenProbe
        names = {each.name for each in estimator.settings}
        assert names <= set(known.model_fields)
        read |= names if estimator.part is None else {estimator.part}
        tuned |= {each.name for each in estimator.settings if each.is_tuned}
    assert read == set(EstimatorSettings.model_fields)
    assert tuned == set(Tuning.model_fields)


@pytest.mark.parametrize("setting", target_settings().values(), ids=lambda setting: setting.name)
def test_the_range_of_a_setting_is_that_of_its_field(setting: TargetSetting) -> None:
    for value in (setting.low - 1, setting.high + 1):
        if np.isfinite(value):
            with pytest.raises(ValueError, match=setting.name):
                TargetSettings.model_validate({setting.name: value})
    inside = setting.low + 1 if setting.is_whole else (setting.low + setting.high) / 2
    assert getattr(TargetSettings.model_validate({setting.name: inside}), setting.name) == inside
    with pytest.raises(ValueError, match=setting.name):
        TargetSettings.model_validate({setting.name: "some"})


def test_settings_are_called_and_preset_alike_in_studies_and_solvers() -> None:
    tokens = TokenProbe().model_dump()
    options = asdict(TokenProbeOptions("attention"))
    own = {name: value for name, value in options.items() if name not in ("pooling", "loss")}
    assert own == {name: value for name, value in tokens.items() if name != "loss"}
    network, recipe = asdict(NetworkOptions()), EstimatorSettings()
    assert (network["hidden"], network["max_iter"]) == (recipe.hidden, recipe.max_iter)


def test_an_entry_that_contradicts_itself_is_refused() -> None:
    with pytest.raises(ConfigError, match="class whose scores rank nothing") as caught:
        TargetEntry("odd", is_binary=True, ranks_anchors=False)
    assert "ranks_anchors" in str(caught.value.fix)


def test_a_target_finds_the_class_that_it_says() -> None:
    """A drop of success is the class, whatever is most important."""
    entry = TargetEntry("drop", is_binary=True, value_of="importance_abs")
    maker = replace(MAKERS["importance_abs"], positive=lambda measured: measured.effect < -0.5)
    recipe = ProbeRecipe(name="drop", features=("position",))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TARGETS, entry.name, entry)
        patch.setitem(MAKERS, entry.name, maker)
        labels = data_of().labels
        found = target_values(labels, recipe.resolved("drop", 90), Labels())
        assert recipe.resolved("drop", 90).is_binary
    signed = labels["importance_signed"].to_numpy()
    np.testing.assert_array_equal(found.y, signed < -0.5)
    np.testing.assert_array_equal(found.value, np.abs(signed))
    with pytest.raises(ConfigError, match="without a target"):
        target_values(labels, recipe, Labels())


def test_a_setting_that_no_sweep_varies_keeps_its_default_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    setting = replace(ENDING.settings[0], default=3, factor=None)
    monkeypatch.setitem(TARGETS, ENDING.name, replace(ENDING, settings=(setting,)))
    monkeypatch.setitem(ESTIMATORS, CENTROID.name, CENTROID)
    study = parse_study(CAMPAIGN, "study.yaml")
    assert study.sweep is not None
    own = [
        each
        for each in SweepSpace(study.sweep, study).stage1()
        if each.target == "ending_importance"
    ]

    assert [each.window for each in own] == [3, 3]


def test_an_unknown_name_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(ConfigError, match="ending_importance") as caught:
        parse_study(STUDY, "study.yaml")
    assert "set probes.target to one of anchor_binary, importance_abs" in str(caught.value)
    assert "linear, mlp, attention" in str(caught.value)


@pytest.mark.usefixtures("registered")
def test_a_study_takes_a_new_target_and_estimator() -> None:
    study = parse_study(STUDY, "study.yaml")
    recipes = {recipe.name: recipe for recipe in study.recipes}

    assert [recipe.window for recipe in recipes.values()] == [2, 5, 2, None]
    assert recipes["centroid"].content() == {
        **{"features": ["activations"], "pooling": "mean", "estimator": "centroid"},
        **{"target": "ending_importance", "window": 2, "regularization": 0.5},
        **{"weights": "none", "residualize": "none"},
    }
    assert not recipes["centroid"].is_stochastic
    properties = study_schema()["$defs"]["ProbeRecipe"]["properties"]
    assert "ending_importance" in properties["target"]["anyOf"][0]["enum"]
    assert "centroid" in properties["estimator"]["enum"]
    with pytest.raises(ConfigError, match="use estimator: linear, or take text out"):
        parse_study(STUDY.replace("[activations], estimator", "[text], estimator"), "study.yaml")
    with pytest.raises(ConfigError, match="use target: windowed_change or ending_importance"):
        parse_study(
            STUDY.replace("target: importance_abs", "target: importance_abs, window: 3"), ""
        )


@pytest.mark.usefixtures("registered")
def test_a_new_target_and_estimator_are_hashed_fitted_and_selected_on() -> None:
    study, data = parse_study(STUDY, "study.yaml"), data_of()
    design = design_of(study, data)
    fits = [Fit(recipe, 0) for recipe in study.recipes]
    contents = [Contents(design).of(fit) for fit in fits]
    longer = data.labels.with_columns(n_sentences=pl.col("n_sentences") + 1)
    changed = Contents(design_of(study, ProbeData(**{**vars(data), "labels": longer})))
    assert len(set(contents)) == len(fits)
    # Only the target that reads it is another one where `n_sentences` is.
    assert [changed.of(fit) == name for fit, name in zip(fits, contents, strict=True)] == [
        *(False, False, False, True)
    ]

    found = {fit.recipe.name: fitted for fit, fitted in fit_batches(design, fits)}
    keyed = data.keys.with_row_index("row")
    late = found["centroid"].scores.filter(pl.col("target_value") > 0)
    assert set(late["sentence_idx"]) == {6, 7}
    for probe in found["centroid"].probes:
        own = found["centroid"].scores.filter(fold=probe.fold.index, protocol=probe.fold.protocol)
        rows = own.join(keyed, on=["problem_id", "sentence_idx"], maintain_order="left")["row"]
        np.testing.assert_allclose(own["score"], probe.scores(data)[rows.to_numpy()], atol=1e-6)

    scores = pl.concat(each.scores for each in found.values())
    targets = {recipe.name: recipe.target for recipe in study.recipes}
    tables = evaluate({0: scores}, data.labels, study.evaluation, targets)
    metrics = tables.metrics.filter(split="test", recipe="centroid")
    assert metrics["primary_metric"].unique().to_list() == ["spearman"]
    assert metrics["label_spearman"].null_count() == metrics.height
    assert metrics["label_pr_auc"].null_count() == 0
    chosen = select_on_validation(
        [(Site("tiny", 0), "correct", tables)], recipes=study.recipes, evaluation=study.evaluation
    )
    assert {"centroid", "far", "absolute"} < set(chosen["recipe"])
    joint = chosen.filter(recipe="any_activation_probe")
    # `far` has another window than the baseline, `absolute` another target.
    assert {name for row in joint["chosen"] for name in row} == {"centroid@L00"}


@pytest.mark.usefixtures("registered")
def test_a_sweep_varies_what_the_entries_say() -> None:
    study = parse_study(CAMPAIGN, "study.yaml")
    assert study.sweep is not None
    space = SweepSpace(study.sweep, study)
    first = space.stage1()

    # Two windows; one percentile with and without the last sentence.
    assert len(first) == 2 * (2 + 2)
    assert {(each.target, each.window, each.drop_last_sentence) for each in first} == {
        ("ending_importance", 1, False),
        ("ending_importance", 3, False),
        ("anchor_binary", None, False),
        ("anchor_binary", None, True),
    }
    table = configuration_table(space, first)
    assert table.filter(target="ending_importance")["window"].unique().sort().to_list() == [1, 3]
    assert table["config_id"].n_unique() == len(first)
    recipes = recipe_table(space, first)
    assert recipes["recipe"].str.starts_with("centroid_on_activations_ending_importance_").any()

    kind = space.kinds[1]
    points = list(grid(kind, "ending_importance", study.sweep.tuning))
    assert points == [{"regularization": value} for value in study.sweep.tuning.regularization]
    uses = {use.swept.name for each in first for use in uses_of(space, each)}
    # Per target and factors the baseline, and the kind as it is and on residuals.
    assert len(uses) == 4 * (1 + 2)


@pytest.mark.usefixtures("registered")
def test_a_target_that_no_sweep_varies_is_refused_there(monkeypatch: pytest.MonkeyPatch) -> None:
    fixed = TargetEntry("fixed_target", is_swept=False)
    monkeypatch.setitem(TARGETS, fixed.name, fixed)

    with pytest.raises(ConfigError, match="fixed_target, which no sweep varies") as caught:
        parse_study(CAMPAIGN.replace("[ending_importance,", "[fixed_target,"), "study.yaml")
    assert "ending_importance" in str(caught.value)
    assert ProbeRecipe(name="own", features=("position",), target="fixed_target").is_binary is False


def test_the_study_knows_its_entries_without_what_computes_them() -> None:
    heavy = ("torch", "sklearn", "scipy", "polars", "transformers")
    code = (
        "import sys; from taprobe_core.study import ESTIMATORS, TARGETS; "
        f"assert ESTIMATORS and TARGETS; print([n for n in {heavy} if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert done.stdout.strip() == "[]"
