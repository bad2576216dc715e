"""Faster forward and backward passes of single layers, each proven equal to the model's own."""
