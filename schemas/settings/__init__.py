"""What a user may set, for each command; each setting and its default stand here alone."""
