"""The trainer: a run is a fold of `train_step` over batches."""
