from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch

from taprobe_core.errors import CorruptArtifactError
from taprobe_core.keys import Site
from taprobe_core.pipeline import (
    STAGES,
    Plan,
    cells_of,
    key_of,
    open_plan,
)
from taprobe_core.splits import SIDES, make_folds
from taprobe_core.store import ArtifactKey, write_table, write_tensors

CORRECT = "correct_base_solution"
TEXT, SITE, TRIAL = ("tiny", CORRECT), ("tiny@L00", CORRECT), ("tiny@L00", f"{CORRECT}@s00")
BUILT = [name for name, stage in STAGES.items() if stage.checks and stage.asked_by is None]
"""Stages with checks, of a study that asks for no attention."""
Change = Callable[[pl.DataFrame], pl.DataFrame]


@pytest.fixture
def own(built: Any, copied: Path) -> Plan:
    return open_plan(built.study, copied)


def falsify(plan: Plan, key: ArtifactKey, changes: dict[str, Change]) -> None:
    """Commit other tables under a key: sound bytes, wrong content."""
    artifact = plan.store.open(key)
    frames = {name: artifact.read_table(name) for name in artifact.manifest.files}
    provenance, upstream = artifact.manifest.provenance, artifact.manifest.upstream_keys
    plan.store.discard(key)

    def write(folder: Path) -> None:
        for name, frame in frames.items():
            write_table(folder / name, changes.get(name, lambda each: each)(frame))

    plan.store.commit(key, write, provenance=provenance, upstream=upstream)


def first_two(plan: Plan) -> tuple[int, int]:
    sentences = plan.read("rollouts", TEXT, "sentences")
    one, two = sentences["problem_id"].unique().sort()[:2]
    return int(one), int(two)


def copy_trace(plan: Plan, share: float = 1.0) -> None:
    """Let the second problem say what the first does, from the start, spaced otherwise."""
    one, two = first_two(plan)

    def copied(table: pl.DataFrame) -> pl.DataFrame:
        source, own = table.filter(problem_id=one), table.filter(problem_id=two)
        if share == 1:
            own = source.with_columns(problem_id=pl.lit(two, pl.Int64))
        n = int(share * min(source.height, own.height))
        said = [f" {text}\n " for text in source["sentence"][:n]] + own["sentence"][n:].to_list()
        rest = table.filter(pl.col("problem_id") != two)
        return pl.concat([rest, own.with_columns(sentence=pl.Series(said))])

    falsify(plan, plan.key("rollouts", TEXT), {"sentences.parquet": copied})


def shard_of(plan: Plan, problem: int, layer: int = 0) -> ArtifactKey:
    index = plan.read("activations", (f"tiny@L{layer:02d}", CORRECT), "shards")
    row = index.row(problem, named=True)
    partition = ("tiny", CORRECT, f"problem_{row['problem_id']}")
    return ArtifactKey("activation_shards", partition, row["shard_fingerprint"])


def falsify_shard(
    plan: Plan, problem: int, change: Callable[[torch.Tensor], torch.Tensor], layer: int = 0
) -> None:
    key = shard_of(plan, problem, layer)
    tensors, name = (
        plan.store.open(key).read_tensors("activations.safetensors"),
        f"L{layer:02d}.mean",
    )
    tensors[name] = change(tensors[name].clone())
    plan.store.discard(key)
    plan.store.commit(
        key,
        lambda folder: write_tensors(folder / "activations.safetensors", tensors),
        provenance={},
    )


def nan_at(mean: torch.Tensor) -> torch.Tensor:
    mean[1, :3] = torch.nan
    mean[2, 0] = torch.inf
    return mean


def falsify_fit(plan: Plan, change: Change) -> None:
    recipe = plan.study.recipes[0]
    key = plan.fit(Site("tiny", 0), CORRECT, recipe, 0)
    frame = plan.store.open(key).read_table("scores.parquet")
    plan.store.discard(key)
    plan.store.commit(
        key, lambda folder: write_table(folder / "scores.parquet", change(frame)), provenance={}
    )


FIRST = pl.col("problem_id") == pl.col("problem_id").min()

PLANTED: dict[str, tuple[str, tuple[str, ...], Callable[[Plan], None], list[str]]] = {
    "a sentence short": (
        "rollouts", TEXT,
        lambda plan: falsify(
            plan, plan.key("rollouts", TEXT), {"sentences.parquet": lambda t: t[1:]}),
        ["problem_", "sentences, ", " stated"]),
    "a problem without sentences": (
        "rollouts", TEXT,
        lambda plan: falsify(
            plan, plan.key("rollouts", TEXT), {"sentences.parquet": lambda t: t.filter(~FIRST)}),
        ["None sentences", "stated"]),
    "a column of another type": (
        "rollouts", TEXT,
        lambda plan: falsify(plan, plan.key("rollouts", TEXT), {
            "problems.parquet": lambda t: t.with_columns(pl.col("problem").cast(pl.Categorical))}),
        ["problems", "problem"]),
    "labels without a column": (
        "labels", TEXT,
        lambda plan: falsify(
            plan, plan.key("labels", TEXT), {"labels.parquet": lambda t: t.drop("is_anchor")}),
        ["labels", "is_anchor"]),
    "a span one character on": (
        "spans", TEXT,
        lambda plan: falsify(plan, plan.key("spans", TEXT), {
            "spans.parquet": lambda t: t.with_columns(
                start_char=pl.col("start_char") + (pl.col("sentence_idx") == 1))}),
        ["sentence 1", "are not the sentence"]),
    "a span lost": (
        "spans", TEXT,
        lambda plan: falsify(plan, plan.key("spans", TEXT), {"spans.parquet": lambda t: t[:-1]}),
        ["spans do not number"]),
    "not numbers": (
        "activations", SITE, lambda plan: falsify_shard(plan, 0, nan_at),
        ["mean: problem ", "2 of ", "sentences are not finite, first sentence 1"]),
    "a row short": (
        "activations", SITE, lambda plan: falsify_shard(plan, 1, lambda mean: mean[1:].clone()),
        ["mean: problem ", " rows for ", " sentences"]),
    "a problem never tested": (
        "probe_fits", TRIAL,
        lambda plan: falsify_fit(
            plan, lambda t: t.filter(~((pl.col("split") == "test") & FIRST))),
        ["5 of 6 problems are test under LOPO"]),
    "validation on a tested problem": (
        "probe_fits", TRIAL,
        lambda plan: falsify_fit(plan, lambda t: pl.concat([t, t.filter(
            (pl.col("split") == "test") & FIRST).with_columns(split=pl.lit("val", t["split"].dtype))
        ])),
        ["lopo fold 0: val has problems", "the split says"]),
}  # fmt: skip


@pytest.mark.parametrize("stage", BUILT)
def test_sound_artifacts_have_no_fault(built: Any, stage: str) -> None:
    plan = open_plan(built.study, built.data)
    for name, check in STAGES[stage].checks.items():
        for cell in filter(lambda cell: check.looks_at(plan, cell), cells_of(plan.study, stage)):
            assert check.look(plan, cell).faults == (), name


@pytest.mark.parametrize(("stage", "cell", "plant", "said"), PLANTED.values(), ids=PLANTED.keys())
def test_a_planted_fault_is_found_and_named(
    own: Plan,
    stage: str,
    cell: tuple[str, ...],
    plant: Callable[[Plan], None],
    said: list[str],
) -> None:
    plant(own)
    check = next(iter(STAGES[stage].checks.values()))
    faults = "\n".join(check.look(own, cell).faults)
    for part in said:
        assert part in faults
    other = next(each for each in cells_of(own.study, stage) if "incorrect" in each[1])
    assert check.look(own, other).faults == ()


def test_a_trace_under_two_ids_stops_the_study_before_anything_is_computed(own: Plan) -> None:
    one, two = first_two(own)
    copy_trace(own)
    check = STAGES["rollouts"].checks["no_trace_on_two_sides"]
    (fault,) = check.look(own, TEXT).faults
    assert f"problems {one}, {two} have the same trace" in fault
    # In each fold that tests one of the two, and where one of them validates.
    n = sum(
        len({side for side in SIDES for each in (one, two) if each in getattr(fold, side)}) > 1
        for fold in make_folds(own.problem_ids(), own.study.splits)
    )
    assert f"{n} of 6 folds, first lopo fold 0" in fault
    assert check.is_blocking
    assert STAGES["rollouts"].checks["no_trace_on_two_sides"].is_blocking


def test_copies_on_one_side_leak_nothing(own: Plan) -> None:
    one, two = first_two(own)
    copy_trace(own)
    splits = own.study.splits.model_copy(update={"protocols": ("holdout",)})
    check = STAGES["rollouts"].checks["no_trace_on_two_sides"]
    sides = set()
    for seed in range(20):
        study = own.study.model_copy(update={"splits": splits.model_copy(update={"seed": seed})})
        plan = open_plan(study, own.data_root)
        (fold,) = make_folds(plan.problem_ids(), study.splits)
        together = any({one, two} <= set(getattr(fold, side)) for side in SIDES)
        assert bool(check.look(plan, TEXT).faults) is not together
        sides.add(together)
    assert sides == {True, False}


@pytest.mark.parametrize(("share", "n_faults"), [(0.8, 1), (0.2, 0)])
def test_a_trace_copied_in_part_is_a_warning(own: Plan, share: float, n_faults: int) -> None:
    one, two = first_two(own)
    copy_trace(own, share)
    faults = STAGES["rollouts"].checks["passages_differ_across_problems"].look(own, TEXT).faults
    assert len(faults) == n_faults
    for fault in faults:
        assert "held-out passages of three sentences stand in a training problem" in fault
        assert {str(one), str(two)} <= set(re.findall(r"problem (\d+)", fault))
        table = own.read("rollouts", TEXT, "sentences")
        first = table.filter(problem_id=one)["sentence"][0]
        assert " ".join(first.split())[:40] in fault
    assert STAGES["rollouts"].checks["no_trace_on_two_sides"].look(own, TEXT).faults == ()
    assert not STAGES["rollouts"].checks["passages_differ_across_problems"].is_blocking


@pytest.mark.parametrize("name", ["no_trace_on_two_sides", "passages_differ_across_problems"])
def test_texts_are_not_looked_at_where_problems_are_too_few_to_be_divided(
    own: Plan, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    one, _ = first_two(own)
    monkeypatch.setattr(own, "problem_ids", lambda: (one,))
    found = STAGES["rollouts"].checks[name].look(own, TEXT)
    assert found.faults == ()
    assert found.not_run is not None
    assert "found n = 1" in found.not_run


def test_a_tripwire_trips_where_rows_cannot_be_told_apart(own: Plan) -> None:
    for problem in range(6):
        falsify_shard(own, problem, lambda mean: mean[:1].expand(len(mean), -1).clone(), layer=1)
    checks = STAGES["evaluation"].checks

    check = checks["one_problem_is_memorised"]
    (fault,) = check.look(own, ("tiny@L01", CORRECT)).faults

    assert "repeat" in fault or "equal" in fault
    # Each model and setting is looked at once, at its middle layer.
    assert check.looks_at(own, ("tiny@L01", CORRECT))
    assert not check.looks_at(own, ("tiny@L00", CORRECT))


@pytest.mark.parametrize("stage", [stage for stage in BUILT if stage != "evaluation"])
def test_one_flipped_byte_stops_the_check(own: Plan, stage: str) -> None:
    cell = cells_of(own.study, stage)[0]
    key = key_of(own, stage, cell)
    if stage == "probe_fits":
        key = next(iter(own.store.keys("fits")))
    artifact = own.store.find(key)
    assert artifact is not None
    for name in artifact.manifest.files:
        raw = bytearray((artifact.path / name).read_bytes())
        raw[len(raw) // 2] ^= 1
        (artifact.path / name).write_bytes(bytes(raw))
    check = next(iter(STAGES[stage].checks.values()))
    with pytest.raises(CorruptArtifactError, match="sha256") as caught:
        check.look(own, cell)
    assert str(artifact.path) in str(caught.value)
    assert "Fix: " in str(caught.value)
