"""Multilayer perceptrons of many recipes, folds and seeds, side by side.

solve ─► training ─► batch ─► kernels    columns ─► epochs ─► one minibatch ─► CUDA
  └─► options                            settings, checks, when a network stops
"""
