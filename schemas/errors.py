"""Errors a user can act on. Each says where, what was found, what was expected and what to do next."""

import shlex

_NO_MEMORY = ("DefaultCPUAllocator: can't allocate memory", "failed to map segment", "annot allocate memory")
"""In errors of torch's allocator, and of libraries that find no room as they are loaded; they have no class of their
own."""


class DflashError(ValueError):
    """A fault in the input or the settings: the command line prints the message and exits 1."""


class BadInputError(DflashError):
    """A conversation file, a prompt file or a row of one cannot be used."""


class UnsupportedTargetError(DflashError):
    """The target model cannot be drafted for by a DFlash draft as the clients serve it."""


class CacheError(DflashError):
    """A feature cache is incomplete, damaged, or not a cache."""


class StoreError(DflashError):
    """An object store refuses, or does not answer; what was asked of it is neither right nor wrong by that."""


class MismatchError(DflashError):
    """Two things that must agree differ: a cache and a command, a draft and a cache, a run and its settings."""


class NoValidAnchorsError(DflashError):
    """No row has a supervised position with a whole block after it."""


def dflash_line(*arguments: object) -> str:
    """Return a command line that runs as it stands."""
    return shlex.join(["dflash", *map(str, arguments)])


def missing_memory(error: BaseException) -> str:
    """Return what an error says of memory that this process could not have; nothing if it is another error."""
    if isinstance(error, MemoryError) or any(text in str(error) for text in _NO_MEMORY):
        return " ".join(str(error).split()) or "an array could not be made"
    return ""
