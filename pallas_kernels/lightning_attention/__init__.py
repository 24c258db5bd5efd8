"""Lightning attention: linear attention with one fixed decay per head, for JAX."""
