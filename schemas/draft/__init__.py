"""A draft folder: its config.json, its weights, the formats it is exported in, and the clients' rules."""
