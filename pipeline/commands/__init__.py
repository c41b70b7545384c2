"""One module a command: it converts its arguments, calls one function and prints what that made."""
