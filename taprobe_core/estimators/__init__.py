"""scikit-learn wrappers of the batched solvers, for fitting one model at a time.

linear   ridge and logistic probes; what probes of two classes have in common
network  multilayer perceptrons
tokens   attention, MultiMax and rolling MultiMax probes
"""

from taprobe_core.estimators.linear import LogisticProbe, RidgeProbe
from taprobe_core.estimators.network import MLPProbeClassifier, MLPProbeRegressor
from taprobe_core.estimators.tokens import TokenProbeClassifier, TokenProbeRegressor

__all__ = [
    "LogisticProbe",
    "MLPProbeClassifier",
    "MLPProbeRegressor",
    "RidgeProbe",
    "TokenProbeClassifier",
    "TokenProbeRegressor",
]
