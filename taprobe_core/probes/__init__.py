"""Fit probes on folds, keep them as arrays, and score with them.

inputs    what a recipe reads, and the feature matrix from stored arrays
words     term counts and their weights
pipeline  the scikit-learn pipeline of a recipe, its fit, its arrays
fitted    a fitted probe: arrays in, scores out
fit       one recipe over folds
files     probes on disk
"""

from taprobe_core.probes.files import load_probes, save_probes
from taprobe_core.probes.fit import RecipeFit, fit_recipe
from taprobe_core.probes.fitted import FittedProbe, Training

__all__ = [
    "FittedProbe",
    "RecipeFit",
    "Training",
    "fit_recipe",
    "load_probes",
    "save_probes",
]
