"""The variants that this program trains and reads, by the architecture that config.json names."""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from dflash_offline.schemas.variants.dflash import DFlash
from dflash_offline.schemas.variants.dflash2 import DFlash2
from dflash_offline.schemas.variants.dspark import DSpark
from dflash_offline.schemas.variants.variant import Variant

BASE: type[Variant] = DFlash
"""What a draft is that says nothing else."""
RECOMMENDED: type[Variant] = DFlash2
"""What drafts longest of what was measured, for what serves it; the demo trains it."""
VARIANTS: dict[str, type[Variant]] = {kind.architecture: kind for kind in (DFlash, DFlash2, DSpark)}
NAMES = {kind.name: kind for kind in VARIANTS.values()}
"""The same by the names that a user gives."""


def own_fields(kind: type[Variant]) -> list[str]:
    """Return the names of a variant's own fields."""
    assert is_dataclass(kind)
    return [field.name for field in fields(kind)]


def find_variant(config: Mapping[str, Any]) -> type[Variant] | None:
    """Return the variant of a config.json of any format, None if it is of none that is known.

    The speculators format has a name of its own for each; a config.json that names no architecture is the base's.
    """
    if "speculators_model_type" in config:
        known = {kind.speculators: kind for kind in VARIANTS.values() if kind.speculators}
        name = config["speculators_model_type"]
        return known.get(name) if isinstance(name, str) else None
    if config.get("model_type") == "muse_glimmer_assistant" or config.get("architectures") is None:
        return BASE
    named = config["architectures"]
    several = not isinstance(named, list) or len(named) != 1 or not isinstance(named[0], str)
    return None if several else VARIANTS.get(named[0])
