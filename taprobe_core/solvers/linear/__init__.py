"""Ridge and logistic regression of many columns over one feature matrix."""
