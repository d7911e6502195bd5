"""Several outputs: the joint model, the chain and mixtures of full covariance, on known densities and head poses."""
