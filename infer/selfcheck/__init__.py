"""m1-selfcheck: what works on the device at hand, in numbers, in at most ten minutes."""
