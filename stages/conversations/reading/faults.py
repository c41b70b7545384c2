"""What is wrong with a row, in words."""

import reprlib


class RowFaultError(ValueError):
    """What is wrong with a row, to be read after its place."""


_SHORT = reprlib.Repr()
_SHORT.maxstring, _SHORT.maxlist, _SHORT.maxdict = 60, 8, 4


def shown(value: object) -> str:
    """Return a value as an error shows it, however large or deep it is."""
    return _SHORT.repr(value)
