"""Models on disk: the release, the converted directory, and what maps one to the other."""
