"""Which turns the data marks as context, that an answer is not to be learned from: by turn, or by a list beside them.

Datasets write it in many ways: `weight` 0, `train` false, `loss` false, `masked` true, a list of such beside the turns.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from dflash_offline.stages.conversations.reading.faults import RowFaultError, shown

LEARNED_KEYS = (
    "weight",
    "train",
    "training",
    "trainable",
    "is_trainable",
    "train_on_turn",
    "supervised",
    "loss",
    "loss_mask",
    "loss_weight",
    "loss_scale",
)
"""Keys of a turn that say by 1 or true that it is learned, by 0 or false that it is context."""
CONTEXT_KEYS = ("masked", "is_masked", "is_context", "ignore_loss")
"""Keys of a turn that say the opposite."""
UNCLEAR_KEYS = ("mask",)
"""Keys that some data means the one way, and some the other."""
PARTIAL_KEYS = ("train_detail", "training_detail")
"""Keys that mark parts of a turn."""
LISTED_KEYS = {"weights": "weight", "loss_masks": "loss_mask", "turn_weights": "weight", "turn_loss_mask": "loss_mask"}
"""More names of a list beside the turns, each with the key whose values it holds."""
ROW_KEYS = {*LEARNED_KEYS, *CONTEXT_KEYS, *UNCLEAR_KEYS, *LISTED_KEYS}
"""Keys of a row that may mark its turns, or all of it."""
_MARKS = {*LEARNED_KEYS, *CONTEXT_KEYS, *UNCLEAR_KEYS}
_MEASURED = ("loss",)
"""Keys that hold a measured number where they stand once for a row."""
_WORDS = {"true": True, "false": False, "1": True, "0": False}


def turn_mark(turn: Mapping[str, Any], place: str) -> bool | None:
    """Return whether a turn is to be learned, or None if it does not say; `RowFaultError` if that is unclear."""
    for key in PARTIAL_KEYS:
        if turn.get(key):
            raise RowFaultError(f"has {place}.{key}, which marks parts of a turn; expected a turn as a whole")
    said = {key: _is_learned(key, turn[key], f"{place}.") for key in turn if key in _MARKS and turn[key] is not None}
    if len({*said.values()}) > 1:
        raise RowFaultError(f"has {place} that is both learned and context by its {' and '.join(sorted(said))}")
    return next(iter(said.values()), None)


def row_marks(row: Mapping[str, Any], turns: Sequence[Any], key_of_turns: str) -> tuple[list[bool | None], bool]:
    """Return each turn's mark, by a list beside the turns or by itself, and whether the row has a share as its weight.

    Raises `RowFaultError` for marks that are unclear.
    """
    marks = [
        turn_mark(turn, f"{key_of_turns}[{i}]") if isinstance(turn, dict) else None for i, turn in enumerate(turns)
    ]
    has_share = False
    for key in sorted(ROW_KEYS & row.keys()):
        given, known = row[key], LISTED_KEYS.get(key, key)
        if isinstance(given, list):
            if len(given) != len(turns):
                raise RowFaultError(
                    f"has a list {key!r} of {len(given)} beside {len(turns)} {key_of_turns}; expected one for each turn"
                )
            listed = [None if one is None else _is_learned(known, one, "the row's ") for one in given]
        elif given is None or key in (*_MEASURED, *UNCLEAR_KEYS, *LISTED_KEYS):
            continue
        else:
            try:
                listed = [_is_learned(known, given, "the row's ")] * len(turns)
            except RowFaultError:
                has_share = has_share or isinstance(given, (int, float))
                continue
            if listed[0]:  # nothing of the turns
                continue
        marks = [_agreed(*both) for both in zip(marks, listed, strict=True)]
    return marks, has_share


def _agreed(own: bool | None, listed: bool | None) -> bool | None:
    if own is None or listed is None:
        return listed if own is None else own
    return own and listed


def _is_learned(key: str, value: Any, place: str) -> bool:
    if key in UNCLEAR_KEYS:
        raise RowFaultError(
            f"has {place}{key}, of which it cannot be told whether it marks what is learned or what is not; name it "
            f"'loss' (true: learned) or 'masked' (true: context)"
        )
    word = value.strip().lower() if isinstance(value, str) else value
    told = _WORDS.get(word) if isinstance(word, str) else bool(word) if _is_bit(word) else None
    if told is None:
        no, yes = ("learned", "context") if key in CONTEXT_KEYS else ("context", "learned")
        raise RowFaultError(
            f"has {place}{key} {shown(value)}; expected 0 or false ({no}), or 1 or true ({yes}): a turn is learned or "
            f"is not, and has no share"
        )
    return told != (key in CONTEXT_KEYS)


def _is_bit(value: Any) -> bool:
    return isinstance(value, (bool, int, float)) and value in (0, 1)
