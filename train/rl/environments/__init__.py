"""Places where a model acts with tools and is rewarded; `base` says what one is."""
