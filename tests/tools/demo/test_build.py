"""A build from weights to manifest, at tiny size: whole steps, resumed, refused, and audited."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from taprobe_core.demo import BUNDLE, SETTINGS, choose_problems, write_demo_world
from taprobe_core.demo.bundle import ROLLOUTS, TRUTH, Record, read_records, write_records
from taprobe_core.demo.truth import exact_importance, measures
from taprobe_core.errors import ConfigError, CorruptArtifactError, NotEnoughDataError
from taprobe_core.study.config import DemoSource
from tools.demo import build as building
from tools.demo import training as gates
from tools.demo.audit import check_bundle, finish_build
from tools.demo.build import Recipe, build_demo, recipe_of
from tools.demo.sampling import Reasoner, base_traces
from tools.demo.training import Architecture, Training

CPU = torch.device("cpu")
NAME = "tiny-llama"
# The seed of a problem with short base traces.
RECIPE = Recipe(
    seed=7,
    reasoners={NAME: Architecture("llama")},
    n_problems=1,
    n_candidates=16,
    n_rollouts=4,
    n_forced=2,
    n_truth=2,
    n_truth_problems=1,
    n_gate=9,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]  # a whole build, if a tiny one
STEPS = [f"{NAME}/gates.json", f"{NAME}/{ROLLOUTS}", f"{NAME}/{TRUTH}"]
WEIGHTS = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


def start(folder: Path, recipe: Recipe) -> Path:
    """A build whose training step is done: it has the bundled weights."""
    (folder / NAME).mkdir(parents=True)
    (folder / "recipe.json").write_text(json.dumps(asdict(recipe), indent=2), encoding="utf-8")
    for name in WEIGHTS:
        shutil.copy(BUNDLE / NAME / name, folder / NAME / name)
    return folder


@pytest.fixture
def lenient(monkeypatch: pytest.MonkeyPatch) -> None:
    loosen(monkeypatch)


def loosen(patch: pytest.MonkeyPatch) -> None:
    """The bounds are for thousands of texts; nine say little about a share."""
    patch.setattr(gates, "MIN_FORMAT_VALID", 0.6)
    patch.setattr(gates, "MAX_PLAN_ODDS_ERROR", 0.9)
    patch.setattr(gates, "MIN_ARITHMETIC_RATIO", 0.8)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All steps, no manifest; copy it, do not change it."""
    folder = start(tmp_path_factory.mktemp("build") / "demo", RECIPE)
    with pytest.MonkeyPatch.context() as patch:
        loosen(patch)
        build_demo(folder, RECIPE, CPU)
    return folder


@pytest.fixture(scope="module")
def bundle(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The build with its manifest; copy it, do not change it."""
    folder = Path(shutil.copytree(built, tmp_path_factory.mktemp("bundle") / "demo"))
    # What a killed process leaves behind is no part of the bundle.
    (folder / ".building-killed").mkdir()
    (folder / ".building-killed" / ROLLOUTS).write_bytes(b"half")
    finish_build(folder)
    return folder


@pytest.fixture
def copied(bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle, tmp_path / "bundle"))


def digests(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def load(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def records(folder: Path) -> list[Record]:
    return list(read_records(folder, NAME))


def test_every_step_left_its_file(built: Path) -> None:
    lines = (built / "steps.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [json.loads(line) for line in lines]
    assert [step["step"] for step in steps] == STEPS
    assert all(step["device"] == "cpu" and step["seconds"] > 0 for step in steps)
    assert all(step["torch"] and step["transformers"] for step in steps)
    assert not list(built.glob(".*"))
    assert all((built / name).is_file() for name in STEPS)


def test_records_have_the_recipes_size_and_their_own_measures(built: Path) -> None:
    problems = choose_problems(RECIPE.n_problems, RECIPE.seed)
    found = records(built)
    assert [(record.setting, record.reasoned.problem) for record in found] == [
        (setting, some) for setting in SETTINGS for some in problems
    ]
    for setting, reasoned, measured in found:
        n = len(reasoned.trace.sentences)
        assert reasoned.trace.is_correct is SETTINGS[setting]
        assert [len(bank) for bank in reasoned.rollouts] == [RECIPE.n_rollouts] * n
        assert [len(bank) for bank in reasoned.forced] == [RECIPE.n_forced] * n
        assert measured == measures(reasoned)
        assert {"forced_importance_accuracy", "forced_importance_kl"} < set(measured[0])
        answered = [rest for bank in reasoned.rollouts for rest in bank if rest.answer.isdecimal()]
        assert len(answered) > 0.9 * n * RECIPE.n_rollouts
        assert all(answer.answer for bank in reasoned.forced for answer in bank)


def test_the_truth_is_measured_at_its_own_rollouts(built: Path) -> None:
    rows = load(built / NAME / TRUTH)
    assert [row["setting"] for row in rows] == list(SETTINGS)
    by_setting = {record.setting: record for record in reversed(records(built))}
    for row in rows:
        reasoned = by_setting[row["setting"]].reasoned
        assert (row["problem_id"], row["n_rollouts"]) == (reasoned.problem.id, RECIPE.n_truth)
        assert len(row["measures"]) == len(reasoned.trace.sentences)
        assert {measured["accuracy"] for measured in row["measures"]} <= {0.0, 0.5, 1.0}


@pytest.mark.usefixtures("lenient")
def test_a_finished_step_is_not_made_again(built: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(built, tmp_path / "again"))
    before = digests(folder)
    build_demo(folder, RECIPE, CPU)
    assert digests(folder) == before


@pytest.mark.usefixtures("lenient")
def test_a_stopped_build_goes_on_where_it_was(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(built, tmp_path / "stopped"))
    (folder / NAME / "gates.json").unlink()
    before = digests(folder)

    def stopped(path: Path, _: object) -> None:
        path.write_text("half", encoding="utf-8")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(building, "_write_json", stopped)
        with pytest.raises(KeyboardInterrupt):
            build_demo(folder, RECIPE, CPU)
    assert digests(folder) == before
    assert not list(folder.glob(".building-*"))
    build_demo(folder, RECIPE, CPU)
    after = digests(folder)
    assert after.pop(f"{NAME}/gates.json") == digests(built)[f"{NAME}/gates.json"]
    assert {name for name in after if after[name] != before[name]} == {"steps.jsonl"}


def test_another_recipes_folder_is_refused(built: Path, tmp_path: Path) -> None:
    before = digests(built)
    with pytest.raises(ConfigError, match="holds another build"):
        build_demo(built, replace(RECIPE, seed=8), CPU)
    assert digests(built) == before
    (tmp_path / "mine.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(ConfigError, match="the folder is not empty"):
        build_demo(tmp_path, RECIPE, CPU)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_reasoner_that_fails_its_gates_ends_the_build(tmp_path: Path) -> None:
    folder = start(tmp_path / "bad", RECIPE)
    bad = {"format_valid": 0.5, "plan_odds_error": 0.01, "arithmetic_ratio": 1.0}
    (folder / NAME / "gates.json").write_text(json.dumps(bad), encoding="utf-8")
    with pytest.raises(NotEnoughDataError, match=r"format_valid 0\.5000, not 0\.99 or more"):
        build_demo(folder, RECIPE, CPU)
    assert not (folder / NAME / ROLLOUTS).exists()


def test_one_candidate_cannot_be_right_and_wrong(built: Path) -> None:
    reasoner = Reasoner(built / NAME, CPU)
    with pytest.raises(NotEnoughDataError, match=r"no (right|wrong) base trace in 1 candidates"):
        base_traces(reasoner, 0, NAME, choose_problems(1, 0), n_candidates=1)


def test_training_is_a_step_and_two_names_are_two_reasoners(tmp_path: Path) -> None:
    shape = Architecture("llama", n_layers=1, d_model=16, n_heads=2, n_kv_heads=1)
    recipe = Recipe(
        reasoners={"first": shape, "second": shape},
        training=Training(n_traces=8, n_steps=2, batch_size=4, n_warmup=1),
        n_gate=2,
    )
    with pytest.raises(NotEnoughDataError, match="has not learned enough: format_valid"):
        build_demo(tmp_path / "new", recipe, CPU)
    assert load(tmp_path / "new" / "recipe.json") == asdict(recipe)
    first, second = (tmp_path / "new" / name for name in recipe.reasoners)
    assert {path.name for path in second.iterdir()} >= set(WEIGHTS)
    assert (first / "tokenizer.json").read_bytes() == (second / "tokenizer.json").read_bytes()
    weights = [load_file(folder / "model.safetensors") for folder in (first, second)]
    name = "model.embed_tokens.weight"
    assert not torch.equal(weights[0][name], weights[1][name])


def test_the_manifest_holds_recipe_figures_and_hashes(bundle: Path, built: Path) -> None:
    manifest = load(bundle / "manifest.json")
    assert recipe_of(manifest["recipe"]) == RECIPE
    assert [step["step"] for step in manifest["steps"]] == STEPS
    assert manifest["gates"] == {NAME: load(built / NAME / "gates.json")}
    assert manifest["sha256"] == {
        f"{NAME}/{path.name}": hashlib.sha256(path.read_bytes()).hexdigest()
        for path in (bundle / NAME).iterdir()
    }
    assert {path.name for path in bundle.iterdir() if path.is_file()} == {"manifest.json"}
    figures = manifest["figures"][NAME]
    assert list(figures) == list(SETTINGS)
    for setting, found in figures.items():
        of_setting = [record for record in records(bundle) if record.setting == setting]
        exact = [e for record in of_setting for e in exact_importance(record.reasoned)[:-1]]
        assert found["n_sentences"] == len(exact)
        assert found["share_large"] == pytest.approx(sum(abs(e) > 0.1 for e in exact) / len(exact))
        assert -1 <= found["correlation_with_exact"] <= 1
        assert 0 <= found["truth_largest_distance"] <= 2


def test_a_sound_bundle_passes(bundle: Path) -> None:
    lines = list(check_bundle(bundle, CPU))
    assert len(lines) == 3
    assert (
        lines[0]
        == f"{len(load(bundle / 'manifest.json')['sha256'])} files have the manifest's sha256"
    )
    assert lines[1] == f"{NAME}: measures of 2 traces recomputed, all equal"
    # Two places: a base trace, four rests and two forced answers each.
    assert lines[2] == f"{NAME}: 14 texts sampled again from the weights, all equal"


def rehash(folder: Path) -> None:
    manifest = load(folder / "manifest.json")
    for name in manifest["sha256"]:
        manifest["sha256"][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


def changed(folder: Path, change: Callable[[Record], Record]) -> None:
    found = [change(record) for record in records(folder)]
    write_records(folder / NAME / ROLLOUTS, iter(found))
    rehash(folder)


def other_rollouts(record: Record) -> Record:
    """Texts that are read as the same answers, and so have the same measures."""
    banks = [
        [replace(bank[0], text=bank[0].text + "!"), *bank[1:]] for bank in record.reasoned.rollouts
    ]
    return record._replace(reasoned=replace(record.reasoned, rollouts=banks))


def other_answers(record: Record) -> Record:
    banks = [
        [replace(bank[0], text=bank[0].text + "!"), *bank[1:]] for bank in record.reasoned.forced
    ]
    return record._replace(reasoned=replace(record.reasoned, forced=banks))


def other_trace(record: Record) -> Record:
    trace = record.reasoned.trace
    last = trace.sentences[-1]
    other = replace(last, separator=" " if last.separator != " " else "\n\n")
    trace = replace(trace, sentences=(*trace.sentences[:-1], other))
    return record._replace(reasoned=replace(record.reasoned, trace=trace))


def other_measure(record: Record) -> Record:
    first = {**record.measures[0], "accuracy": record.measures[0]["accuracy"] + 1e-9}
    return record._replace(measures=[first, *record.measures[1:]])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_rollouts, r"rollouts at sentence \d+: not what is stored"),
        (other_answers, r"forced at sentence \d+: not what is stored"),
        (other_trace, "base trace: not what is stored"),
        (other_measure, "measures recomputed from its rollouts: not what is stored"),
    ],
)
def test_changed_contents_are_found_behind_right_hashes(
    copied: Path, change: Callable[[Record], Record], message: str
) -> None:
    changed(copied, change)
    with pytest.raises(CorruptArtifactError, match=message):
        list(check_bundle(copied, CPU))


@pytest.mark.parametrize("name", [*WEIGHTS, ROLLOUTS, TRUTH, "gates.json"])
def test_one_flipped_byte_is_found(copied: Path, name: str) -> None:
    path = copied / NAME / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(CorruptArtifactError, match=rf"sha256 is \w{{12}}.* in .*{name}"):
        next(check_bundle(copied, CPU))


def test_a_missing_file_is_found(copied: Path) -> None:
    (copied / NAME / TRUTH).unlink()
    with pytest.raises(CorruptArtifactError, match="sha256 is no file"):
        next(check_bundle(copied, CPU))


def test_the_built_world_is_written_for_the_loader(bundle: Path, tmp_path: Path) -> None:
    # Fewer than a study may ask for; the bundle of this test has no more.
    source = DemoSource.model_construct(kind="demo", n_problems=1, n_rollouts=4)
    write_demo_world(tmp_path, source, bundle)
    for setting, reasoned, measured in records(bundle):
        name = f"temperature_1.0_top_p_1.0/{setting}/problem_{reasoned.problem.id}"
        folder = tmp_path / "rollouts" / NAME / name
        rows = load(folder / "chunks_labeled.json")
        assert [{key: row[key] for key in measured[0]} for row in rows] == measured
        assert [row["true_importance"] for row in rows] == exact_importance(reasoned)
        for i, bank in enumerate(reasoned.rollouts):
            stored = load(folder / f"chunk_{i}" / "solutions.json")
            assert [row["rollout"] for row in stored] == [rest.text for rest in bank]
