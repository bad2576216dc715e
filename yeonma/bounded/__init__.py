"""Others' templates, expressions and tokenizers, run in a process of their own with bounds of time and memory."""
