"""The two stages, `extract` and `train`, and the parts they are made of."""
