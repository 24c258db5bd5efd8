"""What the device does next, in plain Python without JAX."""
