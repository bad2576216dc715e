"""Prompts to answers: sampling, decoding over a forest."""
