"""Merging, conversion to GGUF, Ollama, and upload to the hub."""
