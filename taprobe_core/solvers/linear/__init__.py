"""Ridge and logistic regression of many columns over one feature matrix.

fold_matrix      the features, standardised by every fold for itself; term counts
ridge            closed form and preconditioned conjugate gradients
logistic         which columns share a batch ─► logistic_batch ─► dual_subspace
logistic_phases  where folds start, what preconditions them; Newton for few features
kernel_systems   one factorisation for every subset of the rows
solution         what comes back
"""
