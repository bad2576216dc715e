"""Rows to text: readers, columns, templates, turns, preference pairs. No torch here."""
