"""Grids, mappings and rectangles: what a cell is called, what it reads, how few runs cover many."""

from __future__ import annotations

import dagster as dg
import pytest
from hypothesis import given
from hypothesis import strategies as st

from taprobe_core.pipeline import STAGES, cells_of, parents_of, stages_of
from taprobe_core.study import Study, Sweep, parse_study
from taprobe_dagster.assets import ops_of
from taprobe_dagster.definitions import build_defs
from taprobe_dagster.partitions import boxes, cell_of, grid_of, partition_key

LARGE = """
name: large
rollouts: {source: {kind: hub, repo: org/rollouts}}
models:
  a: {rollouts_dir: a, checkpoint: {kind: pretrained, path: org/a}, n_layers: 32}
  b: {rollouts_dir: b, checkpoint: {kind: pretrained, path: org/b}, n_layers: 48}
settings: [one, two, three, four]
seeds: [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19]
"""


@pytest.fixture(scope="module")
def swept(study: Study) -> Study:
    """The study with every stage there is."""
    sweep = Sweep(poolings=("mean",), drop_last_sentence=(True,))
    return study.model_copy(update={"sweep": sweep})


@pytest.mark.parametrize("stage", [stage for stage in STAGES if STAGES[stage].grid])
def test_a_grid_has_two_dimensions_and_exactly_the_cells_of_its_stage(
    swept: Study, stage: str
) -> None:
    grid = grid_of(swept, stage)
    assert grid is not None
    assert len(grid.partitions_defs) == 2
    cells = cells_of(swept, stage)
    assert {cell_of(stage, key) for key in grid.get_partition_keys()} == set(cells)
    assert all(cell_of(stage, str(partition_key(stage, cell))) == cell for cell in cells)


def test_a_site_reads_its_model_and_a_trial_its_setting(study: Study) -> None:
    graph = build_defs(study).resolve_asset_graph()

    def read(child: str, cell: tuple[str, ...], parent: str) -> set[tuple[str, ...]]:
        key = partition_key(child, cell)
        found = graph.get_parent_partition_keys_for_child(
            key, dg.AssetKey(parent), dg.AssetKey(child)
        )
        return {cell_of(parent, each) for each in found.partitions_subset.get_partition_keys()}

    one = "correct_base_solution"
    assert read("activations", ("other@L02", one), "spans") == {("other", one)}
    assert read("receiver_heads", ("other", one), "vertical_attention") == {
        ("other@L00", one),
        ("other@L02", one),
    }
    assert read("probe_fits", ("tiny@L01", f"{one}@s01"), "activations") == {("tiny@L01", one)}
    assert read("probe_fits", ("tiny@L01", f"{one}@s01"), "labels") == {("tiny", one)}
    assert read("evaluation", ("tiny@L01", one), "probe_fits") == {
        ("tiny@L01", f"{one}@s00"),
        ("tiny@L01", f"{one}@s01"),
    }


def test_every_parent_that_the_pipeline_reads_is_a_dependency(swept: Study) -> None:
    defs = build_defs(swept)
    dg.Definitions.validate_loadable(defs)
    graph = defs.resolve_asset_graph()
    for stage, parents in ((stage.name, stage.reads) for stage in STAGES.values()):
        found = {key.to_user_string() for key in graph.get(dg.AssetKey(stage)).parent_keys}
        assert found == set(parents or ("dataset",))
        assert parents_of(swept, stage) == parents


@pytest.mark.parametrize(("mode", "stages"), [("off", set()), ("light", {"vertical_attention"})])
def test_a_study_has_the_assets_of_the_attention_it_asks_for(
    small_text: str, mode: str, stages: set[str]
) -> None:
    study = parse_study(f"{small_text}attention: {{mode: {mode}}}\n", "small.yaml")
    defs = build_defs(study)
    dg.Definitions.validate_loadable(defs)
    found = {key.to_user_string() for key in defs.resolve_asset_graph().materializable_asset_keys}
    assert found == set(stages_of(study))
    assert found & {"vertical_attention", "receiver_heads"} == stages
    assert {job.name for job in defs.jobs or ()} == {f"{op}_job" for op in ops_of(study)}
    assert "choose_receiver_heads" not in ops_of(study)


def test_a_study_of_two_models_and_twenty_seeds_has_6400_trial_cells() -> None:
    graph = build_defs(parse_study(LARGE, "large.yaml")).resolve_asset_graph()
    grid = graph.get(dg.AssetKey("probe_fits")).partitions_def
    assert grid is not None
    assert grid.get_num_partitions() == 6400


@given(data=st.data())
def test_rectangles_cover_the_wanted_cells_exactly_and_once(
    study: Study, data: st.DataObject
) -> None:
    everything = cells_of(study, "probe_fits")
    wanted = data.draw(st.lists(st.sampled_from(everything), unique=True))
    grid = grid_of(study, "probe_fits")
    assert grid is not None
    covered = [
        cell_of("probe_fits", key)
        for first, last in boxes(study, "probe_fits", wanted)
        for key in grid.get_partition_keys_in_range(
            dg.PartitionKeyRange(
                partition_key("probe_fits", first), partition_key("probe_fits", last)
            )
        )
    ]
    assert sorted(covered) == sorted(wanted)


def test_a_whole_grid_is_one_rectangle(swept: Study) -> None:
    for stage in STAGES:
        assert len(list(boxes(swept, stage, cells_of(swept, stage)))) == 1
