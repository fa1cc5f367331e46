"""Batched solvers: arrays in, arrays out, many models at once.

columns   what is asked for: folds, targets, weights, seeds; the statistics of every fold
linear    ridge and logistic regression over one feature matrix
networks  multilayer perceptrons trained side by side
tokens    attention, MultiMax and rolling MultiMax probes over one pass of the tokens
"""
