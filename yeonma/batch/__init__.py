"""Examples to batches: the plan of steps, forests, micro-batches."""
