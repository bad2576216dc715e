"""Attention over a forest: one function that transformers calls, several backends."""
