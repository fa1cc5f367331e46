"""scikit-learn faces of the batched solvers, for fitting one model at a time.

linear        ridge and logistic probes
network       multilayer perceptrons
tokens        attention, MultiMax and rolling MultiMax probes
token_inputs  token sets as scikit-learn takes them
"""
