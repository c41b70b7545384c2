"""Where the program begins. Its commands take a while to load, and a signal in that time ends it in a word."""

import os
import resource
import signal
import sys
from collections.abc import Callable

_LEAST_STACK_KIB = 256
"""Below this, libraries may end the process without a word; below 72 Python itself does, before this is reached."""


def main() -> None:
    """Run the command line."""
    _handle_stops(_end)
    _refuse_small_stack()
    from dflash_offline.pipeline.app import main

    try:
        main()
    finally:
        _handle_stops(_leave)


def _refuse_small_stack() -> None:
    stack, _ = resource.getrlimit(resource.RLIMIT_STACK)
    if stack != resource.RLIM_INFINITY and stack < _LEAST_STACK_KIB << 10:
        sys.exit(
            f"dflash: This process may use a stack of {stack >> 10} KiB, and needs {_LEAST_STACK_KIB}. Let it have "
            f"more: `ulimit -s 8192`."
        )


def _handle_stops(handler: Callable[[int, object], None]) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)


def _end(number: int, frame: object) -> None:
    """End at once: nothing was begun, and what is half loaded could answer an exception in any way."""
    try:
        os.write(2, b"dflash: Stopped.\n")
    finally:
        _leave(number, frame)


def _leave(number: int, _frame: object) -> None:
    """End at once where nothing is left to say."""
    os._exit(128 + number)


if __name__ == "__main__":
    main()
