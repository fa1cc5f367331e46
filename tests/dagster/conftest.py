"""A small study with every stage there is, materialized once and shared by the tests of the rim."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest

from taprobe_core.pipeline import Plan, open_plan
from taprobe_core.study import Study, parse_study
from taprobe_dagster.assets import ops_of
from taprobe_dagster.definitions import build_defs
from taprobe_dagster.launch import execute, launches_of
from taprobe_dagster.resources import Workbench


@pytest.fixture(scope="session")
def study(small_text: str) -> Study:
    return parse_study(f"{small_text}attention: {{mode: full}}\n", "small.yaml")


@pytest.fixture(scope="session")
def plan(study: Study, tmp_path_factory: pytest.TempPathFactory) -> Plan:
    return open_plan(study, tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def defs(plan: Plan) -> dg.Definitions:
    return build_defs(plan.study, {"workbench": Workbench(plan.study, plan.data_root)})


@pytest.fixture(scope="session")
def instance(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dg.DagsterInstance]:
    with dg.instance_for_test(temp_dir=str(tmp_path_factory.mktemp("dagster"))) as instance:
        yield instance


@pytest.fixture(scope="session")
def n_computed(plan: Plan, defs: dg.Definitions, instance: dg.DagsterInstance) -> dict[str, int]:
    """Materialize the whole study; op -> artifacts computed."""
    return {
        op: sum(
            execute(defs, instance, launch) for launch in launches_of(instance, plan, op, stages)
        )
        for op, stages in ops_of(plan.study).items()
    }


@pytest.fixture
def fresh(tmp_path: Path) -> Iterator[dg.DagsterInstance]:
    """An instance that knows of no run."""
    with dg.instance_for_test(temp_dir=str(tmp_path)) as instance:
        yield instance
