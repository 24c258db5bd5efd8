"""Pallas and XLA kernels of MiniMax-M1. They import jax and nothing else of this repository."""
