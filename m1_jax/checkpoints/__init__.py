"""Models on disk: the release, the converted directory, and the map from one to the other."""
