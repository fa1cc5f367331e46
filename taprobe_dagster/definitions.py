"""Everything Dagster loads: `build_defs` makes it afresh for any study, `defs` for the chosen one.

What belongs here: putting together. Pass other resources to `build_defs` to test with another
study or another folder.

Concept: https://docs.dagster.io/guides/build/projects-and-components
"""

from __future__ import annotations

from collections.abc import Mapping

import dagster as dg

from taprobe_core.study import Study, load_study
from taprobe_dagster.assets import ops_of, stage_assets
from taprobe_dagster.automation import op_jobs, schedules, wanted_cells_sensor
from taprobe_dagster.liveness import recorded_executor
from taprobe_dagster.resources import Workbench
from taprobe_dagster.sources import dataset_source


def build_defs(
    study: Study | None = None, resources: Mapping[str, object] | None = None
) -> dg.Definitions:
    """Definitions of one study.

    Args:
        study: the study whose grids the assets get; None takes `TAPROBE_STUDY`, else the demo.
        resources: put beside or in place of the workbench on the default data folder.
    """
    loaded = study or load_study()
    jobs = op_jobs(loaded)
    return dg.Definitions(
        assets=[dataset_source(loaded), *(stage_assets(loaded, op) for op in ops_of(loaded))],
        jobs=list(jobs.values()),
        schedules=schedules(jobs),
        sensors=[wanted_cells_sensor(jobs)],
        resources={"workbench": Workbench(loaded), **(resources or {})},
        executor=recorded_executor,
    )


defs = build_defs()
