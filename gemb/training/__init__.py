"""Training: data sets to batches, the loop, the optimizers, the run folder."""
