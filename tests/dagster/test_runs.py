"""Runs: what they compute, what they report, what they leave alone."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import dagster as dg
import pytest
import yaml
from dagster._core.definitions.data_version import (
    CachingStaleStatusResolver,
    StaleStatus,
)
from dagster._core.definitions.events import AssetKeyPartitionKey
from dagster._core.loader import LoadingContextForTest

from taprobe_core.errors import FailedCheckError, MissingArtifactError
from taprobe_core.pipeline import (
    STAGES,
    CellFilter,
    Found,
    Plan,
    cells_of,
    key_of,
    open_plan,
    verdicts,
)
from taprobe_core.store import Store
from taprobe_core.study import Study, parse_study
from taprobe_dagster.assets import ops_of
from taprobe_dagster.definitions import build_defs
from taprobe_dagster.launch import (
    execute,
    interrupts_kept,
    launches_of,
    stages_in,
    wanted_cells,
)
from taprobe_dagster.partitions import partition_key
from taprobe_dagster.resources import Workbench


def _all_launches(instance: dg.DagsterInstance, plan: Plan) -> list[object]:
    return [
        launch
        for op, stages in ops_of(plan.study).items()
        for launch in launches_of(instance, plan, op, stages)
    ]


def test_every_cell_is_materialized_with_its_fingerprint_as_data_version(
    plan: Plan, instance: dg.DagsterInstance, n_computed: Mapping[str, int]
) -> None:
    assert sum(n_computed.values()) == sum(len(cells_of(plan.study, stage)) for stage in STAGES)
    for stage in STAGES:
        for cell in cells_of(plan.study, stage):
            record = instance.get_latest_data_version_record(
                dg.AssetKey(stage), False, partition_key(stage, cell)
            )
            assert record is not None
            event = record.asset_materialization
            assert event is not None
            assert event.tags is not None
            assert event.tags["dagster/data_version"] == key_of(plan, stage, cell).fingerprint
            assert event.metadata["fingerprint"].value == key_of(plan, stage, cell).fingerprint


def test_a_backfill_of_every_cell_of_an_op_is_one_run(
    study: Study, instance: dg.DagsterInstance, n_computed: Mapping[str, int]
) -> None:
    assert instance.get_runs_count() == len(n_computed) == len(ops_of(study))


def test_activations_say_dataset_model_and_fingerprint(
    plan: Plan, instance: dg.DagsterInstance, n_computed: Mapping[str, int]
) -> None:
    event = instance.get_latest_materialization_event(dg.AssetKey("activations"))
    assert event is not None
    assert event.asset_materialization is not None
    metadata = event.asset_materialization.metadata
    assert metadata["dataset_kind"].value == "policy"
    assert metadata["checkpoint_kind"].value == "stand_in"
    assert str(metadata["picture"].value).startswith("![activations](data:image/png;base64,")
    assert isinstance(metadata["mean_norm"].value, float)


def test_receiver_heads_show_their_table_and_what_else_explains_them(
    plan: Plan, instance: dg.DagsterInstance, n_computed: Mapping[str, int]
) -> None:
    shown = {}
    for stage in ("vertical_attention", "receiver_heads"):
        event = instance.get_latest_materialization_event(dg.AssetKey(stage))
        assert event is not None
        assert event.asset_materialization is not None
        shown[stage] = event.asset_materialization.metadata
        assert str(shown[stage]["picture"].value).startswith(f"![{stage}](data:image/png;base64,")
    top = shown["receiver_heads"]["top_heads"]
    assert isinstance(top, dg.TableMetadataValue)
    assert {"layer", "head", "n_folds", "kurtosis"} <= {each.name for each in top.schema.columns}
    assert top.records[0].data["n_folds"] == 6
    assert isinstance(shown["receiver_heads"]["split_half_pearson"].value, float)
    attention = shown["vertical_attention"]
    for name in ("median_bos_share", "median_first_sentence_share", "median_distance_r_squared"):
        assert 0 <= float(str(attention[name].value)) <= 1


def test_a_light_study_materializes_attention_from_the_last_tokens_and_no_heads(
    small_text: str, fresh: dg.DagsterInstance, tmp_path_factory: pytest.TempPathFactory
) -> None:
    values = yaml.safe_load(small_text)
    del values["models"]["other"]
    values |= {"settings": ["correct_base_solution"], "attention": {"mode": "light"}}
    light = parse_study(yaml.safe_dump(values), "light.yaml")
    plan = open_plan(light, tmp_path_factory.mktemp("light"))
    defs = build_defs(light, {"workbench": Workbench(light, plan.data_root)})
    for op in ("read_rollouts", "extract_activations"):
        for launch in launches_of(fresh, plan, op, ops_of(light)[op]):
            execute(defs, fresh, launch)
    cells = cells_of(light, "vertical_attention")
    assert fresh.get_materialized_partitions(dg.AssetKey("vertical_attention")) == {
        partition_key("vertical_attention", cell) for cell in cells
    }
    files = plan.store.open(key_of(plan, "vertical_attention", cells[0])).manifest.files
    assert set(files) == {"shards.parquet", "scores.parquet"}
    assert "choose_receiver_heads" not in ops_of(light)


def test_every_check_passes_on_sound_artifacts(
    instance: dg.DagsterInstance, n_computed: Mapping[str, int]
) -> None:
    keys = [
        dg.AssetCheckKey(dg.AssetKey(stage), name)
        for stage in STAGES
        for name in STAGES[stage].checks
    ]
    found = instance.event_log_storage.get_latest_asset_check_execution_by_key(keys)
    assert set(found) == set(keys)
    assert {record.status.value for record in found.values()} == {"SUCCEEDED"}


@pytest.mark.parametrize("name", ["passages_differ_across_problems", "no_trace_on_two_sides"])
def test_a_repeated_passage_warns_and_a_repeated_trace_stops(
    plan: Plan,
    defs: dg.Definitions,
    fresh: dg.DagsterInstance,
    monkeypatch: pytest.MonkeyPatch,
    n_computed: Mapping[str, int],
    tmp_path: Path,
    name: str,
) -> None:
    def look(plan: Plan, cell: tuple[str, ...]) -> Found:
        return Found(("a copy",))

    planted = replace(STAGES["rollouts"].checks[name], look=look)
    checks = {**STAGES["rollouts"].checks, name: planted}
    monkeypatch.setitem(STAGES, "rollouts", replace(STAGES["rollouts"], checks=checks))
    # What sound artifacts are known for is known elsewhere.
    monkeypatch.setattr(verdicts, "checks_store", lambda plan: Store(tmp_path / "checks"))
    (launch,) = launches_of(fresh, plan, "read_rollouts", ops_of(plan.study)["read_rollouts"])
    is_warning = name == "passages_differ_across_problems"
    stops = pytest.raises(FailedCheckError, match=name)
    with nullcontext() if is_warning else stops:
        execute(defs, fresh, launch)
    key = dg.AssetCheckKey(dg.AssetKey("rollouts"), name)
    record = fresh.event_log_storage.get_latest_asset_check_execution_by_key([key])[key]
    assert record.status.value == "FAILED"
    assert record.event is not None
    assert record.event.dagster_event is not None
    evaluation = record.event.dagster_event.asset_check_evaluation_data
    assert evaluation.severity.value == ("WARN" if is_warning else "ERROR")
    assert evaluation.metadata["n_faults"].value == len(cells_of(plan.study, "rollouts"))
    assert "a copy" in str(evaluation.metadata["faults"].value)
    spec = defs.resolve_asset_graph().get_check_spec(key)
    assert spec.blocking is not is_warning


def test_selectivity_is_a_number_that_plots(
    instance: dg.DagsterInstance, n_computed: Mapping[str, int]
) -> None:
    event = instance.get_latest_materialization_event(dg.AssetKey("evaluation"))
    assert event is not None
    assert event.asset_materialization is not None
    metadata = event.asset_materialization.metadata
    for name in ("selectivity/linear_probe", "control_value/linear_probe"):
        assert isinstance(metadata[name], dg.FloatMetadataValue)
    assert 0 < float(str(metadata["control_value/linear_probe"].value)) <= 1


def test_nothing_is_wanted_afterwards_and_nothing_is_stale(
    plan: Plan, defs: dg.Definitions, instance: dg.DagsterInstance, n_computed: Mapping[str, int]
) -> None:
    assert _all_launches(instance, plan) == []
    resolver = CachingStaleStatusResolver(
        instance, defs.resolve_asset_graph(), LoadingContextForTest(instance)
    )
    for stage in STAGES:
        for cell in cells_of(plan.study, stage):
            key = AssetKeyPartitionKey(dg.AssetKey(stage), partition_key(stage, cell))
            assert resolver.get_status(key.asset_key, key.partition_key) == StaleStatus.FRESH


def test_a_fresh_event_log_adopts_artifacts_without_computing(
    plan: Plan, defs: dg.Definitions, fresh: dg.DagsterInstance, n_computed: Mapping[str, int]
) -> None:
    launches = list(launches_of(fresh, plan, "read_rollouts", ops_of(plan.study)["read_rollouts"]))
    assert len(launches) == 1
    assert execute(defs, fresh, launches[0]) == 0
    assert (
        list(launches_of(fresh, plan, "read_rollouts", ops_of(plan.study)["read_rollouts"])) == []
    )


def test_a_changed_label_definition_makes_labels_stale_and_leaves_activations(
    study: Study, plan: Plan, instance: dg.DagsterInstance, n_computed: Mapping[str, int]
) -> None:
    changed = study.model_copy(
        update={"labels": study.labels.model_copy(update={"percentile": 80.0})}
    )
    other = open_plan(changed, plan.data_root)

    def wanted(stage: str) -> int:
        return len(wanted_cells(instance, other, stage, cells_of(changed, stage)))

    assert wanted("labels") == len(cells_of(changed, "labels"))
    assert wanted("probe_fits") == len(cells_of(changed, "probe_fits"))
    for stage in ("rollouts", "spans", "activations", "vertical_attention", "receiver_heads"):
        assert wanted(stage) == 0


def test_one_cell_runs_alone(
    study: Study, plan: Plan, fresh: dg.DagsterInstance, n_computed: Mapping[str, int]
) -> None:
    chosen = CellFilter(frozenset({"tiny@L01"}), frozenset({"correct_base_solution@s01"}))
    defs = build_defs(study, {"workbench": Workbench(plan.study, plan.data_root)})
    launches = list(
        launches_of(fresh, plan, "fit_probes", ops_of(plan.study)["fit_probes"], chosen)
    )
    assert [(each.first, each.last) for each in launches] == [
        (("tiny@L01", "correct_base_solution@s01"),) * 2
    ]
    execute(defs, fresh, launches[0])
    assert fresh.get_materialized_partitions(dg.AssetKey("probe_fits")) == {
        partition_key("probe_fits", ("tiny@L01", "correct_base_solution@s01"))
    }


def test_a_missing_input_fails_with_where_and_fix_and_is_not_retried(
    study: Study, fresh: dg.DagsterInstance, tmp_path_factory: pytest.TempPathFactory
) -> None:
    empty = open_plan(study, tmp_path_factory.mktemp("empty"))
    defs = build_defs(study, {"workbench": Workbench(empty.study, empty.data_root)})
    launch = next(iter(launches_of(fresh, empty, "fit_probes", ops_of(study)["fit_probes"])))
    with pytest.raises(MissingArtifactError, match="Fix: "):
        execute(defs, fresh, launch)
    failed = [
        entry.dagster_event
        for entry in fresh.all_logs(fresh.get_runs()[0].run_id)
        if entry.dagster_event and entry.dagster_event.is_step_failure
    ]
    assert len(failed) == 1
    data = failed[0].step_failure_data
    assert data.user_failure_data is not None
    assert data.user_failure_data.metadata["fix"].value


def test_a_corrupt_artifact_fails_its_blocking_check_or_its_read(
    study: Study, fresh: dg.DagsterInstance, tmp_path_factory: pytest.TempPathFactory
) -> None:
    plan = open_plan(study, tmp_path_factory.mktemp("corrupt"))
    defs = build_defs(study, {"workbench": Workbench(plan.study, plan.data_root)})
    (launch,) = launches_of(fresh, plan, "read_rollouts", ops_of(plan.study)["read_rollouts"])
    execute(defs, fresh, launch)
    key = key_of(plan, "spans", cells_of(study, "spans")[0])
    artifact = plan.store.find(key)
    assert artifact is not None
    path = artifact.path / "spans.parquet"
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(bytes(raw))
    unsound = [verdict for verdict in plan.store.verify() if not verdict.is_sound]
    assert [verdict.key for verdict in unsound] == [key]


class Finalized:
    def __del__(self) -> None:
        raise KeyboardInterrupt


def test_an_interrupt_that_comes_while_a_finalizer_runs_is_not_lost() -> None:
    hook = sys.unraisablehook
    # Whoever runs the tests may ignore interrupts, as a worker process does.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), interrupts_kept():  # noqa: PT012
            Finalized()
            time.sleep(5)
    finally:
        signal.signal(signal.SIGINT, handler)
    assert sys.unraisablehook is hook


def test_a_selection_keeps_the_order_of_the_op(study: Study) -> None:
    chosen = frozenset({"spans", "rollouts"})
    assert stages_in(study, "read_rollouts", chosen) == ("rollouts", "spans")
    assert stages_in(study, "read_rollouts", None) == ops_of(study)["read_rollouts"]
