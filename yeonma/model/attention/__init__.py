"""Attention over a forest: one dispatch, several backends."""
