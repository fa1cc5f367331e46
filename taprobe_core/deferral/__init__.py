"""Scores to deferral plans (`plans`): what a probe may decide, what is to be labelled again."""
