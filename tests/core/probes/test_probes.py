from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from sklearn.compose import ColumnTransformer
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.neural_network import MLPClassifier, MLPRegressor
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler

from taprobe_core import devices as devices_module
from taprobe_core.errors import (
    CorruptArtifactError,
    DataError,
    LeakageError,
    MissingArtifactError,
    NonFiniteError,
    NotEnoughDataError,
    StaleArtifactError,
)
from taprobe_core.probes import (
    Contents,
    Design,
    Fit,
    FittedProbe,
    RecipeFit,
    fit_batches,
    load_probes,
    save_probes,
)
from taprobe_core.probes import design as design_module
from taprobe_core.probes import fit as module
from taprobe_core.probes.control_task import control_labels, kinds_of
from taprobe_core.probes.dense import LINEAR, fit_linear
from taprobe_core.probes.design import TARGET_SETTINGS
from taprobe_core.probes.features import ProbeData, TokenSets, text_pipeline
from taprobe_core.probes.inputs import DENSE_BLOCKS
from taprobe_core.splits import Fold, inner_folds, make_folds
from taprobe_core.study import (
    DEFAULT_RECIPES,
    ControlRecipe,
    Labels,
    ProbeRecipe,
    Splits,
    Target,
    TokenProbe,
)
from taprobe_core.study.controls import control_of
from taprobe_core.tables import LABEL_STATUS, LABELS, SCORES, check_table, schema_of

WORDS = np.array(
    ["so", "we", "add", "carry", "then", "check", "whether", "seven", "eight", "=", "x"]
)
TARGETS: tuple[Target, ...] = ("anchor_binary", "importance_abs", "importance_signed")
EVERYTHING = ProbeRecipe(
    name="everything", features=("position", "text", "activations", "causal_position")
)
SMALL_MLP = ProbeRecipe(
    name="small_mlp", features=("activations", "position"), estimator="mlp", hidden=(8,), max_iter=5
)
TOKENS = ProbeRecipe(
    name="tokens",
    features=("tokens",),
    estimator="rolling_multimax",
    token_probe=TokenProbe(width=8, n_heads=2, window=2, max_epochs=4),
)
RESIDUAL = ProbeRecipe(name="residual", features=("activations",), residualize="position_plus_text")
RECIPES = (*DEFAULT_RECIPES, EVERYTHING, SMALL_MLP)
# Each block and each estimator, small.
FEW = (DEFAULT_RECIPES[0], EVERYTHING, SMALL_MLP, TOKENS, RESIDUAL)
by_name = pytest.mark.parametrize("recipe", FEW, ids=lambda recipe: recipe.name)


def _data(n_problems: int = 7, n_sentences: int = 9, d_model: int = 12, seed: int = 0) -> ProbeData:
    rng = np.random.default_rng(seed)
    n = n_problems * n_sentences
    problem_id = np.repeat(np.arange(n_problems) * 10, n_sentences).astype(np.int64)
    index = np.tile(np.arange(n_sentences), n_problems).astype(np.int64)
    activations = rng.normal(size=(n, d_model)).astype(np.float32)
    activations[:, 0] = 3.0  # constant
    activations[:, 1] *= 1e6
    activations[:, 2] = np.where(problem_id == 0, 1.0, 0.0)
    signed = np.tanh(activations[:, 3] + 0.5 * rng.normal(size=n))
    length = rng.integers(1, 5, n)
    relative = index / (n_sentences - 1)
    position = np.column_stack([index, np.full(n, n_sentences), relative, length])
    offsets = np.concatenate(([0], np.cumsum(length)))
    return ProbeData(
        labels=_labels(problem_id, index, signed),
        texts=[" ".join(rng.choice(WORDS, 5)) for _ in range(n)],
        position=position.astype(np.float32),
        causal_position=position[:, [0, 1, 3]].astype(np.float32),
        activations={"mean": activations},
        tokens=TokenSets(rng.normal(size=(offsets[-1], d_model)).astype(np.float32), offsets),
    )


def _labels(problem_id: np.ndarray, index: np.ndarray, signed: np.ndarray) -> pl.DataFrame:
    n = len(signed)
    columns = {
        "problem_id": problem_id,
        "sentence_idx": index,
        "n_sentences": np.full(n, index.max() + 1),
        "function_tag": ["unknown"] * n,
        "importance_signed": signed,
        "importance_abs": np.abs(signed),
        "is_anchor": np.abs(signed) > 0.7,
        **dict.fromkeys(("n_rollouts", "n_correct", "n_dissimilar", "n_dissimilar_correct"), 10),
        "importance_se": 0.1,
        "label_status": "measured",
        "true_importance": None,
        "is_true_anchor": None,
    }
    schema = schema_of(LABELS)
    frame = pl.DataFrame(columns).with_columns(pl.col("label_status").cast(pl.Enum(LABEL_STATUS)))
    return check_table(frame.cast(schema), LABELS, "test")


def design_of(data: ProbeData, folds: Sequence[Fold], splits: Splits | None = None) -> Design:
    return Design(data, tuple(folds), splits or Splits(), Labels(percentile=70))


def fitted(
    recipe: ProbeRecipe, target: Target, data: ProbeData, folds: Sequence[Fold], seed: int = 0
) -> RecipeFit:
    fit = Fit(recipe.resolved(target, 70), seed)
    (found,) = fit_batches(design_of(data, folds), [fit])
    assert found[0] == fit
    return found[1]


@pytest.fixture(scope="module")
def data() -> ProbeData:
    return _data()


@pytest.fixture(scope="module")
def folds(data: ProbeData) -> list[Fold]:
    return make_folds(data.problems, Splits(lopo_validation="smallest"))[:4]


def reference(recipe: ProbeRecipe, target: Target, seed: int) -> Pipeline:
    """The same recipe made of scikit-learn's own parts, at the optimum where there is one."""
    blocks = {"text": text_pipeline(), **{name: StandardScaler() for name in DENSE_BLOCKS}}
    inputs = ColumnTransformer(
        [(name, block, name) for name, block in blocks.items() if name in recipe.features],
        sparse_threshold=1.0,
    )
    is_binary = target == "anchor_binary"
    estimator = Ridge(alpha=recipe.regularization, tol=1e-10)
    if is_binary:
        estimator = LogisticRegression(
            C=recipe.regularization, class_weight="balanced", tol=1e-9, max_iter=10_000
        )
    if recipe.estimator == "mlp":
        network = MLPClassifier if is_binary else MLPRegressor
        estimator = network(
            hidden_layer_sizes=recipe.hidden,
            max_iter=recipe.max_iter,
            early_stopping=True,
            random_state=seed,
            n_iter_no_change=20,
        )
    return Pipeline([("inputs", inputs), ("estimator", estimator)])


def frame_of(recipe: ProbeRecipe, data: ProbeData) -> pl.DataFrame:
    blocks = {
        "text": data.texts,
        "activations": data.activations["mean"],
        "causal_position": data.causal_position,
        "position": data.position,
    }
    return pl.DataFrame(
        [pl.Series(n, block) for n, block in blocks.items() if n in recipe.features]
    )


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_scores_are_those_of_scikit_learn(
    recipe: ProbeRecipe, target: Target, data: ProbeData, folds: list[Fold]
) -> None:
    fold = folds[1]
    rows, design = data.rows(fold.train), design_of(data, [fold])
    y = design.target(recipe.resolved(target, 70)).y[0]
    frame = frame_of(recipe, data)
    peer = reference(recipe, target, 3).fit(frame[rows], y[rows])
    is_binary = target == "anchor_binary"
    expected = peer.predict_proba(frame)[:, 1] if is_binary else peer.predict(frame)

    probe = fitted(recipe, target, data, [fold], seed=3).probes[0]

    tolerance = 2e-3 if recipe.estimator == "mlp" else 1e-4 if is_binary else 1e-6
    np.testing.assert_allclose(probe.scores(data), expected, atol=tolerance)


@by_name
@pytest.mark.parametrize("target", ["anchor_binary", "importance_signed"])
def test_scores_cover_validation_and_test_and_are_what_the_probes_say(
    recipe: ProbeRecipe, target: Target, data: ProbeData, folds: list[Fold], tmp_path: Path
) -> None:
    fit = fitted(recipe, target, data, folds, seed=1)
    save_probes(tmp_path, fit.probes)

    check_table(fit.scores, SCORES, "test")
    assert fit.scores["recipe"].unique().to_list() == [recipe.name]
    keyed = data.keys.with_row_index("row")
    for probe in load_probes(tmp_path):
        fold = probe.fold
        own = fit.scores.filter(protocol=fold.protocol, fold=fold.index)
        for split, side in (("val", fold.val), ("test", fold.test)):
            scored = own.filter(split=split).join(keyed, on=["problem_id", "sentence_idx"])
            assert sorted(scored["row"]) == data.rows(side).tolist()
            predicted = probe.scores(data)[scored["row"].to_numpy()]
            np.testing.assert_allclose(scored["score"].to_numpy(), predicted, atol=1e-5)
        assert len(own) == len(data.rows(fold.val + fold.test))


def test_scores_carry_what_they_are_judged_by(data: ProbeData, folds: list[Fold]) -> None:
    plain = fitted(DEFAULT_RECIPES[2], "anchor_binary", data, folds[:1]).scores
    labels = data.labels.select("problem_id", "sentence_idx", "importance_abs")
    joined = plain.join(labels, on=["problem_id", "sentence_idx"])
    assert joined["target_value"].equals(joined["importance_abs"].alias("target_value"))
    n_anchors = joined.group_by("problem_id").agg(pl.col("is_positive").sum())["is_positive"]
    assert n_anchors.unique().to_list() == [3]  # the top 30 % of nine

    residual = fitted(RESIDUAL, "anchor_binary", data, folds[:1]).scores
    assert not residual["target_value"].equals(plain["target_value"])
    assert (residual.filter("is_positive")["target_value"] > 0).all()

    signed = fitted(DEFAULT_RECIPES[2], "importance_signed", data, folds[:1]).scores
    assert signed["is_positive"].null_count() == signed.height
    change = ProbeRecipe(name="change", features=("position",), window=2)
    late = fitted(change, "windowed_change", data, folds[:1]).scores
    undefined = late.filter(pl.col("target_value").is_null())
    assert set(undefined["sentence_idx"]) == {7, 8}


def test_recipes_solved_together_are_what_they_are_alone(
    data: ProbeData, folds: list[Fold]
) -> None:
    fits = [
        Fit(recipe.resolved(target, 70), seed)
        for recipe in FEW
        for target in ("anchor_binary", "importance_abs")
        for seed in ((0, 1) if recipe.is_stochastic else (0,))
    ]
    together = dict(fit_batches(design_of(data, folds), fits))
    assert list(together) != []
    assert set(together) == set(fits)
    for fit in fits:
        alone = dict(fit_batches(design_of(data, folds), [fit]))[fit]
        one, other = (each.scores["score"].to_numpy() for each in (together[fit], alone))
        np.testing.assert_allclose(one, other, atol=1e-4)


@pytest.mark.parametrize("target", ["anchor_binary", "importance_abs"])
@pytest.mark.parametrize("d_model", [300, 1100])
def test_wide_recipes_that_differ_in_position_are_one_solve_and_what_they_are_alone(
    target: Target, d_model: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = _data(n_sentences=40, d_model=d_model, seed=3)
    folds = make_folds(wide.problems, Splits(lopo_validation="smallest"))[:3]
    recipes = [
        ProbeRecipe(name="plain", features=("activations",)),
        ProbeRecipe(name="placed", features=("position", "activations")),
        ProbeRecipe(name="causal", features=("activations", "causal_position"), regularization=0.5),
        ProbeRecipe(name="moved", features=("activations",), residualize="position"),
        ProbeRecipe(name="texts", features=("activations", "text")),
    ]
    fits = [Fit(recipe.resolved(target, 70), 0) for recipe in recipes]
    n_solves, solve = [], fit_linear

    def counted(design: Design, part: Sequence[Fit], *rest: object) -> object:
        n_solves.append(len(part))
        return solve(design, part, *rest)  # type: ignore[arg-type]

    monkeypatch.setitem(module.SOLVERS, "linear", replace(LINEAR, solve=counted))
    design = design_of(wide, folds)
    together = dict(fit_batches(design, fits))
    assert sorted(n_solves) == [1, 4]
    for fit in fits:
        ((_, alone),) = fit_batches(design_of(wide, folds), [fit])
        one, other = (each.scores["score"].to_numpy() for each in (together[fit], alone))
        np.testing.assert_allclose(one, other, atol=2e-5)
        for mine, theirs in zip(together[fit].probes, alone.probes, strict=True):
            assert mine.fold == theirs.fold
            assert {name: each.shape for name, each in mine.arrays.items()} == {
                name: each.shape for name, each in theirs.arrays.items()
            }
            np.testing.assert_allclose(mine.arrays["mean"], theirs.arrays["mean"], rtol=1e-9)
            np.testing.assert_allclose(mine.scores(wide), theirs.scores(wide), atol=2e-5)


@pytest.mark.parametrize("target", ["anchor_binary", "importance_signed", "windowed_change"])
def test_kinds_of_probes_share_a_target_and_its_baseline(
    data: ProbeData, folds: list[Fold], target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    solved = baselines_solved(monkeypatch)
    own = RESIDUAL.model_copy(update={"window": 2}).resolved(target, 70)
    same = SMALL_MLP.model_copy(
        update={name: getattr(own, name) for name in TARGET_SETTINGS} | {"max_iter": 3}
    )
    design = design_of(data, folds)
    assert design.target(own) is design.target(same)
    assert len(solved) == 1
    alone = design_of(data, folds).target(same)
    for shared, fresh in zip(design.target(own), alone, strict=True):
        np.testing.assert_array_equal(shared, fresh)


def test_a_baseline_is_solved_once_for_each_value_that_targets_are_made_of(
    data: ProbeData, folds: list[Fold], monkeypatch: pytest.MonkeyPatch
) -> None:
    solved = baselines_solved(monkeypatch)
    design = design_of(data, folds)
    some, more, all_ = (
        design.target(RESIDUAL.resolved(*each)).y
        for each in (("anchor_binary", 60), ("anchor_binary", 80), ("importance_abs", 80))
    )
    assert len(solved) == 1
    assert some.sum() > more.sum() > 0
    assert len(np.unique(all_)) > 2
    design.target(RESIDUAL.resolved("importance_signed", 80))
    assert len(solved) == 2


def baselines_solved(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that grows with every baseline that is fitted."""
    solved: list[int] = []
    real = design_module.baseline_predictions

    def counted(*args: Any) -> np.ndarray:
        solved.append(1)
        return real(*args)

    monkeypatch.setattr(design_module, "baseline_predictions", counted)
    return solved


@pytest.mark.parametrize(
    "change",
    [
        {"target": "importance_abs"},
        {"percentile": 50.0},
        {"weights": "inverse_variance"},
        {"residualize": "position"},
        {"residualize": "none"},
        {"target": "windowed_change", "window": 2},
        {"target": "exceeds_threshold", "threshold": 0.3},
    ],
)
def test_what_a_target_reads_is_not_shared(
    data: ProbeData, folds: list[Fold], change: dict[str, Any]
) -> None:
    design, own = design_of(data, folds), RESIDUAL.resolved("anchor_binary", 70)
    other = own.model_copy(update=change)
    first, second = design.target(own), design.target(other)
    fresh = design_of(data, folds).target(other)
    assert any(
        one is None or two is None or one.shape != two.shape or not np.array_equal(one, two)
        for one, two in zip(first, second, strict=True)
    )
    for found, expected in zip(second, fresh, strict=True):
        np.testing.assert_array_equal(found, expected)


def control_of_mean(seed: int = 0) -> ControlRecipe:
    return control_of(DEFAULT_RECIPES[2].resolved("anchor_binary", 70), seed)


def test_a_control_is_one_more_target_of_the_same_solve(
    data: ProbeData, folds: list[Fold], monkeypatch: pytest.MonkeyPatch
) -> None:
    solves = []
    solve = LINEAR.solve

    def counted(design: Design, fits: Sequence[Fit], *rest: object) -> object:
        solves.append([fit.recipe.name for fit in fits])
        return solve(design, fits, *rest)  # type: ignore[arg-type]

    monkeypatch.setitem(module.SOLVERS, "linear", replace(LINEAR, solve=counted))
    task = Fit(DEFAULT_RECIPES[2].resolved("anchor_binary", 70), 0)
    control = Fit(control_of_mean(), 0)
    design = design_of(data, folds)
    together = dict(fit_batches(design, [task, control]))
    assert solves == [["linear_probe", "linear_probe_control"]]
    alone = dict(fit_batches(design, [control]))[control]
    np.testing.assert_allclose(
        together[control].scores["score"].to_numpy(), alone.scores["score"].to_numpy(), atol=1e-4
    )
    # What it is judged by are its own labels; rows and folds are those of the task.
    places = ["problem_id", "sentence_idx", "protocol", "fold", "split"]
    assert together[control].scores.select(places).equals(together[task].scores.select(places))
    anchors = design.target(task.recipe).is_positive
    assert anchors is not None
    labels = control_labels(kinds_of(data), float(anchors.mean()), 0)
    own = data.keys.with_columns(expected=labels)
    joined = together[control].scores.join(own, on=["problem_id", "sentence_idx"])
    assert joined["is_positive"].equals(joined["expected"], check_names=False)
    assert joined["target_value"].equals(joined["expected"].cast(pl.Float64), check_names=False)


def test_a_saved_control_comes_back_as_one(
    data: ProbeData, folds: list[Fold], tmp_path: Path
) -> None:
    ((_, found),) = fit_batches(design_of(data, folds), [Fit(control_of_mean(5), 0)])
    save_probes(tmp_path, found.probes)
    assert [probe.recipe for probe in load_probes(tmp_path)] == [control_of_mean(5)] * len(folds)


def test_a_control_sees_the_kinds_of_sentences_and_its_recipe_does_not(
    data: ProbeData, folds: list[Fold]
) -> None:
    tagged = data.labels.with_columns(
        function_tag=pl.when(pl.col("sentence_idx") == 0)
        .then(pl.lit("plan"))
        .otherwise("function_tag")
    )
    plain, other = (
        Contents(design_of(each, folds)) for each in (data, replace(data, labels=tagged))
    )
    task = Fit(DEFAULT_RECIPES[2].resolved("anchor_binary", 70), 0)
    assert plain.of(task) == other.of(task)
    names = [plain.of(Fit(control_of_mean(seed), 0)) for seed in (0, 1)]
    assert len({*names, plain.of(task), other.of(Fit(control_of_mean(), 0))}) == 4


def test_what_a_fit_sees_does_not_depend_on_how_it_lies_in_memory(
    data: ProbeData, folds: list[Fold]
) -> None:
    recipe = ProbeRecipe(name="looks", features=("vertical_attention",))
    fit = Fit(recipe.resolved("anchor_binary", 70), 0)
    block = np.random.default_rng(1).normal(size=(len(data.texts), 3)).astype(np.float32)
    by_row, by_column, other = (
        Contents(design_of(replace(data, vertical_attention=each), folds)).of(fit)
        for each in (block, np.asfortranarray(block), block[::-1])
    )
    assert by_row == by_column != other


def test_a_control_without_positives_in_training_says_how_to_do_without(data: ProbeData) -> None:
    # The nine sentences of the tested problem are nearer to the base rate than all the others.
    tags = np.where(data.problem_id == 0, "held_out", "training")
    apart = replace(
        data,
        labels=data.labels.with_columns(function_tag=pl.Series(tags)),
        position=np.ones_like(data.position),
    )
    fold = Fold("holdout", 0, (10, 20, 30), (40,), (0, 50, 60))
    with pytest.raises(NotEnoughDataError, match="found no anchor among 27 sentences") as error:
        list(fit_batches(design_of(apart, [fold]), [Fit(control_of_mean(), 0)]))
    assert "set evaluation.selectivity.recipes to []" in str(error.value)


def test_inner_folds_score_every_problem_that_is_not_tested(data: ProbeData) -> None:
    splits = Splits(protocols=("holdout",), inner_folds=3)
    (outer,) = make_folds(data.problems, splits)
    assert outer.val == ()
    design = design_of(data, [outer], splits)
    inner = inner_folds(outer, splits)
    for recipe in (DEFAULT_RECIPES[2], TOKENS):
        ((_, found),) = fit_batches(design, [Fit(recipe.resolved("importance_abs", 70), 0)])
        val = found.scores.filter(split="val")
        assert set(val["problem_id"]) == set(outer.train)
        assert val.select("problem_id", "sentence_idx").is_unique().all()
        assert [probe.fold for probe in found.probes] == [outer]
    # A group's scores come from a probe that saw the other groups alone.
    group = inner[1]
    ((_, alone),) = fit_batches(
        design_of(data, [replace(group, inner=None, test=outer.test)]),
        [Fit(DEFAULT_RECIPES[2].resolved("importance_abs", 70), 0)],
    )
    ((_, nested),) = fit_batches(
        design, [Fit(DEFAULT_RECIPES[2].resolved("importance_abs", 70), 0)]
    )
    on = ["problem_id", "sentence_idx"]
    both = alone.scores.filter(split="val").join(nested.scores.filter(split="val"), on=on)
    assert both.height == len(data.rows(group.val))
    np.testing.assert_allclose(both["score"].to_numpy(), both["score_right"].to_numpy(), atol=1e-6)


@by_name
def test_saved_probes_come_back_bit_equal(
    recipe: ProbeRecipe, data: ProbeData, folds: list[Fold], tmp_path: Path
) -> None:
    fit = fitted(recipe, "anchor_binary", data, folds, seed=4)
    before = os.umask(0o022)
    try:
        save_probes(tmp_path, fit.probes)
    finally:
        os.umask(before)

    # What one user computes, another reads.
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o644}
    loaded = load_probes(tmp_path)

    assert len(loaded) == len(folds)
    for back, probe in zip(loaded, fit.probes, strict=True):
        for name in ("recipe", "fold", "seed", "terms", "training"):
            assert getattr(back, name) == getattr(probe, name)
        assert back.arrays.keys() == probe.arrays.keys()
        for name, array in probe.arrays.items():
            np.testing.assert_array_equal(back.arrays[name], array)
            assert back.arrays[name].dtype == array.dtype


@by_name
def test_the_same_fit_gives_the_same_bytes(
    recipe: ProbeRecipe, data: ProbeData, folds: list[Fold], tmp_path: Path
) -> None:
    fits = [fitted(recipe, "anchor_binary", data, folds[:2], seed=4) for _ in range(2)]
    for name, each in zip("ab", fits, strict=True):
        (tmp_path / name).mkdir()
        save_probes(tmp_path / name, each.probes)

    assert fits[0].scores.equals(fits[1].scores)
    for name in ("probes.safetensors", "probes.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@by_name
def test_a_probe_depends_on_its_training_and_watched_problems_alone(
    recipe: ProbeRecipe, data: ProbeData, folds: list[Fold]
) -> None:
    fold = folds[0]
    others = data.rows(fold.test + (() if recipe.reads_tokens else fold.val))
    changed = _data(seed=99)
    assert data.tokens is not None
    mixed = replace(
        data,
        activations={"mean": data.activations["mean"].copy()},
        tokens=TokenSets(data.tokens.values.copy(), data.tokens.offsets),
        position=data.position.copy(),
        texts=list(data.texts),
        labels=_with_other_labels(data.labels, others),
    )
    assert mixed.tokens is not None
    mixed.activations["mean"][others] = changed.activations["mean"][others]
    mixed.position[others] += 100
    for row in others:
        mixed.texts[row] = "unseen words only"
        mixed.tokens.values[slice(*data.tokens.offsets[[row, row + 1]])] = 7.0

    before, after = (
        fitted(recipe, "anchor_binary", rows, [fold]).probes[0] for rows in (data, mixed)
    )

    assert before.terms == after.terms
    for name, array in before.arrays.items():
        np.testing.assert_allclose(array, after.arrays[name], rtol=1e-6, atol=1e-6)


def _with_other_labels(labels: pl.DataFrame, rows: np.ndarray) -> pl.DataFrame:
    is_other = pl.int_range(pl.len()).is_in(rows.tolist())
    flipped = 0.9 - pl.col("importance_abs")
    return labels.with_columns(
        pl.when(is_other)
        .then(flipped.clip(0, 1))
        .otherwise("importance_abs")
        .alias("importance_abs")
    )


def test_constant_features_are_only_centred(data: ProbeData, folds: list[Fold]) -> None:
    # Problem 0 is the only one with a value in feature 2; leave it out of training.
    fold = next(fold for fold in folds if fold.test == (0,) and fold.protocol == "lopo")

    probe = fitted(DEFAULT_RECIPES[2], "anchor_binary", data, [fold]).probes[0]

    assert probe.arrays["scale"][[0, 2]].tolist() == [1.0, 1.0]
    assert np.isfinite(probe.scores(data)).all()
    np.testing.assert_allclose(probe.arrays["coef"][[0, 2]], 0.0, atol=1e-9)


def test_only_a_stochastic_recipe_depends_on_the_seed(data: ProbeData, folds: list[Fold]) -> None:
    for recipe in FEW:
        first, second = (
            fitted(recipe, "anchor_binary", data, folds[:1], seed).scores["score"]
            for seed in (0, 1)
        )
        assert first.equals(second) is not recipe.is_stochastic


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, "on: 10 % of the training rows held out, watched by R^2"),
        ({"early_stopping": False}, "off: the recipe says so"),
        ({"held_out": "problems"}, "on: the fold's validation problems, watched by loss"),
    ],
)
def test_how_training_ended_is_kept(
    settings: dict[str, object], expected: str, data: ProbeData, folds: list[Fold], tmp_path: Path
) -> None:
    recipe = SMALL_MLP.model_copy(update=settings)
    save_probes(tmp_path, fitted(recipe, "importance_abs", data, folds[:2]).probes)

    for probe in load_probes(tmp_path):
        assert (probe.training.n_iter, probe.training.is_converged) == (5, False)
        assert probe.training.early_stopping == expected


def test_too_few_rows_to_hold_any_out_are_said(data: ProbeData) -> None:
    small = _data(n_problems=3, n_sentences=4)
    probe = fitted(SMALL_MLP, "importance_abs", small, [Fold("lopo", 0, (0, 10), (), (20,))])
    assert probe.probes[0].training.early_stopping == "off: 8 training rows in a fold, 11 needed"


def test_one_class_in_training_names_fold_and_problems(data: ProbeData) -> None:
    is_one = pl.col("problem_id") == 10
    calm = replace(
        data,
        labels=data.labels.with_columns(
            pl.when(is_one).then("importance_abs").otherwise(0.0).alias("importance_abs")
        ),
    )
    fold = Fold("lopo", 1, (0, 20, 30), (40,), (10,))

    with pytest.raises(NotEnoughDataError, match=r"no anchor.*\[0, 20, 30\].*lopo fold 1"):
        fitted(DEFAULT_RECIPES[0], "anchor_binary", calm, [fold])


def test_training_without_words_is_refused(data: ProbeData, folds: list[Fold]) -> None:
    mute = replace(data, texts=["x = 2" for _ in data.texts])

    with pytest.raises(NotEnoughDataError, match="no word"):
        fitted(DEFAULT_RECIPES[1], "anchor_binary", mute, folds)


def test_folds_must_belong_to_the_data(data: ProbeData) -> None:
    with pytest.raises(DataError, match=r"problems \[999\] have no rows.*lopo fold 2"):
        design_of(data, [Fold("lopo", 2, (0, 10), (20,), (999,))])
    with pytest.raises(LeakageError):
        design_of(data, [Fold("lopo", 2, (0, 10), (20,), (0,))])


def test_recipes_say_what_data_they_lack(data: ProbeData, folds: list[Fold]) -> None:
    bare = replace(data, activations={}, tokens=None)
    linear = DEFAULT_RECIPES[2]

    with pytest.raises(DataError, match="'linear_probe' reads activations of pooling mean"):
        fitted(linear, "anchor_binary", bare, folds)
    with pytest.raises(DataError, match="'tokens' reads token sets"):
        fitted(TOKENS, "anchor_binary", bare, folds)
    looking = ProbeRecipe(name="looking", features=("vertical_attention",))
    with pytest.raises(DataError, match="'looking' reads vertical_attention"):
        fitted(looking, "anchor_binary", bare, folds)
    probe = fitted(linear, "anchor_binary", data, folds[:1]).probes[0]
    with pytest.raises(DataError, match=r", 5\], the probe was fitted on 12 features"):
        probe.scores(_data(d_model=5))


def test_a_feature_that_is_no_number_is_refused(data: ProbeData, folds: list[Fold]) -> None:
    broken = replace(data, activations={"mean": data.activations["mean"].copy()})
    broken.activations["mean"][broken.rows(folds[0].test)[4]] = np.nan

    with pytest.raises(NonFiniteError):
        fitted(DEFAULT_RECIPES[2], "importance_abs", broken, folds[:1])


@pytest.fixture(scope="module")
def everything(data: ProbeData, folds: list[Fold]) -> list[FittedProbe]:
    return fitted(EVERYTHING, "anchor_binary", data, folds[:2]).probes


@pytest.fixture
def saved(everything: list[FittedProbe], tmp_path: Path) -> Path:
    save_probes(tmp_path, everything)
    return tmp_path


def _edit(folder: Path, **changes: object) -> None:
    path = folder / "probes.json"
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **changes}), "utf-8")


@pytest.mark.parametrize("name", ["probes.json", "probes.safetensors"])
def test_an_absent_file_is_missing(saved: Path, name: str) -> None:
    (saved / name).unlink()

    with pytest.raises(MissingArtifactError, match=name):
        load_probes(saved)


def test_another_format_is_stale(saved: Path) -> None:
    _edit(saved, format=0)

    with pytest.raises(StaleArtifactError, match="format is 0, this version reads 2"):
        load_probes(saved)


@pytest.mark.parametrize(
    "changes", [{"recipe": {"name": "x"}}, {"terms": []}, {"probes": [{}]}, {"seed": 1}]
)
def test_files_that_do_not_belong_together_are_corrupt(
    saved: Path, changes: dict[str, object]
) -> None:
    if "seed" in changes:
        (saved / "probes.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0nonsense")
    _edit(saved, **changes)

    with pytest.raises(CorruptArtifactError, match="probes cannot be read") as error:
        load_probes(saved)

    assert str(saved) in str(error.value)


def test_terms_are_kept_once_for_all_folds(saved: Path) -> None:
    document = json.loads((saved / "probes.json").read_text("utf-8"))

    chosen = {term for probe in load_probes(saved) for term in probe.terms or ()}
    assert document["terms"] == sorted(chosen)


@pytest.mark.parametrize(("limit", "expected"), [(10**9, 1), (0, 3)])
def test_small_data_is_fitted_on_one_thread_and_large_data_on_all(
    limit: int,
    expected: int,
    data: ProbeData,
    folds: list[Fold],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[int] = []

    def spy(*arguments: object) -> object:
        seen.append(torch.get_num_threads())
        return fit_linear(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(devices_module, "MAX_VALUES_ON_ONE_THREAD", limit)
    monkeypatch.setitem(module.SOLVERS, "linear", replace(LINEAR, solve=spy))
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        fitted(DEFAULT_RECIPES[2], "importance_abs", data, folds[:1])
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert seen == [expected]


def test_work_beside_each_other_comes_back_in_order_and_its_error_where_it_belongs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    begun = []

    def work(item: int) -> int:
        begun.append(item)
        if item == 3:
            raise ValueError(item)
        time.sleep(0.02 * (item % 2))
        return item * item

    assert list(devices_module.side_by_side(work, [5, 2, 4])) == [25, 4, 16]
    found = devices_module.side_by_side(work, [1, 3, *range(10, 60)])
    assert next(found) == 1
    with pytest.raises(ValueError, match="3"):
        next(found)
    assert len(begun) < 50


@pytest.mark.parametrize("n_rows", [1, 200, 2_932, 74_000, 10**9])
@pytest.mark.parametrize("n_weights", [0, 5_120, 5_120 * 100 + 100 * 100, 10**8, 10**10])
def test_a_solve_stays_within_its_bytes_and_takes_what_fits(n_rows: int, n_weights: int) -> None:
    n = module.columns_at_once(n_rows, n_weights)
    per_model = 3 * 8 * n_rows + 4 * n_weights
    assert 1 <= n <= module.MAX_COLUMNS
    assert n == 1 or n * per_model <= module.MAX_HOST_BYTES
    assert n == module.MAX_COLUMNS or (n + 1) * per_model > module.MAX_HOST_BYTES


def _several() -> list[Fit]:
    weak = EVERYTHING.model_copy(update={"name": "weak", "regularization": 1e-3})
    return [
        Fit(recipe.resolved(target, 70), seed)
        for recipe in (*FEW, weak)
        for target in ("anchor_binary", "importance_signed")
        for seed in ((0, 1, 2) if recipe.is_stochastic else (0,))
    ]


def test_without_probes_scores_and_iterations_are_the_same(
    data: ProbeData, folds: list[Fold]
) -> None:
    kept = dict(fit_batches(design_of(data, folds), _several()))
    slim = dict(fit_batches(design_of(data, folds), _several(), keep_probes=False))
    assert list(slim) == list(kept)
    for fit, found in slim.items():
        assert not found.probes
        assert found.scores.equals(kept[fit].scores)
        # Each fit's own, of all that were solved with it.
        assert [each.training.n_iter for each in kept[fit].probes] == found.n_iter.tolist()
    steps = {
        fit.recipe.name: found.n_iter.tolist()
        for fit, found in slim.items()
        if fit.recipe.target == "anchor_binary"
    }
    assert steps["weak"] != steps["everything"]


@pytest.mark.parametrize("n_columns", [1, 4, 9])
def test_scores_do_not_depend_on_how_fits_are_divided(
    data: ProbeData, folds: list[Fold], n_columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = dict(fit_batches(design_of(data, folds), _several(), keep_probes=False))
    asked = []

    def few(n_rows: int, n_weights: int) -> int:
        asked.append(n_weights)
        return n_columns

    monkeypatch.setattr(module, "columns_at_once", few)
    divided = dict(fit_batches(design_of(data, folds), _several(), keep_probes=False))
    assert asked
    assert set(asked) == {0}
    assert set(divided) == set(whole)
    for fit, found in divided.items():
        one, other = (each.scores["score"].to_numpy() for each in (whole[fit], found))
        np.testing.assert_allclose(one, other, atol=1e-4)
