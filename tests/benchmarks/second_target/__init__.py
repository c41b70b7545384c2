"""A target and a corpus of another make than the demo's, so that what is found on one does not hold there alone."""
