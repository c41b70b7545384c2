"""A setting is an option: what its field says of itself, to the command line, to a settings file and to a resume."""

import difflib
import math
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, fields
from functools import cache
from typing import Any, Literal, get_type_hints

from dflash_offline.schemas.errors import DflashError

ARGUMENTS = "Arguments"
"""The heading of what is named by its place on the command line instead of by a flag."""
Role = Literal["identity", "recorded", "resolved", "free"]
"""What a repeated command compares with what it began. identity: the setting's value, which decides what is made.
resolved: what the value stands for, such as the bytes of a file it names, or what `auto` comes to. recorded: likewise,
but the value stands in the record too. free: nothing; it decides where, how fast or how far the work goes, and a resume
may change it."""


@dataclass(frozen=True)
class Bounds:
    """The numbers that a setting may be."""

    expected: str
    """What a refusal says was expected."""
    holds: Callable[[Any], bool]
    """False for a number out of bounds, NaN included."""


AT_LEAST_0 = Bounds("at least 0", lambda value: value >= 0)
AT_LEAST_1 = Bounds("at least 1", lambda value: value >= 1)
AT_LEAST_2 = Bounds("at least 2", lambda value: value >= 2)
POSITIVE = Bounds("more than 0, and finite", lambda value: 0 < value < math.inf)
SEEDS = Bounds("0 or more, below 2**63", lambda value: 0 <= value < 2**63)


@dataclass(frozen=True)
class Option:
    """What a field of a config is to its user; it stands in the field's annotation, and the default beside it."""

    help: str
    """A sentence that says what the setting does, and reads without its name and unit."""
    group: str
    """Heading in the help; `ARGUMENTS` makes it an argument."""
    role: Role
    unit: str = ""
    """What its value is or counts, in capitals; a flag without a value has none."""
    _: KW_ONLY
    unset: str = ""
    """What holds where it is None, for the help."""
    choices: tuple[str, ...] = ()
    """All values it may have, which the shell completes."""
    completions: tuple[str, ...] = ()
    """Values that the shell completes, others being fine."""
    bounds: Bounds | None = None
    flags: tuple[str, ...] = ()
    """Its flags, where they are not its field's name alone."""
    bare: str = ""
    """What a flag means that stands alone, where it may: before another flag, or at the end."""
    instead_of: str = ""
    """A setting that means nothing beside it: a flag for either sets aside what a file says of the other."""


@cache
def options(config: type) -> dict[str, Option]:
    """Return the option of each field of a config, by the field's name."""
    hints, found = get_type_hints(config, include_extras=True), {}
    for field in fields(config):
        declared = [mark for mark in getattr(hints[field.name], "__metadata__", ()) if isinstance(mark, Option)]
        if len(declared) != 1:
            raise TypeError(f"{config.__name__}.{field.name} has {len(declared)} options in its annotation, not one")
        found[field.name] = declared[0]
    return found


def choice_problem(name: str, value: str | None, allowed: tuple[str, ...]) -> str | None:
    """Return what is wrong with a setting that takes one of a few names, with the nearest of them; None for nothing."""
    if value is None or value in allowed:
        return None
    near = difflib.get_close_matches(value, allowed, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    return f"{name} is {value!r}; expected {', '.join(allowed[:-1])} or {allowed[-1]}.{hint}"


def problems(config: Any) -> list[str]:
    """Return what is wrong with each field of a config by itself."""
    found = []
    for name, option in options(config.__class__).items():
        value = getattr(config, name)
        if value is not None and option.bounds and not option.bounds.holds(value):
            found.append(f"{name} is {value}; expected {option.bounds.expected}.")
        if option.choices and (problem := choice_problem(name, value, option.choices)):
            found.append(problem)
    return found


def refuse(command: str, problems: list[str]) -> None:
    """Raise `DflashError` with all that is wrong with a command's settings, if anything is."""
    if problems:
        raise DflashError(f"These settings of `dflash {command}` cannot be used:\n  " + "\n  ".join(problems))
