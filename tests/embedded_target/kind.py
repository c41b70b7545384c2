"""What every kind of conversation is made of."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Draft:
    """One drawn conversation: turns of (what the user says, the reference answer)."""

    content: tuple[object, ...]
    """What the first prompt says, whatever its wording: decides which split the conversation is in."""
    turns: tuple[tuple[str, str], ...]
    required: tuple[str, ...] = ()
    """What an answer of a free kind has to mention; empty where the reference is the only right answer."""


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of conversation: how one is drawn and what an answer has to look like."""

    draw: Callable[[random.Random], Draft]
    well_formed: Callable[[str], bool]
    """True when the answer has the form of its kind, be what it says right or wrong."""


def series(words: Sequence[str]) -> str:
    """Return "a", "a and b" or "a, b and c"."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def plural(number: int, unit: str) -> str:
    """Return "1 day" or "2 days"."""
    return f"{number} {unit}" if number == 1 else f"{number} {unit}s"
