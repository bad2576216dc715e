"""The adapter folder: reading, writing, sample rows, and prompts."""
