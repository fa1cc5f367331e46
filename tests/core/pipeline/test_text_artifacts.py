"""One artifact a text: what a later job adds, what one layer's reader reads, what a byte costs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from taprobe_core.activations import passes
from taprobe_core.activations.tasks import ACTIVATIONS_FILE as FILE
from taprobe_core.errors import CorruptArtifactError
from taprobe_core.keys import Site
from taprobe_core.pipeline import (
    Plan,
    cells_of,
    missing_cells,
    open_plan,
    read_activations,
    run_stage,
)
from taprobe_core.store import Artifact, read_tensors, write_tensors
from taprobe_core.store.files import tensor_header
from taprobe_core.study import parse_study

CORRECT = "correct_base_solution"
FIRST, SECOND = Site("tiny", 0), Site("tiny", 1)


@pytest.fixture
def own(built: Any, copied: Path) -> Plan:
    return open_plan(built.study, copied)


def with_poolings(plan: Plan, *poolings: str) -> Plan:
    values = plan.study.model_dump(mode="json")
    values["activations"] |= {"poolings": list(poolings)}
    return open_plan(parse_study(yaml.safe_dump(values), "other.yaml"), plan.data_root)


def of_text(plan: Plan, problem_id: int) -> list[Artifact]:
    return plan.store.versions("activation_shards", ("tiny", CORRECT, f"problem_{problem_id}"))


def problems(plan: Plan) -> list[int]:
    return list(plan.read("spans", ("tiny", CORRECT), "texts")["problem_id"])


def run(plan: Plan, *sites: Site) -> None:
    cells = [(str(site), CORRECT) for site in sites] or cells_of(plan.study, "activations")
    list(run_stage(plan, "activations", cells))


def flip(artifact: Artifact, tensor: str) -> None:
    """Change one bit of one tensor in the middle of its bytes."""
    path = artifact.path / FILE
    first, last = tensor_header(path)[0][tensor]["range"]
    raw = bytearray(path.read_bytes())
    raw[(first + last) // 2] ^= 1
    path.write_bytes(bytes(raw))


def test_all_layers_of_a_text_stand_in_one_artifact(own: Plan) -> None:
    for problem_id in problems(own):
        (artifact,) = of_text(own, problem_id)
        assert list(artifact.manifest.files) == [FILE]
        assert list(artifact.tensors(FILE)) == ["L00.mean", "L01.mean"]
        assert artifact.manifest.config["tensors"] == ["L00.mean", "L01.mean"]
        states = artifact.read_tensors(FILE)
        for site in (FIRST, SECOND):
            rows = read_activations(own, site, CORRECT)[problem_id]
            np.testing.assert_array_equal(rows, states[f"L{site.layer:02d}.mean"].float())


def test_another_pooling_stores_itself_alone_and_leaves_what_there_is(own: Plan) -> None:
    before = {each: of_text(own, each)[0].key for each in problems(own)}
    means = read_activations(own, SECOND, CORRECT)
    more = with_poolings(own, "mean", "last", "tokens")
    run(more)
    for problem_id, key in before.items():
        old, new = of_text(more, problem_id)
        assert old.key == key
        assert {*new.tensors(FILE)} == {
            f"L{layer:02d}.{name}" for layer in (0, 1) for name in ("last", "tokens", "offsets")
        }
    index = more.read("activations", (str(SECOND), CORRECT), "shards")
    assert index["pooling"].to_list() == ["mean", "last", "tokens"] * len(before)
    again = read_activations(more, SECOND, CORRECT)
    assert all(np.array_equal(again[each], means[each]) for each in before)
    # The first study still stands, and fewer poolings need nothing new.
    assert list(missing_cells(own, "activations", cells_of(own.study, "activations"))) == []
    fewer = with_poolings(own, "mean", "last")
    n_artifacts = len(list(own.store.keys("activation_shards")))
    run(fewer)
    assert len(list(own.store.keys("activation_shards"))) == n_artifacts


def test_what_is_kept_of_a_pooling_does_not_depend_on_the_others(
    own: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = passes.fits
    n_asked = []

    def fits(ranges: Any, storage: Any) -> bool:
        n_asked.append(1)
        return real(ranges, storage) and len(n_asked) % 2 == 0

    monkeypatch.setattr(passes, "fits", fits)
    more = with_poolings(own, "mean", "max", "boundary")
    run(more, FIRST)
    index = more.read("activations", (str(FIRST), CORRECT), "shards").filter(pooling="max")
    assert index["dtype"].to_list() == ["float32"] * len(problems(own))
    index = more.read("activations", (str(FIRST), CORRECT), "shards").filter(pooling="boundary")
    assert index["dtype"].to_list() == ["float16"] * len(problems(own))


def test_a_layer_is_read_and_checked_without_the_rest(built: Any, own: Plan) -> None:
    problem_id = problems(own)[1]
    (artifact,) = of_text(own, problem_id)
    means = read_activations(own, FIRST, CORRECT)
    flip(artifact, "L01.mean")
    assert np.array_equal(read_activations(own, FIRST, CORRECT)[problem_id], means[problem_id])
    with pytest.raises(CorruptArtifactError, match=r"tensor L01\.mean.*expected sha256") as caught:
        read_activations(own, SECOND, CORRECT)
    assert str(artifact.path) in str(caught.value)
    unsound = [each.key for each in own.store.verify("activation_shards") if not each.is_sound]
    assert unsound == [artifact.key]
    # This process has seen it, so the next run makes it again.
    plan = open_plan(built.study, own.data_root)
    assert not plan.store.versions("activation_shards", artifact.key.partition)
    own.store.discard(artifact.key)
    run(plan)
    assert of_text(plan, problem_id)[0].manifest.files == artifact.manifest.files


def test_what_was_found_damaged_is_not_read_again_by_the_layer_that_was_made_anew(
    built: Any, own: Plan
) -> None:
    (artifact,) = of_text(own, problems(own)[1])
    means = read_activations(own, SECOND, CORRECT)
    flip(artifact, "L01.mean")
    with pytest.raises(CorruptArtifactError):
        read_activations(own, SECOND, CORRECT)
    plan = open_plan(built.study, own.data_root)
    run(plan, SECOND)
    again = read_activations(plan, SECOND, CORRECT)
    assert all(np.array_equal(again[each], means[each]) for each in means)


def test_a_damaged_header_is_a_damaged_artifact(own: Plan) -> None:
    (artifact,) = of_text(own, problems(own)[0])
    path = artifact.path / FILE
    raw = path.read_bytes()
    path.write_bytes(raw.replace(b'"F16"', b'"F61"').replace(b"L00.mean", b"L00.mxan"))
    with pytest.raises(CorruptArtifactError, match=r"L00\.mean"):
        read_activations(own, FIRST, CORRECT)
    assert not of_text(own, problems(own)[0])


def test_an_artifact_of_other_inputs_is_not_taken_for_the_text(own: Plan) -> None:
    problem_id = problems(own)[0]
    (artifact,) = of_text(own, problem_id)
    states = read_tensors(artifact.path / FILE)
    alike = artifact.key._replace(fingerprint="f" * 20)
    own.store.commit(
        alike,
        lambda folder: write_tensors(folder / FILE, {"L00.max": states["L00.mean"]}),
        provenance=artifact.manifest.provenance,
        config=artifact.manifest.config | {"storage": "float32", "tensors": ["L00.max"]},
    )
    other = with_poolings(own, "mean", "max")
    run(other, FIRST)
    shards = other.read("activations", (str(FIRST), CORRECT), "shards")
    assert alike.fingerprint not in shards["shard_fingerprint"].to_list()


def test_pruning_keeps_the_older_artifacts_that_a_cell_reads(own: Plan) -> None:
    for pooling in ("last", "max", "tokens"):
        newest = with_poolings(own, "mean", pooling)
        run(newest, FIRST)
    own.store.prune(1)
    for problem_id in problems(own):
        first, last = of_text(own, problem_id)
        assert [*first.tensors(FILE)] == ["L00.mean", "L01.mean"]
        assert {*last.tensors(FILE)} == {"L00.tokens", "L00.offsets"}
    assert list(missing_cells(newest, "activations", [(str(FIRST), CORRECT)])) == []
    assert all(verdict.is_sound for verdict in own.store.verify("activations"))


def test_the_lines_of_the_documentation_read_one_layer(own: Plan) -> None:
    text = (Path(__file__).parents[3] / "docs" / "artifacts.md").read_text()
    (lines,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    problem_id = problems(own)[0]
    (artifact,) = of_text(own, problem_id)
    place = "activation_shards/MODEL/SETTING/problem_7/FINGERPRINT"
    assert place in lines
    found: dict[str, Any] = {}
    exec(lines.replace(place, str(artifact.path)).replace("L16.mean", "L01.mean"), found)  # noqa: S102
    rows = read_activations(own, SECOND, CORRECT)[problem_id]
    np.testing.assert_array_equal(found["states"].astype(np.float32), rows)
