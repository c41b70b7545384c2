"""Errors a user can act on. Each says where, what was found, what was expected and what to do next."""

import shlex


class DflashError(ValueError):
    """A fault in the input or the settings: the command line prints the message and exits 1."""


class BadInputError(DflashError):
    """A conversation file, a prompt file or a row of one cannot be used."""


class UnsupportedTargetError(DflashError):
    """The target model cannot be drafted for by a DFlash draft as the clients serve it."""


class CacheError(DflashError):
    """A feature cache is incomplete, damaged, or not a cache."""


class MismatchError(DflashError):
    """Two things that must agree differ: a cache and a command, a draft and a cache, a run and its settings."""


class NoValidAnchorsError(DflashError):
    """No row has a supervised position with a whole block after it."""


def dflash_line(*arguments: object) -> str:
    """Return a command line that runs as it stands."""
    return shlex.join(["dflash", *map(str, arguments)])
