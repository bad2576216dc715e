"""Checks of a run's folder: files unchanged, parts that belong together."""
