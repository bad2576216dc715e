"""Seeing a run before it costs anything."""
