"""Pool `gpu`: the command line takes a slot, waits for one, and gives it back."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import dagster as dg
import pytest

from taprobe_core.pipeline import STAGES, Plan, cells_of
from taprobe_dagster import assets
from taprobe_dagster.definitions import build_defs
from taprobe_dagster.launch import Launch, execute, who_holds_pool
from taprobe_dagster.resources import Workbench


@pytest.fixture
def launch(plan: Plan) -> Launch:
    cells = cells_of(plan.study, "activations")
    return Launch("extract_activations", ("activations",), cells[0], cells[-1], "state")


@pytest.fixture
def defs(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> dg.Definitions:
    """The study's definitions, without checks of what the tests do not make."""
    for name in ("activations", "vertical_attention"):
        monkeypatch.setitem(STAGES, name, replace(STAGES[name], checks={}))
    return build_defs(plan.study, {"workbench": Workbench(plan.study, plan.data_root)})


def test_an_extraction_waits_for_the_slot_takes_it_and_gives_it_back(
    plan: Plan,
    fresh: dg.DagsterInstance,
    defs: dg.Definitions,
    launch: Launch,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log = fresh.event_log_storage
    log.set_concurrency_slots("gpu", 1)
    assert who_holds_pool(fresh, launch) == []
    assert log.claim_concurrency_slot("gpu", "another", "step").is_claimed
    assert who_holds_pool(fresh, launch) == ["another"]
    holders: list[set[str]] = []

    def run_stage(*_: Any) -> Iterator[Any]:
        holders.append(log.get_concurrency_info("gpu").active_run_ids)
        return iter(())

    monkeypatch.setattr(assets, "run_stage", run_stage)
    free = threading.Timer(3, log.free_concurrency_slots_for_run, ("another",))
    free.start()
    begun = time.monotonic()
    execute(defs, fresh, launch)
    free.join()
    assert time.monotonic() - begun >= 3
    (run,) = fresh.get_runs()
    assert holders == [{run.run_id}]
    assert log.get_concurrency_info("gpu").active_run_ids == set()


def test_an_interrupted_extraction_gives_its_slot_back(
    fresh: dg.DagsterInstance,
    defs: dg.Definitions,
    launch: Launch,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def run_stage(*_: Any) -> Iterator[Any]:
        raise KeyboardInterrupt

    fresh.event_log_storage.set_concurrency_slots("gpu", 1)
    monkeypatch.setattr(assets, "run_stage", run_stage)
    with pytest.raises(KeyboardInterrupt):
        execute(defs, fresh, launch)
    assert fresh.event_log_storage.get_concurrency_info("gpu").active_run_ids == set()
