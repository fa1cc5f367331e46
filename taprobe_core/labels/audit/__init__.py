"""Rollouts and the labels beside them -> what is wrong with them.

`findings` judges one problem, `folder` reads all problems of a rollouts folder. Repairing does not
belong here, nor does choosing what a study reads. Invariant: nothing is written.
"""

from taprobe_core.labels.audit.findings import (
    INFORMATIONAL,
    Finding,
    Kind,
    audit_problem,
    cut_prefix,
)
from taprobe_core.labels.audit.folder import RolloutAudit, audit_rollouts

__all__ = [
    "INFORMATIONAL",
    "Finding",
    "Kind",
    "RolloutAudit",
    "audit_problem",
    "audit_rollouts",
    "cut_prefix",
]
