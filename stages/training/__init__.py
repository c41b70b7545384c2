"""One training run: the order of data, the loader, the optimizer, checkpoints, ranks, metrics, validation."""
