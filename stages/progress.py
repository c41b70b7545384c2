"""How a stage reports what it does; the command line shows it, a library user may ignore it."""

from typing import Protocol

Figure = str | int | float
"""What is shown beside the progress."""


class Progress(Protocol):
    """Receives what a long piece of work says of itself."""

    def say(self, text: str) -> None:
        """Take one line for the user."""

    def start(self, what: str, total: int | None, unit: str, done: int = 0) -> None:
        """Begin a piece of work of `total` units, `done` of which were finished before."""

    def advance(self, amount: int, **figures: Figure) -> None:
        """Note that `amount` more units are finished; figures are shown beside the bar."""

    def finish(self) -> None:
        """End the piece of work."""


def readable_seconds(seconds: float) -> str:
    """Return a duration as people write it."""
    for unit, size, digits in (("days", 86400, 1), ("h", 3600, 1), ("min", 60, 0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.{digits}f} {unit}"
    return f"{seconds:.0f} s"


def readable_bytes(count: float) -> str:
    """Return a number of bytes as people write it."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.1f} {unit}" if unit != "B" else f"{count:.0f} B"
        count /= 1024
    return f"{count:.1f} TiB"


class Silent:
    """Shows nothing."""

    def say(self, text: str) -> None:
        """Drop the line."""

    def start(self, what: str, total: int | None, unit: str, done: int = 0) -> None:
        """Show nothing."""

    def advance(self, amount: int, **figures: Figure) -> None:
        """Show nothing."""

    def finish(self) -> None:
        """Show nothing."""
