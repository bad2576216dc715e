"""Whether a run's folder is whole and its parts belong together."""
