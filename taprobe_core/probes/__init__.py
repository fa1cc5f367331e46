"""Fit probes on folds, keep them as arrays, and score with them.

inputs    the feature matrix of a recipe: learned on training rows, applied to any rows
words     term counts and their weights
linear    ridge and logistic regression, solved to their optimum
layers    ReLU layers and Adam's steps
network   when a network stops: early stopping by problem
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
