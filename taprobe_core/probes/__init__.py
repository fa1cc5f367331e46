"""Fit probes on folds, keep them as arrays, and score with them.

inputs      what a recipe reads, and the feature matrix from stored arrays
design      rows, folds and targets that recipes share
solved      what an estimator has to offer, and what a solve leaves
linear      logistic regression and ridge of many recipes in one solve
network     multilayer perceptrons of many recipes and seeds in one solve
token_sets  attention, MultiMax and rolling MultiMax probes in one solve
registry    name of an estimator to how it is fitted and scored
fitted      a fitted probe: arrays and what they were fitted on
fit         recipes to solves to scores
files       probes on disk
content     a name for what a fit sees
precision   products on CUDA
threads     how many threads a solve gets
"""

from taprobe_core.probes.design import Contents, Design, Fit
from taprobe_core.probes.fit import RecipeFit, fit_batches, fit_each
from taprobe_core.probes.fitted import FittedProbe, Training, load_probes, save_probes
from taprobe_core.probes.registry import predict

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
    "predict",
    "save_probes",
]
