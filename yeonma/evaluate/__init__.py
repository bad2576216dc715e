"""Comparing models: answers, metrics, significance, the report."""
