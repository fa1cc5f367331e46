"""`Probe`: one recipe fitted to arrays or DataFrames, as a scikit-learn estimator."""

from taprobe_core.estimators.probe import LogisticProbe, Probe

__all__ = ["LogisticProbe", "Probe"]
