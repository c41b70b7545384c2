"""A feature cache on disk: created, written, read, verified and cleaned up. Needs no torch."""
