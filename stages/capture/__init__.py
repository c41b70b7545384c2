"""Filling a cache: its inputs and creation, the target's forwards over its samples, their encoding, the workers."""
