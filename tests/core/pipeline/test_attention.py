"""The stages of vertical attention on a small study: one pass, what is missing, honest heads."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
import yaml
from transformers import AutoModel

from taprobe_core.activations.extraction import Extracted
from taprobe_core.attention.scores import full_scores, light_scores
from taprobe_core.checkpoints import resolve_checkpoint
from taprobe_core.errors import ConfigError, MissingArtifactError
from taprobe_core.keys import Site
from taprobe_core.pipeline import (
    STAGES,
    Plan,
    cells_of,
    check_stage,
    describe,
    extract,
    key_of,
    missing_cells,
    open_plan,
    read_attention,
    run_stage,
    stages_of,
)
from taprobe_core.splits import make_folds
from taprobe_core.store import ArtifactKey, write_table, write_tensors
from taprobe_core.study import parse_study

CORRECT = "correct_base_solution"
SITE, MODEL = ("tiny@L01", CORRECT), ("tiny", CORRECT)
BOTH = ("vertical_attention", "receiver_heads")
UP_TO_HEADS = ("rollouts", "spans", "activations", *BOTH)
FULL = {"mode": "full", "proximity": [4, 1], "n_receiver_heads": 3}


@pytest.fixture(scope="module")
def values(small_text: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(small_text)
    del loaded["models"]["other"]
    loaded["models"]["tiny"] |= {"n_layers": 3}
    loaded["models"]["tiny"]["checkpoint"] |= {"n_layers": 3}
    loaded |= {"settings": [CORRECT], "seeds": [0], "attention": FULL}
    return loaded


def opened(values: Mapping[str, Any], folder: Path, **changes: Any) -> Plan:
    """The study with other parts; `layers` are those of its model."""
    changed = yaml.safe_load(yaml.safe_dump(dict(values)))
    if layers := changes.pop("layers", None):
        changed["models"]["tiny"]["layers"] = layers
    return open_plan(parse_study(yaml.safe_dump(changed | changes), "changed.yaml"), folder)


def run(plan: Plan, *stages: str) -> None:
    for stage in stages:
        list(run_stage(plan, stage, cells_of(plan.study, stage)))


@pytest.fixture(scope="module")
def spans(values: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder that no model has run on."""
    folder = tmp_path_factory.mktemp("spans")
    run(opened(values, folder), "rollouts", "spans")
    return folder


@pytest.fixture(scope="module")
def plan(values: dict[str, Any], spans: Path, tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """The study in mode full; read it, do not change it."""
    folder = shutil.copytree(spans, tmp_path_factory.mktemp("full") / "data")
    made = opened(values, folder)
    run(made, *UP_TO_HEADS)
    return made


@pytest.fixture
def own(values: dict[str, Any], plan: Plan, tmp_path: Path) -> Plan:
    return opened(values, shutil.copytree(plan.data_root, tmp_path / "data"))


@pytest.fixture
def fresh(spans: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(spans, tmp_path / "data"))


class Passes:
    """What goes through the model: texts, and layers of activations and of attention."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.n_texts = 0
        self.activations: set[int] = set()
        self.attention: set[int] = set()
        real = extract.extract

        def counting(*args: Any, **options: Any) -> Iterator[Extracted]:
            for item in real(*args, **options):
                self.n_texts += 1
                self.activations |= set(item.shards)
                self.attention |= set(item.attention)
                yield item

        monkeypatch.setattr(extract, "extract", counting)

    @property
    def seen(self) -> tuple[int, set[int], set[int]]:
        return self.n_texts, self.activations, self.attention


def table(plan: Plan, stage: str, cell: tuple[str, ...], name: str) -> pl.DataFrame:
    return plan.store.open(key_of(plan, stage, cell)).read_table(f"{name}.parquet")


def test_one_pass_makes_activations_and_attention(
    values: dict[str, Any], fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = Passes(monkeypatch)
    plan = opened(values, fresh)
    run(plan, "activations")
    assert passes.seen == (6, {0, 1, 2}, {0, 1, 2})
    run(plan, *BOTH)
    assert passes.n_texts == 6
    for stage in BOTH:
        assert list(missing_cells(plan, stage, cells_of(plan.study, stage))) == []


def test_attention_asked_for_alone_brings_the_activations_of_its_passes(
    values: dict[str, Any], fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = Passes(monkeypatch)
    plan = opened(values, fresh)
    outcomes = dict(run_stage(plan, "vertical_attention", [SITE]))
    assert passes.seen == (6, {1}, {1})
    assert outcomes[SITE].key == plan.key("vertical_attention", (str(Site("tiny", 1)), CORRECT))
    assert not outcomes[SITE].is_reused
    (again,) = run_stage(plan, "vertical_attention", [SITE])
    assert again[1].is_reused
    list(run_stage(plan, "activations", [SITE]))
    assert passes.n_texts == 6


def test_a_longer_list_of_layers_measures_the_missing_layer_alone(
    values: dict[str, Any], fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fewer = opened(values, fresh, layers=[0, 2])
    run(fewer, "activations", *BOTH)
    chosen = table(fewer, "receiver_heads", MODEL, "heads")
    assert set(chosen["layer"]) == {2}
    passes = Passes(monkeypatch)
    plan = opened(values, fresh)
    for stage in ("activations", "vertical_attention"):
        cells = cells_of(plan.study, stage)
        reused = {cell[0]: each.is_reused for cell, each in run_stage(plan, stage, cells)}
        assert reused == {"tiny@L00": True, "tiny@L01": False, "tiny@L02": True}
    assert passes.seen == (6, {1}, {1})
    assert plan.key("receiver_heads", MODEL) != fewer.key("receiver_heads", MODEL)
    run(plan, "receiver_heads")
    assert set(table(plan, "receiver_heads", MODEL, "heads")["layer"]) == {1, 2}


def test_attention_wanted_later_does_not_extract_the_activations_again(
    values: dict[str, Any], fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(opened(values, fresh, attention={"mode": "off"}), "activations")
    passes = Passes(monkeypatch)
    plan = opened(values, fresh)
    run(plan, "activations", "vertical_attention")
    assert passes.seen == (6, set(), {0, 1, 2})


def test_stored_mass_is_that_of_eager_attention(plan: Plan) -> None:
    files = resolve_checkpoint(plan.model("tiny"), plan.checkpoints_root)
    eager = AutoModel.from_pretrained(
        files.folder, attn_implementation="eager", local_files_only=True
    ).eval()
    texts = table(plan, "spans", MODEL, "texts")
    spans = table(plan, "spans", MODEL, "spans")
    for problem_id, tensors in read_attention(plan, Site("tiny", 1), CORRECT):
        token_ids = texts.filter(problem_id=problem_id)["token_ids"][0].to_list()
        with torch.inference_mode():
            found = eager(torch.tensor([token_ids]), output_attentions=True)
        weights = found.attentions[1][0].double()
        member = torch.zeros(len(tensors["n_tokens"]), len(token_ids), dtype=torch.float64)
        mine = spans.filter(problem_id=problem_id)
        for row, (start, end) in enumerate(mine.select("start_token", "end_token").iter_rows()):
            member[row, start:end] = 1
        expected = member @ weights @ member.T / tensors["n_tokens"][:, None]
        mass = tensors["mass"] / tensors["n_tokens"][:, None]
        torch.testing.assert_close(mass.double(), expected, atol=1e-5, rtol=0)


def test_tables_follow_from_the_mass(plan: Plan) -> None:
    scores = table(plan, "vertical_attention", SITE, "scores")
    kurtosis = table(plan, "vertical_attention", SITE, "kurtosis")
    vertical = table(plan, "vertical_attention", SITE, "vertical")
    assert scores.height == table(plan, "spans", MODEL, "spans").height
    assert kurtosis["proximity"].unique(maintain_order=True).to_list() == [4, 1]
    for problem_id, tensors in read_attention(plan, Site("tiny", 1), CORRECT):
        mine = scores.filter(problem_id=problem_id).sort("sentence_idx")
        expected = full_scores(tensors["mass"].numpy(), tensors["n_tokens"].numpy())
        np.testing.assert_array_equal(mine["attention_score"], expected)
        open_ended = vertical.filter(
            pl.col("vertical_score").is_null(), problem_id=problem_id, head=0
        )
        n_sentences = mine.height
        assert open_ended["sentence_idx"].to_list() == list(range(n_sentences - 4, n_sentences))


def test_receiver_scores_are_the_mean_over_the_heads_of_the_fold(plan: Plan) -> None:
    heads = table(plan, "receiver_heads", MODEL, "heads")
    scores = table(plan, "receiver_heads", MODEL, "receiver_scores")
    assert (
        heads.group_by("protocol", "fold").agg(pl.col("rank"))["rank"].to_list() == [[1, 2, 3]] * 6
    )
    assert 0 not in set(heads["layer"])
    vertical = pl.concat(
        table(plan, "vertical_attention", cell, "vertical").with_columns(
            layer=pl.lit(int(cell[0][-2:]), pl.Int64)
        )
        for cell in cells_of(plan.study, "vertical_attention")
    )
    expected = (
        heads.join(vertical, on=["layer", "head"])
        .group_by("protocol", "fold", "problem_id", "sentence_idx")
        .agg(expected=pl.col("vertical_score").mean())
    )
    joined = scores.join(expected, on=["protocol", "fold", "problem_id", "sentence_idx"])
    assert joined.height == scores.height
    assert joined["receiver_score"].is_null().equals(joined["expected"].is_null())
    np.testing.assert_allclose(joined["receiver_score"], joined["expected"], rtol=1e-12)


def doctored(plan: Plan, problem_id: int, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Put another mass of one problem at layer 1 under its key."""
    (artifact,) = plan.store.versions("attention_shards", (*MODEL, f"problem_{problem_id}"))
    tensors = artifact.read_tensors("attention.safetensors")
    tensors["L01.mass"] = change(tensors["L01.mass"].clone())
    plan.store.discard(artifact.key)
    plan.store.commit(
        artifact.key,
        lambda folder: write_tensors(folder / "attention.safetensors", tensors),
        provenance={},
    )


def test_a_test_problem_changes_no_head_of_its_fold(own: Plan) -> None:
    before = table(own, "receiver_heads", MODEL, "heads")
    scores_before = table(own, "receiver_heads", MODEL, "receiver_scores")
    problems = table(own, "spans", MODEL, "texts")["problem_id"].to_list()
    folds = make_folds(problems, own.study.splits)
    changed = folds[0].test[0]

    def shuffled(mass: torch.Tensor) -> torch.Tensor:
        columns = torch.randperm(mass.shape[-1], generator=torch.Generator().manual_seed(0))
        return torch.tril(mass[..., columns]) * torch.rand(len(mass), 1, 1)

    doctored(own, changed, shuffled)
    for key in (
        own.key("vertical_attention", ("tiny@L01", CORRECT)),
        own.key("receiver_heads", MODEL),
    ):
        own.store.discard(key)
    run(own, *BOTH)
    after = table(own, "receiver_heads", MODEL, "heads")
    scores_after = table(own, "receiver_heads", MODEL, "receiver_scores")
    n_untrained = 0
    for fold in folds:
        same = before.filter(fold=fold.index).equals(after.filter(fold=fold.index))
        assert same == (changed not in fold.train)
        n_untrained += same
        if same:
            moved = (
                scores_before.filter(fold=fold.index)
                .join(scores_after.filter(fold=fold.index), on=["problem_id", "sentence_idx"])
                .filter(pl.col("receiver_score") != pl.col("receiver_score_right"))
            )
            assert set(moved["problem_id"]) == {changed}
    assert n_untrained >= 1
    assert own.study.splits.protocols == ("lopo",)


def test_light_has_simple_scores_and_no_heads(values: dict[str, Any], fresh: Path) -> None:
    plan = opened(values, fresh, attention={"mode": "light", "last_n": 3})
    assert "receiver_heads" not in stages_of(plan.study)
    run(plan, "activations", "vertical_attention")
    artifact = plan.store.open(key_of(plan, "vertical_attention", SITE))
    assert set(artifact.manifest.files) == {"shards.parquet", "scores.parquet"}
    scores = artifact.read_table("scores.parquet")
    for problem_id, tensors in read_attention(plan, Site("tiny", 1), CORRECT):
        assert tensors["tail_mass"].shape[:2] == (4, 3)
        expected = light_scores(tensors["tail_mass"].numpy(), tensors["is_after"].numpy())
        mine = scores.filter(problem_id=problem_id).sort("sentence_idx")
        np.testing.assert_array_equal(mine["attention_score"], expected)
    (check,) = STAGES["vertical_attention"].checks.values()
    assert check(plan, SITE) == []
    shown = describe(plan, "vertical_attention", SITE)
    assert shown.metrics["n_sentences"] == scores.height
    assert not shown.tables


def test_without_attention_there_is_no_stage_and_no_cell(
    values: dict[str, Any], spans: Path
) -> None:
    off = opened(values, spans, attention={"mode": "off"})
    light = opened(values, spans, attention={"mode": "light"})
    for stage in BOTH:
        assert cells_of(off.study, stage) == []
        with pytest.raises(ConfigError, match=f"no stage '{stage}'") as caught:
            next(run_stage(off, stage, []))
        assert "set attention.mode to" in str(caught.value)
    with pytest.raises(ConfigError, match=r"set attention\.mode to full, or use one of rollouts"):
        check_stage(light.study, "receiver_heads")


def test_receiver_heads_wait_for_every_layer(values: dict[str, Any], fresh: Path) -> None:
    plan = opened(values, fresh)
    list(run_stage(plan, "vertical_attention", [SITE]))
    with pytest.raises(MissingArtifactError, match=r"tiny@L00.*|never built"):
        run(plan, "receiver_heads")


def moved_stages(values: dict[str, Any], plan: Plan, **changes: Any) -> set[str]:
    other = opened(values, plan.data_root, **changes)
    stages = ("activations", *BOTH)
    return {
        stage
        for stage in stages
        for cell in cells_of(plan.study, stage)
        if key_of(plan, stage, cell) != key_of(other, stage, cell)
    }


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"attention": FULL | {"proximity": [1, 4]}}, set(BOTH)),
        ({"attention": FULL | {"depth_control": "rank"}}, set(BOTH)),
        ({"attention": FULL | {"n_receiver_heads": 2}}, {"receiver_heads"}),
        ({"attention": FULL | {"last_n": 9}}, set()),
        ({"splits": {"protocols": ["holdout"]}}, {"receiver_heads"}),
        ({"activations": {"storage": "float32"}}, {"activations"}),
        ({"layers": [1]}, {"receiver_heads"}),
    ],
)
def test_a_change_moves_the_keys_that_it_decides(
    values: dict[str, Any], plan: Plan, changes: dict[str, Any], expected: set[str]
) -> None:
    assert moved_stages(values, plan, **changes) == expected


def test_a_lost_text_is_measured_again_alone_at_the_layers_asked_for(
    own: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = next(iter(own.store.keys("attention_shards")))
    scores = table(own, "vertical_attention", SITE, "scores")
    own.store.discard(lost)
    cells = cells_of(own.study, "vertical_attention")
    assert list(missing_cells(own, "vertical_attention", cells)) == cells
    passes = Passes(monkeypatch)
    # Another artifact than the one that was lost, so the cell's own is made again to name it.
    ((_, outcome),) = run_stage(own, "vertical_attention", [SITE])
    assert passes.seen == (1, set(), {1})
    assert not outcome.is_reused
    assert own.store.find(lost) is None
    (made,) = own.store.versions("attention_shards", lost.partition)
    assert made.key in outcome.artifact.manifest.upstream_keys
    assert table(own, "vertical_attention", SITE, "scores").equals(scores)
    rest = [cell for cell in cells if cell != SITE]
    assert list(missing_cells(own, "vertical_attention", cells)) == rest
    run(own, "vertical_attention")
    assert passes.seen == (2, set(), {0, 1, 2})
    assert list(missing_cells(own, "vertical_attention", cells)) == []
    assert all(verdict.is_sound for verdict in own.store.verify("vertical_attention"))


def nan_in(mass: torch.Tensor) -> torch.Tensor:
    mass[0, 3, :2] = torch.nan
    return mass


def ahead(mass: torch.Tensor) -> torch.Tensor:
    mass[:, 0, -1] = 0.5
    return mass


PLANTED: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], str]] = {
    "not numbers": (nan_in, "2 masses are NaN or infinite"),
    "a look ahead": (ahead, "4 masses are on sentences that come later"),
    "too much": (lambda mass: mass * 1.5, "rows hold more than their tokens"),
    "below zero": (lambda mass: -mass, "masses are below zero"),
    "a row short": (lambda mass: mass[:, 1:].clone(), "sentences, "),
}


@pytest.mark.parametrize(("change", "said"), PLANTED.values(), ids=PLANTED.keys())
def test_a_planted_fault_is_found_and_named(
    own: Plan, change: Callable[[torch.Tensor], torch.Tensor], said: str
) -> None:
    (check,) = STAGES["vertical_attention"].checks.values()
    assert check(own, SITE) == []
    problem_id = table(own, "spans", MODEL, "texts")["problem_id"][2]
    doctored(own, problem_id, change)
    found = check(own, SITE)
    assert found
    assert all(fault.startswith(f"problem {problem_id}: ") for fault in found)
    assert any(said in fault for fault in found)


def test_heads_of_another_fold_are_found_and_named(own: Plan) -> None:
    (check,) = STAGES["receiver_heads"].checks.values()
    assert check(own, MODEL) == []
    key = own.key("receiver_heads", MODEL)
    artifact = own.store.open(key)
    frames = {name: artifact.read_table(name) for name in artifact.manifest.files}
    heads = frames["heads.parquet"]
    of_next = heads.with_columns(fold=(pl.col("fold") + 1) % 6).sort("fold", "rank")
    frames["heads.parquet"] = of_next
    own.store.discard(key)

    def write(folder: Path) -> None:
        for name, frame in frames.items():
            write_table(folder / name, frame)

    own.commit(key, write, {})
    found = check(own, MODEL)
    assert found
    assert all("heads are not of its training" in fault for fault in found)


@pytest.mark.parametrize(
    ("stage", "cell"), [("vertical_attention", SITE), ("receiver_heads", MODEL)]
)
def test_what_is_shown_is_finite_and_has_its_table_and_picture(
    plan: Plan, stage: str, cell: tuple[str, str]
) -> None:
    shown = describe(plan, stage, cell)
    assert all(np.isfinite(value) for value in shown.metrics.values())
    assert (shown.picture or "").startswith("data:image/png;base64,")
    top = shown.tables["top_heads"]
    assert 0 < top.height <= 10
    if stage == "vertical_attention":
        kurtosis = table(plan, stage, cell, "kurtosis").filter(proximity=4)
        best = kurtosis.group_by("head").agg(pl.col("kurtosis").mean())["kurtosis"].max()
        assert shown.metrics["top_kurtosis"] == top["kurtosis"][0] == best
        assert 0 < shown.metrics["median_bos_share"] < 1
    else:
        assert shown.tables["reliability"]["proximity"].to_list() == [4, 1]
        assert {"split_half_pearson", "top_heads_kept/proximity_1"} <= set(shown.metrics)


def test_lineage_of_receiver_heads_reaches_every_layer(plan: Plan) -> None:
    tree = plan.store.lineage(plan.key("receiver_heads", MODEL))
    assert [node.key for node in tree.upstream] == [
        plan.key("vertical_attention", (str(site), CORRECT)) for site in plan.study.sites
    ]
    shards = [
        node.key for node in tree.upstream[0].upstream if node.key.stage == "attention_shards"
    ]
    assert len(shards) == 6
    assert all(isinstance(key, ArtifactKey) for key in shards)
