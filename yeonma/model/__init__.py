"""The base model with its adapter: loading, attention over forests, log-probabilities, generation, the adapter folder."""
