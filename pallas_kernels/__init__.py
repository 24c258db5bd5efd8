"""Pallas and XLA kernels of M1; depends on jax alone."""
