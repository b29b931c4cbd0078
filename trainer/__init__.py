"""The run: one configuration tree, the training loop, checkpoints, resume, evaluation and metrics."""
