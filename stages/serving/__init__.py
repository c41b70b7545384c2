"""A live server, measured: its counters, its answers as they arrive, and passes over all prompts."""
