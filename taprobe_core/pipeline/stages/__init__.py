"""The page to read first: every stage there is, in data-path order, one file each.

    rollouts ─┬─ labels ───────────────────┐
              └─ spans ─┬─ activations ────┴─ probe_fits ── deferral_plans ─┐
                        │                          └────────────────────────┴─ evaluation ─┐
                        └─ vertical_attention ── receiver_heads                            │
                                                       study_report ── leaderboard ────────┘

A `Stage` (`pipeline.stage`) says everything about one asset: its grid, what it reads, the slice of
the study in its key, how it is made, checked and shown, the contracts of its tables, how Dagster
runs it. Keys, manifests, gate, report, commands and asset definitions all read `STAGES`; a new
stage is one file here and one line below.
"""

from __future__ import annotations

from taprobe_core.pipeline.plan import Plan
from taprobe_core.pipeline.stage import Stages
from taprobe_core.pipeline.stages.activations import ACTIVATIONS
from taprobe_core.pipeline.stages.deferral_plans import DEFERRAL_PLANS
from taprobe_core.pipeline.stages.evaluation import EVALUATION
from taprobe_core.pipeline.stages.labels import LABELS
from taprobe_core.pipeline.stages.leaderboard import LEADERBOARD
from taprobe_core.pipeline.stages.probe_fits import PROBE_FITS
from taprobe_core.pipeline.stages.receiver_heads import RECEIVER_HEADS
from taprobe_core.pipeline.stages.rollouts import ROLLOUTS
from taprobe_core.pipeline.stages.spans import SPANS
from taprobe_core.pipeline.stages.study_report import STUDY_REPORT
from taprobe_core.pipeline.stages.sweep import SWEEP
from taprobe_core.pipeline.stages.vertical_attention import VERTICAL_ATTENTION

STAGES: Stages[Plan] = Stages(
    (
        ROLLOUTS,
        LABELS,
        SPANS,
        ACTIVATIONS,
        VERTICAL_ATTENTION,
        RECEIVER_HEADS,
        PROBE_FITS,
        DEFERRAL_PLANS,
        EVALUATION,
        LEADERBOARD,
        STUDY_REPORT,
        *SWEEP,
    )
)
