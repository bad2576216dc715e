"""Yeonma: from a table of examples and a text template to a LoRA adapter, with proof of what it was trained on."""

__version__ = "0.1.0"
