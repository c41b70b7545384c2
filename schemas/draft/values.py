"""Values of a draft's config.json: what they are, where they stand, and how messages name them."""

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any, TypeGuard

Found = Iterator[tuple[str, str, str]]
"""Rule, place, what."""


def is_int(value: object, least: int | None = None) -> TypeGuard[int]:
    """Say whether a value is a whole number, of at least `least`."""
    return isinstance(value, int) and not isinstance(value, bool) and (least is None or value >= least)


def is_number(value: object) -> TypeGuard[float]:
    """Say whether a value is a finite number."""
    return is_int(value) or (isinstance(value, float) and math.isfinite(value))


def section(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return an object within a config; empty if there is none."""
    value = config.get(name)
    return value if isinstance(value, dict) else {}


def say(value: object) -> str:
    """Return a value as messages name it."""
    return "absent" if value is None else json.dumps(value)


def first(config: Mapping[str, Any], name: str) -> Any:
    """Return a field as most clients read it: from `dflash_config`, else from the top."""
    nested = section(config, "dflash_config")
    return nested[name] if name in nested else config.get(name)
