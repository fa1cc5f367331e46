from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch

from taprobe_core.errors import CorruptArtifactError
from taprobe_core.keys import Site
from taprobe_core.pipeline import CHECKS, Plan, cells_of, key_of, open_plan
from taprobe_core.store import ArtifactKey, write_table, write_tensors

CORRECT = "correct_base_solution"
TEXT, SITE, TRIAL = ("tiny", CORRECT), ("tiny@L00", CORRECT), ("tiny@L00", f"{CORRECT}@s00")
BUILT = [stage for stage in CHECKS if stage not in ("vertical_attention", "receiver_heads")]
"""Of a study that asks for no attention."""
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


def shard_of(plan: Plan, problem: int, layer: int = 0) -> ArtifactKey:
    site = Site("tiny", layer)
    index = plan.store.open(plan.activations(site, CORRECT)).read_table("shards.parquet")
    row = index.row(problem, named=True)
    partition = (str(site), CORRECT, f"problem_{row['problem_id']}")
    return ArtifactKey("activation_shards", partition, row["shard_fingerprint"])


def falsify_shard(
    plan: Plan, problem: int, change: Callable[[torch.Tensor], torch.Tensor], layer: int = 0
) -> None:
    key = shard_of(plan, problem, layer)
    mean = plan.store.open(key).read_tensors("activations.safetensors")["mean"].clone()
    plan.store.discard(key)
    plan.store.commit(
        key,
        lambda folder: write_tensors(folder / "activations.safetensors", {"mean": change(mean)}),
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
        lambda plan: falsify(plan, plan.rollouts(*TEXT), {"sentences.parquet": lambda t: t[1:]}),
        ["problem_", "sentences, ", " stated"]),
    "a problem without sentences": (
        "rollouts", TEXT,
        lambda plan: falsify(
            plan, plan.rollouts(*TEXT), {"sentences.parquet": lambda t: t.filter(~FIRST)}),
        ["None sentences", "stated"]),
    "a column of another type": (
        "rollouts", TEXT,
        lambda plan: falsify(plan, plan.rollouts(*TEXT), {
            "problems.parquet": lambda t: t.with_columns(pl.col("problem").cast(pl.Categorical))}),
        ["problems", "problem"]),
    "labels without a column": (
        "labels", TEXT,
        lambda plan: falsify(
            plan, plan.labels(*TEXT), {"labels.parquet": lambda t: t.drop("is_anchor")}),
        ["labels", "is_anchor"]),
    "a span one character on": (
        "spans", TEXT,
        lambda plan: falsify(plan, plan.spans(*TEXT), {
            "spans.parquet": lambda t: t.with_columns(
                start_char=pl.col("start_char") + (pl.col("sentence_idx") == 1))}),
        ["sentence 1", "are not the sentence"]),
    "a span lost": (
        "spans", TEXT,
        lambda plan: falsify(plan, plan.spans(*TEXT), {"spans.parquet": lambda t: t[:-1]}),
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
    for name, check in CHECKS[stage].items():
        for cell in cells_of(plan.study, stage):
            assert check(plan, cell) == [], name


@pytest.mark.parametrize(("stage", "cell", "plant", "said"), PLANTED.values(), ids=PLANTED.keys())
def test_a_planted_fault_is_found_and_named(
    own: Plan,
    stage: str,
    cell: tuple[str, ...],
    plant: Callable[[Plan], None],
    said: list[str],
) -> None:
    plant(own)
    (check,) = CHECKS[stage].values()
    faults = "\n".join(check(own, cell))
    for part in said:
        assert part in faults
    other = next(each for each in cells_of(own.study, stage) if "incorrect" in each[1])
    assert check(own, other) == []


def test_a_tripwire_trips_where_rows_cannot_be_told_apart(own: Plan) -> None:
    for problem in range(6):
        falsify_shard(own, problem, lambda mean: mean[:1].expand(len(mean), -1).clone(), layer=1)
    checks = CHECKS["evaluation"]

    (fault,) = checks["one_problem_is_memorised"](own, ("tiny@L01", CORRECT))

    assert "repeat" in fault or "equal" in fault
    # Each model and setting is looked at once, at its middle layer.
    assert checks["one_problem_is_memorised"](own, ("tiny@L00", CORRECT)) == []


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
    (check,) = CHECKS[stage].values()
    with pytest.raises(CorruptArtifactError, match="sha256") as caught:
        check(own, cell)
    assert str(artifact.path) in str(caught.value)
    assert "Fix: " in str(caught.value)
