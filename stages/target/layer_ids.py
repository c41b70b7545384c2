"""Which decoder layers of the target a draft reads: the default ones, and what chosen ones must be."""

from collections.abc import Sequence

from dflash_offline.schemas.draft.config_rules import spread_layers
from dflash_offline.schemas.errors import DflashError, UnsupportedTargetError


def default_layer_ids(num_target_layers: int, num_layers: int | None) -> tuple[int, ...]:
    """Return `num_layers` layer ids spread over the target, or as many as fit up to five if None."""

    def usable(n: int) -> bool:
        ids = spread_layers(num_target_layers, n)
        return ids == sorted(set(ids)) and ids[-1] <= num_target_layers - 2

    largest = max((n for n in range(1, num_target_layers) if usable(n)), default=0)
    if largest == 0:
        raise UnsupportedTargetError(
            f"The target has {num_target_layers} layers; a draft needs one that is not the last. Use a larger target."
        )
    n = min(5, largest) if num_layers is None else num_layers
    if n < 1 or not usable(n):
        some = ",".join(map(str, range(max(1, min(n, num_target_layers - 1)))))
        raise DflashError(
            f"{n} layers cannot be spread over a target of {num_target_layers} layers without repeating one. "
            f"The largest usable number is {largest}; or name them, as in --layers {some}."
        )
    return tuple(spread_layers(num_target_layers, n))


def check_layer_ids(ids: Sequence[int], num_target_layers: int) -> tuple[int, ...]:
    """Return the ids if they are unique, ascending and captured before the final norm."""
    if not ids or list(ids) != sorted(set(ids)) or ids[0] < 0 or ids[-1] > num_target_layers - 2:
        raise DflashError(
            f"The layers {list(ids)} cannot be captured from a target of {num_target_layers} layers: expected unique "
            f"ascending ids from 0 to {num_target_layers - 2} (the last layer's output is never captured)."
        )
    return tuple(ids)
