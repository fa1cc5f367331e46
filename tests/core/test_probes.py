from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from scipy.sparse import csr_matrix
from threadpoolctl import threadpool_info, threadpool_limits

from taprobe_core.errors import (
    CorruptArtifactError,
    DataError,
    LeakageError,
    MissingArtifactError,
    NonFiniteError,
    NotEnoughDataError,
    StaleArtifactError,
)
from taprobe_core.features import ProbeData
from taprobe_core.probes import RecipeFit, Training, fit_recipe, load_probes, save_probes
from taprobe_core.probes import fit as module
from taprobe_core.probes.inputs import input_frame
from taprobe_core.probes.pipeline import fit_pipeline
from taprobe_core.splits import Fold, make_folds
from taprobe_core.study.config import DEFAULT_RECIPES, ProbeRecipe, Splits, Target
from taprobe_core.tables import SCORES, check_table

WORDS = np.array(
    ["so", "we", "add", "carry", "then", "check", "whether", "seven", "eight", "=", "x"]
)
TARGETS: tuple[Target, ...] = ("anchor_binary", "importance_abs", "importance_signed")
EVERYTHING = ProbeRecipe(name="everything", features=("position", "text", "activations"))
TEXT_MLP = ProbeRecipe(
    name="text_mlp", features=("text", "position"), estimator="mlp", hidden=(8,), max_iter=5
)
RECIPES = (*DEFAULT_RECIPES, EVERYTHING, TEXT_MLP)
# Each block and each estimator, small.
FEW = (DEFAULT_RECIPES[0], EVERYTHING, TEXT_MLP)
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
    length = rng.integers(3, 40, n)
    relative = index / (n_sentences - 1)
    position = np.column_stack([index, np.full(n, n_sentences), relative, length])
    return ProbeData(
        keys=pl.DataFrame({"problem_id": problem_id, "sentence_idx": index}),
        problem_id=problem_id,
        position=position.astype(np.float32),
        texts=[" ".join(rng.choice(WORDS, 5)) for _ in range(n)],
        activations=activations,
        importance_abs=np.abs(signed),
        importance_signed=signed,
        is_anchor=np.abs(signed) > 0.7,
    )


@pytest.fixture(scope="module")
def data() -> ProbeData:
    return _data()


@pytest.fixture(scope="module")
def folds(data: ProbeData) -> list[Fold]:
    return make_folds(data.problems, Splits())[:4]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_scores_are_those_of_the_fitted_pipeline(
    recipe: ProbeRecipe, target: Target, data: ProbeData, folds: list[Fold]
) -> None:
    fold = folds[1]
    frame, rows = input_frame(recipe, data), data.rows(fold.train)
    pipeline, training = fit_pipeline(
        recipe, target, frame[rows], data.target(target)[rows], 3, "test"
    )
    is_binary = target == "anchor_binary"
    expected = pipeline.predict_proba(frame)[:, 1] if is_binary else pipeline.predict(frame)

    probe = fit_recipe(recipe, target, data, [fold], seed=3).probes[0]

    np.testing.assert_allclose(probe.predict(data), expected, atol=1e-6)
    assert probe.training == training


@by_name
@pytest.mark.parametrize("target", ["anchor_binary", "importance_signed"])
def test_scores_cover_validation_and_test_and_are_what_the_probes_say(
    recipe: ProbeRecipe, target: Target, data: ProbeData, folds: list[Fold], tmp_path: Path
) -> None:
    fit = fit_recipe(recipe, target, data, folds, seed=1)
    save_probes(tmp_path, fit)

    check_table(fit.scores, SCORES, "test")
    assert fit.scores["recipe"].unique().to_list() == [recipe.name]
    keyed = data.keys.with_row_index("row")
    for probe in load_probes(tmp_path):
        fold = probe.fold
        own = fit.scores.filter(protocol=fold.protocol, fold=fold.index)
        for split, side in (("val", fold.val), ("test", fold.test)):
            scored = own.filter(split=split).join(keyed, on=["problem_id", "sentence_idx"])
            assert sorted(scored["row"]) == data.rows(side).tolist()
            predicted = probe.predict(data)[scored["row"].to_numpy()]
            np.testing.assert_allclose(scored["score"].to_numpy(), predicted, atol=1e-6)
        assert len(own) == len(data.rows(fold.val + fold.test))


@by_name
def test_saved_probes_come_back_bit_equal(
    recipe: ProbeRecipe, data: ProbeData, folds: list[Fold], tmp_path: Path
) -> None:
    fit = fit_recipe(recipe, "anchor_binary", data, folds, seed=4)
    save_probes(tmp_path, fit)

    loaded = load_probes(tmp_path)

    assert len(loaded) == len(folds)
    for back, probe in zip(loaded, fit.probes, strict=True):
        for name in ("recipe", "target", "fold", "seed", "terms", "training"):
            assert getattr(back, name) == getattr(probe, name)
        assert back.arrays.keys() == probe.arrays.keys()
        for name, array in probe.arrays.items():
            np.testing.assert_array_equal(back.arrays[name], array)
            assert back.arrays[name].dtype == array.dtype


@by_name
def test_the_same_fit_gives_the_same_bytes(
    recipe: ProbeRecipe, data: ProbeData, folds: list[Fold], tmp_path: Path
) -> None:
    fits = [fit_recipe(recipe, "anchor_binary", data, folds[:2], seed=4) for _ in range(2)]
    for name, each in zip("ab", fits, strict=True):
        (tmp_path / name).mkdir()
        save_probes(tmp_path / name, each)

    assert fits[0].scores.equals(fits[1].scores)
    for name in ("probes.safetensors", "probes.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@by_name
def test_a_probe_depends_on_its_training_problems_alone(
    recipe: ProbeRecipe, data: ProbeData, folds: list[Fold]
) -> None:
    fold = folds[0]
    others = data.rows(fold.val + fold.test)
    changed = _data(seed=99)
    assert data.activations is not None
    assert changed.activations is not None
    mixed = replace(
        data,
        activations=data.activations.copy(),
        position=data.position.copy(),
        texts=list(data.texts),
        is_anchor=data.is_anchor.copy(),
    )
    assert mixed.activations is not None
    mixed.activations[others] = changed.activations[others]
    mixed.position[others] += 100
    mixed.is_anchor[others] ^= True
    for row in others:
        mixed.texts[row] = "unseen words only"

    before, after = (
        fit_recipe(recipe, "anchor_binary", rows, [fold], seed=0).probes[0]
        for rows in (data, mixed)
    )

    assert before.terms == after.terms
    for name, array in before.arrays.items():
        np.testing.assert_array_equal(array, after.arrays[name])


def test_constant_features_are_only_centred(data: ProbeData, folds: list[Fold]) -> None:
    linear = next(recipe for recipe in RECIPES if recipe.name == "linear_probe")
    # Problem 0 is the only one with a value in feature 2; leave it out of training.
    fold = next(fold for fold in folds if fold.test == (0,) and fold.protocol == "lopo")

    probe = fit_recipe(linear, "anchor_binary", data, [fold], seed=0).probes[0]

    assert probe.arrays["scale"][[0, 2]].tolist() == [1.0, 1.0]
    assert np.isfinite(probe.predict(data)).all()
    np.testing.assert_allclose(probe.arrays["coef"][[0, 2]], 0.0, atol=1e-12)


def test_only_a_network_depends_on_the_seed(data: ProbeData, folds: list[Fold]) -> None:
    for recipe in FEW:
        first, second = (
            fit_recipe(recipe, "anchor_binary", data, folds[:1], seed).scores["score"]
            for seed in (0, 1)
        )
        assert first.equals(second) is not recipe.is_stochastic


def test_how_training_ended_is_kept(data: ProbeData, folds: list[Fold], tmp_path: Path) -> None:
    save_probes(tmp_path, fit_recipe(TEXT_MLP, "importance_abs", data, folds[:2], seed=0))

    for probe in load_probes(tmp_path):
        n_rows = len(data.rows(probe.fold.train))
        assert probe.training == Training(
            5, False, f"on: 10 % of {n_rows} training rows held out, watched by R^2"
        )


@pytest.mark.parametrize(("limit", "expected"), [(10**9, {1}), (0, None)])
def test_small_data_is_fitted_on_one_thread(
    limit: int,
    expected: set[int] | None,
    data: ProbeData,
    folds: list[Fold],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def threads() -> set[int]:
        return {pool["num_threads"] for pool in threadpool_info()}

    seen = []
    monkeypatch.setattr(module, "MAX_VALUES_ON_ONE_THREAD", limit)
    monkeypatch.setattr(
        module, "fit_pipeline", lambda *args: (seen.append(threads()), fit_pipeline(*args))[1]
    )
    with threadpool_limits(2):
        fit_recipe(RECIPES[2], "importance_abs", data, folds[:1], seed=0)
        after = threads()

    assert seen == [expected or after]
    assert after != {1}


def test_one_class_in_training_names_fold_and_problems(data: ProbeData) -> None:
    calm = replace(data, is_anchor=data.problem_id == 10)
    fold = Fold("lopo", 1, (0, 20, 30), (40,), (10,))

    with pytest.raises(NotEnoughDataError, match=r"no anchor.*\[0, 20, 30\].*lopo fold 1"):
        fit_recipe(RECIPES[0], "anchor_binary", calm, [fold], seed=0)
    only = replace(fold, train=(10,), test=(0,))
    with pytest.raises(NotEnoughDataError, match=r"found anchors.*\[10\]"):
        fit_recipe(RECIPES[0], "anchor_binary", calm, [only], seed=0)


def test_training_without_words_is_refused(data: ProbeData, folds: list[Fold]) -> None:
    mute = replace(data, texts=["x = 2" for _ in data.texts])

    with pytest.raises(NotEnoughDataError, match=r"no word of two letters.*holdout fold 0"):
        fit_recipe(RECIPES[1], "anchor_binary", mute, folds, seed=0)


def test_folds_must_belong_to_the_data(data: ProbeData) -> None:
    with pytest.raises(DataError, match=r"problems \[999\] have no rows.*lopo fold 2"):
        fit_recipe(
            RECIPES[0], "anchor_binary", data, [Fold("lopo", 2, (0, 10), (20,), (999,))], seed=0
        )
    with pytest.raises(LeakageError):
        fit_recipe(
            RECIPES[0], "anchor_binary", data, [Fold("lopo", 2, (0, 10), (20,), (0,))], seed=0
        )


def test_recipes_say_what_data_they_lack(data: ProbeData, folds: list[Fold]) -> None:
    bare = replace(data, activations=None)
    linear = RECIPES[2]

    with pytest.raises(DataError, match="'linear_probe' reads activations"):
        fit_recipe(linear, "anchor_binary", bare, folds, seed=0)
    probe = fit_recipe(linear, "anchor_binary", data, folds[:1], seed=0).probes[0]
    with pytest.raises(DataError, match="the data has 5 features, the probe was fitted on 12"):
        probe.predict(_data(d_model=5))


def test_a_score_that_is_no_number_is_named(data: ProbeData, folds: list[Fold]) -> None:
    assert data.activations is not None
    broken = replace(data, activations=data.activations.copy())
    row = broken.rows(folds[0].test)[4]
    assert broken.activations is not None
    broken.activations[row] = np.nan

    with pytest.raises(
        NonFiniteError, match=r"1 scores of recipe 'linear_probe'.*holdout"
    ) as error:
        fit_recipe(RECIPES[2], "importance_abs", broken, folds[:1], seed=0)

    assert str([data.keys.row(int(row))]) in str(error.value)


@pytest.fixture(scope="module")
def everything(data: ProbeData, folds: list[Fold]) -> RecipeFit:
    return fit_recipe(EVERYTHING, "anchor_binary", data, folds[:2], seed=0)


@pytest.fixture
def saved(everything: RecipeFit, tmp_path: Path) -> Path:
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

    with pytest.raises(StaleArtifactError, match="format is 0, this version reads 1"):
        load_probes(saved)


@pytest.mark.parametrize(
    "changes",
    [{"target": "anchor"}, {"recipe": {"name": "x"}}, {"terms": []}, {"probes": [{}]}, {"seed": 1}],
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


def test_sparse_and_dense_rows_score_alike(saved: Path) -> None:
    probe = load_probes(saved)[0]
    n = len(probe.arrays["coef"])
    X = np.random.default_rng(0).normal(size=(4, n))

    np.testing.assert_allclose(probe.score(csr_matrix(X)), probe.score(X), atol=1e-6)


def test_a_fit_holds_one_probe_per_fold(data: ProbeData, folds: list[Fold]) -> None:
    fit: RecipeFit = fit_recipe(RECIPES[0], "importance_abs", data, folds, seed=0)

    assert [probe.fold for probe in fit.probes] == folds
