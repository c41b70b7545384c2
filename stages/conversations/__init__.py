"""Rows of the user's data, read, rendered, tokenized and masked: from files to the plan of samples."""
