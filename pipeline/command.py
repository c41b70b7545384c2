"""What every command does around its work: a user's errors told in one message, and its exit code."""

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import typer

from dflash_offline.schemas.errors import DflashError

_OUTSIDE_FAULTS = {
    getattr(errno, name) for name in "ENOSPC EDQUOT EFBIG EACCES EPERM EROFS EIO ENAMETOOLONG ELOOP".split()
}
"""System errors that are nobody's bug: no room, no permission, a broken disk, an impossible name."""


@contextmanager
def reported(go_on: str = "") -> Iterator[None]:
    """Turn a user's errors into one message and exit 1, and Ctrl-C into exit 130; a bug keeps its traceback."""
    try:
        yield
    except DflashError as error:
        _fail(str(error), 1)
    except KeyboardInterrupt as error:
        said = f"{error} " if str(error) else "Stopped. "
        _fail(f"{said}{go_on}".rstrip(), 130)
    except OSError as error:
        if error.errno not in _OUTSIDE_FAULTS:
            raise
        place = f"{error.filename}: " if error.filename else ""
        _fail(f"{place}{error.strerror}. {go_on}".rstrip(), 1)


def _fail(message: str, code: int) -> NoReturn:
    if is_first_rank():
        print(f"dflash: {message}", file=sys.stderr)
    elif code != 130:  # all ranks stop at a signal; one of them says so
        print(f"dflash, rank {os.environ['RANK']}: {message}", file=sys.stderr)
    raise typer.Exit(code)


def is_first_rank() -> bool:
    """Say whether this process is the one that speaks; without torchrun it is."""
    return os.environ.get("RANK", "0") == "0"
