"""Fit probes on folds, keep them as arrays, and score with them.

features      labels, spans, activations, attention ─► the rows that probes read; terms of texts
inputs        what a recipe reads of them: the feature matrix, also of a stored probe
targets       labels ─► what a recipe is fitted to and judged by; residuals: less a baseline
control_task  labels that no text can explain
design        rows, folds and targets that recipes share; the content hash of a fit
registry      name of an estimator ─► how it is fitted and scored
dense         linear probes and multilayer perceptrons of many recipes in one solve
fitted        a fitted probe: arrays, scores, files; probes that read token sets
fit           recipes ─► solves ─► scores
"""

from taprobe_core.probes.design import Contents, Design, Fit
from taprobe_core.probes.fit import RecipeFit, fit_batches, fit_each
from taprobe_core.probes.fitted import FittedProbe, Training, load_probes, save_probes

__all__ = [
    "Contents",
    "Design",
    "Fit",
    "FittedProbe",
    "RecipeFit",
    "Training",
    "fit_batches",
    "fit_each",
    "load_probes",
    "save_probes",
]
