"""Batches of the plan through the target, to the codes of a shard; by one process or several workers."""
