"""What two documents that must agree differ in, and the one refusal of it."""

from pathlib import Path
from typing import Any, TypeAlias

from dflash_offline.schemas.errors import MismatchError

FieldDifference: TypeAlias = tuple[str, object, object]
"""A dotted field and its value on either side."""
ABSENT = "(absent)"
"""What a mismatch table says of a field that one side does not have."""


def flatten(document: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested dictionaries as one, with dotted names."""
    flat: dict[str, Any] = {}
    for key, value in document.items():
        if isinstance(value, dict) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def differences(have: dict[str, Any], want: dict[str, Any]) -> list[FieldDifference]:
    """Return (dotted field, value in `have`, value in `want`) wherever two documents differ."""
    left, right = flatten(have), flatten(want)
    names = [*left, *(name for name in right if name not in left)]
    return [
        (name, left.get(name, ABSENT), right.get(name, ABSENT))
        for name in names
        if left.get(name, ABSENT) != right.get(name, ABSENT)
    ]


def wherever_placed(target: dict[str, Any]) -> dict[str, Any]:
    """Return the identity of a target without its `device_map`: the same weights are one target on any devices."""
    return {name: value for name, value in target.items() if name != "device_map"}


def refuse_differences(what: str, differences: list[FieldDifference], sides: tuple[str, str], what_to_do: str) -> None:
    """Raise `MismatchError` if there are differences: what differs, a line for each field, and what to do next.

    `sides` names the two that were compared, in the order of each difference's values.
    """
    if not differences:
        return
    width = max(len(name) for name, _, _ in differences)
    lines = [f"  {name:<{width}}  {sides[0]}: {have}  {sides[1]}: {want}" for name, have, want in differences]
    if any(ABSENT in (have, want) for _, have, want in differences):
        lines.append(f"What is {ABSENT} was not set, was not there, or was not recorded by an older version.")
    raise MismatchError("\n".join([f"{what}:", *lines, what_to_do]))


def refuse_other_identity(
    made: Path,
    have: dict[str, Any],
    want: dict[str, Any],
    side: str = "cache",
    what_to_do: str = "Repeat the command that made it to go on with it, or name a new --out.",
) -> None:
    """Raise `MismatchError` if what is there was made from something else than is asked for."""
    refuse_differences(
        f"The settings and the input that are on record of {made} differ from this command's",
        differences(have, want),
        (side, "now"),
        what_to_do,
    )
