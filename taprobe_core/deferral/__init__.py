"""Scores to deferral plans: which sentences a probe may decide, and which to label again.

`thresholds` searches the two thresholds of a plan; `plans` tunes them fold by fold and applies
them.
"""
