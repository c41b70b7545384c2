"""The draft model: what its blocks see, what they are trained by, and how a prompt is decoded with it."""
