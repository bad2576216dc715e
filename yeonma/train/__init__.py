"""Examples -> an adapter: objectives, the training step, checkpoints, and the record of the run."""
