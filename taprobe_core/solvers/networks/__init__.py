"""Multilayer perceptrons of many recipes, folds and seeds, side by side."""
