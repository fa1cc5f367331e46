"""Checks that a pipeline of probes is sound: arrays and folds in, a verdict in words out.

shuffling     do held-out labels reach a probe? an exact null at a stated false-alarm rate
memorisation  can one problem be learned by heart? or do rows or labels contradict
rows          equal rows, copied problems, sides of a fold
fits          the linear probes and the network that the checks fit

A tripwire that holds says that the pipeline is not broken in the way it looks at; it never says
that a probe is good. `docs/tripwires.md` has false-alarm rates, power, and what to do.
"""

from taprobe_core.evaluation.tripwires.fits import linear_probe, network, ridge_probe
from taprobe_core.evaluation.tripwires.memorisation import Memorisation, memorises_one_problem
from taprobe_core.evaluation.tripwires.rows import (
    CopiedProblem,
    Duplicates,
    duplicates_across_problems,
    row_identity,
)
from taprobe_core.evaluation.tripwires.shuffling import (
    Fit,
    HeldOutProblem,
    ShuffledLabels,
    shuffled_labels,
)

__all__ = [
    "CopiedProblem",
    "Duplicates",
    "Fit",
    "HeldOutProblem",
    "Memorisation",
    "ShuffledLabels",
    "duplicates_across_problems",
    "linear_probe",
    "memorises_one_problem",
    "network",
    "ridge_probe",
    "row_identity",
    "shuffled_labels",
]
