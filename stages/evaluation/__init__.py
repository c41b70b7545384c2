"""Measuring a draft: the samples it did not train on, and what else several measurements share."""
