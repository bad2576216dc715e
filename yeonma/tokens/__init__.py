"""Text to tokens: examples, their limits, and the tokenised data on disk."""
