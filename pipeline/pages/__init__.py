"""The pages that `--html` writes, and their templates."""
