"""Nine tables of the UCI repository: the estimator against what people use for predictive distributions."""
