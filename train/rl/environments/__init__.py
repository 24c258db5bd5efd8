"""Worlds in which a model acts with tools and is rewarded. `base` defines what one is."""
