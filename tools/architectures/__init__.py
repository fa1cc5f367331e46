"""Every causal model type of transformers, and drawn configurations, beside eager transformers.

One implementation for `make architectures`, which writes docs/architectures.md, and for the tests.
"""
