"""Training: the loss, the optimiser, the loop, its checkpoints and its working directory."""
