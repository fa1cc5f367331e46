"""Activation extraction beside its peers: speed and numerical agreement, in one run.

    python -m benchmarks.extraction --help

Modules: shapes (models), texts, timing, reading (how each library is asked for hidden states),
peers, ours, agreement, checks (packs, references, poolings, attention, several devices), tables.
"""
