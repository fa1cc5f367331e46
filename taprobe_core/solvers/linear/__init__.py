"""Ridge and logistic regression of many columns over one feature matrix.

fold_matrix     the features, standardised by every fold for itself; term counts
ridge           closed form and preconditioned conjugate gradients
logistic        batched L-BFGS, its certificate, and Newton for what it cannot certify
kernel_systems  one factorisation for every subset of the rows
solution        what comes back
"""
