"""Resources: how an op comes by the study and the store.

What belongs here: configuration as plain values (paths), turned into core objects. Dagster config
holds only a path; everything else is in the study file.

Concept: https://docs.dagster.io/guides/build/external-resources
"""

from functools import cached_property
from pathlib import Path

import dagster as dg

from taprobe_core.pipeline import Plan, open_plan


class Workbench(dg.ConfigurableResource[Plan]):
    """The study and the store that the assets work on.

    Attributes:
        study_path: study file; empty takes `TAPROBE_STUDY`, else the bundled demo.
        data_root: folder of artifacts; empty takes `TAPROBE_DATA`, else `.taprobe`.
    """

    study_path: str = ""
    data_root: str = ""

    @classmethod
    def of(cls, plan: Plan) -> "Workbench":
        """A workbench on an open plan, for runs inside this process."""
        workbench = cls(data_root=str(plan.data_root))
        workbench.__dict__["plan"] = plan
        return workbench

    @cached_property
    def plan(self) -> Plan:
        """The plan of this study in this store."""
        return open_plan(self.study_path or None, Path(self.data_root) if self.data_root else None)
