"""Servers that differ from training, each by one fault, and right ones: what `yeonma verify --served` must say of them.

`python -m tests.seeded` asks them all and prints the table of docs/serve-and-export.md.
"""
