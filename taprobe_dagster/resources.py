"""Resources: how an op comes by the study and the store, and the pool in which it waits its turn.

What belongs here: the way from what Dagster knows (a study, a folder) to a core object.

Concept: https://docs.dagster.io/guides/build/external-resources
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from taprobe_core.pipeline import Plan, open_plan
from taprobe_core.study import Study

GPU_POOL = "gpu"
"""The pool of everything that extracts."""


@dataclass(frozen=True)
class Workbench:
    """The study and the data folder that the assets work on.

    Attributes:
        study: the study that the grids were made from.
        data_root: folder of artifacts; None takes `TAPROBE_DATA`, else `.taprobe`.
    """

    study: Study
    data_root: Path | None = None

    def plan(self) -> Plan:
        """Open a plan.

        Each call hashes the source files again where they have changed: a code server lives long,
        and a plan is only as fresh as its opening.
        """
        return open_plan(self.study, self.data_root)
