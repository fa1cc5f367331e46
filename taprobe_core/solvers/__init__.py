"""Batched solvers: arrays in, arrays out, many models at once.

columns       what is asked for: folds, targets, weights, seeds
fold_matrix   one feature matrix, standardised by every fold for itself (text_block, fold_moments)
ridge         ridge regression of all columns (bordered: one factor, held-out rows taken out)
logistic      logistic regression of all columns (logistic_*, dual_subspace: few directions)
networks      multilayer perceptrons trained together (network_*)
token_probes  attention, MultiMax and rolling MultiMax probes trained together (token_*, ragged)
platt         calibration of scores on held-out labels
"""
