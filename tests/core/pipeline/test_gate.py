"""Failed checks: what they stop, how long, and what lets the study go on."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from taprobe_core.errors import ConfigError, FailedCheckError
from taprobe_core.keys import Site
from taprobe_core.pipeline import (
    STAGES,
    Gate,
    Plan,
    cells_of,
    key_of,
    open_plan,
    run_stage,
    split_stopped,
    stage_verdicts,
    stages_of,
    verdicts_of,
)
from taprobe_core.pipeline.verdicts import checks_store
from taprobe_core.store import ArtifactKey, write_tensors
from taprobe_core.study import CheckName, Waiver, checked_dimensions, parse_study

CORRECT, INCORRECT = "correct_base_solution", "incorrect_base_solution"
TEXT = ("tiny", CORRECT)


@pytest.fixture
def own(built: Any, copied: Path) -> Plan:
    return open_plan(built.study, copied)


@pytest.fixture
def unseen(own: Plan) -> Plan:
    """As `own`, and nobody has looked at anything."""
    shutil.rmtree(own.data_root / "checks")
    return own


def again(plan: Plan, waivers: tuple[Waiver, ...] = ()) -> Plan:
    """The same study and store, opened anew."""
    return open_plan(plan.study.model_copy(update={"waivers": waivers}), plan.data_root)


def all_stages(plan: Plan) -> list[str]:
    """Run everything that is not stopped; the stages of which something was."""
    refused = []
    for stage in stages_of(plan.study):
        try:
            for _ in run_stage(plan, stage, cells_of(plan.study, stage)):
                pass
        except FailedCheckError:
            refused.append(stage)
    return refused


def put_shards(plan: Plan, layer: int, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Store other numbers under the names of a cell's shards: sound bytes, wrong content."""
    site = Site("tiny", layer)
    name = f"L{layer:02d}.mean"
    index = plan.read("activations", (str(site), CORRECT), "shards")
    for problem_id, version in index.select("problem_id", "shard_fingerprint").iter_rows():
        key = ArtifactKey("activation_shards", ("tiny", CORRECT, f"problem_{problem_id}"), version)
        tensors = plan.store.open(key).read_tensors("activations.safetensors")
        tensors[name] = change(tensors[name].clone())
        plan.store.discard(key)
        plan.store.commit(
            key,
            lambda folder, tensors=tensors: write_tensors(
                folder / "activations.safetensors", tensors
            ),
            provenance={},
        )


def with_infinity(mean: torch.Tensor) -> torch.Tensor:
    mean[-1, 0] = torch.inf
    return mean


def test_a_copied_trace_stops_what_is_made_from_it_run_after_run(mirror: Any) -> None:
    one, two = mirror.copy_trace()
    plan = open_plan(mirror.study, mirror.data)
    done = list(run_stage(plan, "rollouts", cells_of(plan.study, "rollouts")))
    assert len(done) == 2
    for _ in range(3):
        plan = open_plan(mirror.study, mirror.data)
        left = run_stage(plan, "labels", cells_of(plan.study, "labels"))
        assert next(left)[0] == ("tiny", INCORRECT)
        with pytest.raises(FailedCheckError) as caught:
            next(left)
        assert "no_trace_on_two_sides failed on rollouts tiny/correct_base_solution" in str(
            caught.value
        )
        assert f"problems {one}, {two} have the same trace" in caught.value.what
        assert str(key_of(plan, "rollouts", TEXT)) in str(caught.value.where)
        assert "rollouts.problem_ids" in str(caught.value.fix)
        assert "waivers: [{check: no_trace_on_two_sides" in str(caught.value.fix)
        assert plan.store.find(plan.key("labels", TEXT)) is None

    stopped = set(stages_of(plan.study)) - {"rollouts"}
    assert set(all_stages(plan)) == stopped
    for stage in stopped:
        made = [c for c in cells_of(plan.study, stage) if plan.store.find(key_of(plan, stage, c))]
        assert made == [c for c in cells_of(plan.study, stage) if c and INCORRECT in c[1]]

    mirror.mend()
    mirror.accept()
    assert all_stages(open_plan(mirror.study, mirror.data)) == []


def test_a_waiver_lets_the_study_go_on_and_stands_in_the_report(mirror: Any) -> None:
    mirror.copy_trace()
    before = open_plan(mirror.study, mirror.data)
    assert all_stages(before) != []
    copy = ("no_trace_on_two_sides", "/".join(TEXT))
    mirror.waive(copy)
    # A copy in training is what shuffled labels find, each in its own way.
    assert all_stages(open_plan(mirror.study, mirror.data)) == ["leaderboard", "study_report"]
    mirror.waive(copy, ("shuffled_labels_at_chance", f"tiny@L01/{CORRECT}"))
    plan = open_plan(mirror.study, mirror.data)
    assert all_stages(plan) == []
    # It changes no value, so it names nothing anew but the page that shows it.
    for stage in stages_of(plan.study):
        for cell in cells_of(plan.study, stage):
            is_same = key_of(plan, stage, cell) == key_of(before, stage, cell)
            assert is_same is (stage != "study_report"), stage
    page = plan.open("study_report").path / "report.html"
    text = page.read_text()
    assert text.count("both are &lt;kept&gt; on purpose") >= 2
    assert "have the same trace and stand on different sides" in text
    assert text.count("no_trace_on_two_sides") >= 3
    # Waived for one setting, so the other is as before, and the fault is not called passed.
    (verdict,) = [v for v in stage_verdicts(plan, "rollouts", "no_trace_on_two_sides") if v.waiver]
    assert (verdict.status, verdict.is_red, verdict.cell) == ("failed", False, TEXT)
    # Without its waiver the finished study is refused again.
    with pytest.raises(FailedCheckError, match="no_trace_on_two_sides"):
        list(run_stage(before, "study_report", [()]))


def test_infinity_under_a_sound_hash_stops_its_layer_until_it_is_made_again(own: Plan) -> None:
    kept: list[torch.Tensor] = []

    def spoil(mean: torch.Tensor) -> torch.Tensor:
        kept.append(mean.clone())
        return with_infinity(mean)

    put_shards(own, 0, spoil)
    plan = again(own)
    free, stopped = split_stopped(Gate(plan), "probe_fits", cells_of(plan.study, "probe_fits"))
    assert {cell[:1] for cell in stopped} == {("tiny@L00",)}
    assert all(CORRECT + "@" in cell[1] for cell in stopped)
    assert len(free) == 3 * len(stopped)
    with pytest.raises(FailedCheckError, match="activations_finite failed on activations tiny@L00"):
        list(run_stage(plan, "leaderboard", [()]))
    # The fingerprints are as before, and so are they when the numbers are put back.
    put_shards(own, 0, lambda _: kept.pop(0))
    assert all_stages(again(own)) == []


def test_a_tripwire_stops_the_leaderboard_and_not_the_evaluation(own: Plan) -> None:
    put_shards(own, 1, lambda mean: mean[:1].expand(len(mean), -1).clone())
    cell = f"tiny@L01/{CORRECT}"
    refused = all_stages(again(own))
    assert refused == ["leaderboard", "study_report"]
    waiver = Waiver(check="one_problem_is_memorised", cell=cell, reason="planted")
    plan = again(own, (waiver,))
    failed = [
        verdict.check
        for verdict in verdicts_of(plan, "evaluation", ("tiny@L01", CORRECT))
        if verdict.status == "failed"
    ]
    assert "one_problem_is_memorised" in failed
    others = tuple(Waiver(check=name, cell=cell, reason="planted") for name in failed)
    assert all_stages(again(own, others)) == []


def test_what_was_found_is_kept_and_looked_at_again_only_where_it_is_lost(
    unseen: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[str] = []
    check = STAGES["labels"].checks["labels_schema"]

    def look(plan: Plan, cell: tuple[str, ...]) -> Any:
        looks.append("/".join(cell))
        return check.look(plan, cell)

    def watch(version: str) -> None:
        checks = {"labels_schema": replace(check, look=look, version=version)}
        monkeypatch.setitem(STAGES, "labels", replace(STAGES["labels"], checks=checks))

    watch("1")
    assert [each.status for each in verdicts_of(unseen, "labels", TEXT, looks=False)] == []
    assert looks == []
    for _ in range(2):
        (verdict,) = verdicts_of(again(unseen), "labels", TEXT)
        assert (verdict.status, verdict.is_blocking, verdict.stops) == ("passed", True, False)
    assert len(looks) == 1

    (key,) = [key for key in checks_store(unseen).keys("labels") if key.partition[:2] == TEXT]
    file = checks_store(unseen).open(key).path / "verdict.json"
    file.write_bytes(file.read_bytes().replace(b"[]", b"[ "))
    (verdict,) = verdicts_of(again(unseen), "labels", TEXT)
    assert (verdict.status, len(looks)) == ("passed", 2)
    list(verdicts_of(again(unseen), "labels", TEXT))
    assert len(looks) == 2
    watch("2")
    list(verdicts_of(again(unseen), "labels", TEXT))
    assert len(looks) == 3


def test_what_cannot_be_read_is_a_fault_that_is_not_kept(unseen: Plan) -> None:
    artifact = unseen.store.find(unseen.key("labels", TEXT))
    assert artifact is not None
    file = artifact.path / "labels.parquet"
    sound = file.read_bytes()
    raw = bytearray(sound)
    raw[len(raw) // 2] ^= 1
    file.write_bytes(bytes(raw))
    (verdict,) = verdicts_of(again(unseen), "labels", TEXT)
    assert verdict.stops
    assert "sha256" in verdict.faults[0]
    assert "--discard" in verdict.fix
    assert list(checks_store(unseen).keys("labels")) == []
    file.write_bytes(sound)
    unseen.store.discard(artifact.key)
    list(run_stage(unseen, "labels", [TEXT]))
    (verdict,) = verdicts_of(again(unseen), "labels", TEXT)
    assert verdict.status == "passed"


def test_the_parents_of_a_cell_are_those_that_it_reads(own: Plan) -> None:
    def parents(stage: str, *cell: str) -> list[tuple[str, tuple[str, ...]]]:
        return list(STAGES.parent_cells(own.study, stage, cell))

    assert parents("rollouts", *TEXT) == []
    assert parents("spans", *TEXT) == [("rollouts", TEXT)]
    assert parents("activations", "tiny@L01", CORRECT) == [("spans", TEXT)]
    assert parents("probe_fits", "tiny@L01", f"{CORRECT}@s01") == [
        ("labels", TEXT),
        ("spans", TEXT),
        ("activations", ("tiny@L01", CORRECT)),
    ]
    assert parents("evaluation", "tiny@L00", INCORRECT) == [
        (stage, ("tiny@L00", f"{INCORRECT}@s0{seed}"))
        for stage in ("probe_fits", "deferral_plans")
        for seed in (0, 1)
    ]
    assert len(parents("leaderboard")) == len(cells_of(own.study, "evaluation"))


def test_waivers_can_name_every_check_and_its_cells() -> None:
    checks = {name: stage.name for stage in STAGES.values() for name in stage.checks}
    assert set(get_args(CheckName)) == set(checks)
    for name in get_args(CheckName):
        assert checked_dimensions(name) == STAGES[checks[name]].grid


@pytest.mark.parametrize(
    ("waiver", "said"),
    [
        ("{check: no_trace_on_two_side, cell: tiny/correct_base_solution, reason: x}",
         ["waivers[0].check", "did you mean `no_trace_on_two_sides`?"]),
        ("{check: no_trace_on_two_sides, cell: tiny/correct_base_solutio, reason: x}",
         ["waivers[0].cell", "did you mean `tiny/correct_base_solution`?"]),
        ("{check: activations_finite, cell: tiny/correct_base_solution, reason: x}",
         ["waivers[0].cell", "site and setting", "tiny@L00/correct_base_solution"]),
        ("{check: labels_schema, cell: tiny/correct_base_solution}",
         ["waivers[0].reason", "required"]),
        ("{check: labels_schema, cell: tiny/correct_base_solution, reason: '  '}",
         ["waivers[0].reason", "empty reason"]),
        ("{check: labels_schema, cell: tiny/correct_base_solution, reason: a}, "
         "{check: labels_schema, cell: tiny/correct_base_solution, reason: b}",
         ["waivers[1]", "waived twice"]),
    ],
)  # fmt: skip
def test_a_waiver_of_nothing_is_refused(small_text: str, waiver: str, said: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_study(f"{small_text}waivers: [{waiver}]\n", "small.yaml")
    for part in said:
        assert part in str(caught.value)
