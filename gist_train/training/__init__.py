"""Schedule, processes, checkpoints and the loop."""
