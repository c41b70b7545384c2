"""Engines that run the target beside transformers: what is installed, how they start, and what proves their states."""
