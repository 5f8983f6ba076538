"""Meta-learning of the MAML family in JAX."""
