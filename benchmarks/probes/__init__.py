"""Probe training beside scikit-learn: speed and numerical agreement, in one run."""
