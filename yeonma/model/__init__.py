"""The base model with its adapter: loading, forests through it, log-probabilities, generation, the adapter folder."""
