"""What a run leaves on disk: the output folder, checkpoints, the lock, logs, trackers. No training here."""
