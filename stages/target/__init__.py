"""The frozen target: its files, its loading, and the token that it never uses."""
