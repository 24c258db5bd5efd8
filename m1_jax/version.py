"""The version of this package. No other file holds it: pyproject.toml reads it here."""

VERSION = "0.1.0"
