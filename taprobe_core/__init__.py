"""taprobe: predict which sentences of a reasoning trace matter, from a model's activations.

This package is the pure library. It never imports Dagster, never prints, and touches the network
only where a study names a hub. `taprobe_dagster` is the thin rim that turns it into assets.
"""
