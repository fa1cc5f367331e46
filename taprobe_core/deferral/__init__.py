"""Scores to deferral plans: which sentences a probe may decide, and which to label again."""
