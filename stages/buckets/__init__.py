"""A cache in an object store: its requests, the folder that mirrors its small files, and how both are published."""
