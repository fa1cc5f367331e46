"""The `taprobe` command: everything that needs no Dagster. `taprobe_dagster.cli` adds the rest.

Exit codes: 0 done; 1 a defect of ours (with its traceback); 2 something you can fix (one message,
no traceback); 3 an artifact is unsound or a check failed; 130 interrupted.
"""

from taprobe_core.cli.app import EXIT_FIXABLE, EXIT_INTERRUPTED, EXIT_UNSOUND, app, guarded
from taprobe_core.cli.deferral import plan_
from taprobe_core.cli.rollout_audit import audit_rollouts_

__all__ = [
    "EXIT_FIXABLE",
    "EXIT_INTERRUPTED",
    "EXIT_UNSOUND",
    "app",
    "audit_rollouts_",
    "guarded",
    "plan_",
]
