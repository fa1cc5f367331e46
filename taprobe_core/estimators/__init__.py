"""scikit-learn faces of the batched solvers, for fitting one model at a time.

binary        what probes of two classes have in common
linear        ridge and logistic probes
network       multilayer perceptrons
tokens        attention, MultiMax and rolling MultiMax probes
token_inputs  token sets as scikit-learn takes them
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
