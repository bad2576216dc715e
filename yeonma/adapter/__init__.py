"""The adapter folder: reading, writing, sample rows, and the prompts it is asked with."""
