"""How many Python values Arrow values would become, counted before they do: few bytes can stand for gigabytes."""

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import types

_CHARACTERS = 64
"""Characters of a text that weigh as much as one more value."""


def num_values(batch: pa.RecordBatch) -> int:
    """Return the number of values of all rows, texts counted by their length."""
    return sum(_count(column) for column in batch.columns)


def _count(array: Any) -> int:
    kind = array.type
    if isinstance(kind, pa.BaseExtensionType):
        return _count(array.storage)
    if types.is_struct(kind):
        return len(array) + sum(_count(child) for child in array.flatten())
    if types.is_map(kind):
        begin, end = array.offsets[0].as_py(), array.offsets[-1].as_py()
        return len(array) + sum(_count(child.slice(begin, end - begin)) for child in (array.keys, array.items))
    if types.is_nested(kind) and not types.is_union(kind):
        return len(array) + _count(array.flatten())
    if types.is_dictionary(kind):
        return len(array) + _taken(array)
    return len(array) + _num_characters(array) // _CHARACTERS


def _taken(array: pa.DictionaryArray) -> int:
    """Return the values that entries of a dictionary stand for, each as often as it is taken."""
    uses = pc.value_counts(array.indices.drop_null())
    entries = zip(uses.field("values").to_pylist(), uses.field("counts").to_pylist(), strict=True)
    return sum(_count(array.dictionary.slice(index, 1)) * count for index, count in entries)


def _num_characters(array: Any) -> int:
    kind = array.type
    if kind in (pa.string_view(), pa.binary_view()):
        views = np.frombuffer(array.buffers()[1], np.int32).reshape(-1, 4)  # a length, and where the text is
        return int(views[array.offset : array.offset + len(array), 0].sum(dtype=np.int64))
    if types.is_string(kind) or types.is_large_string(kind) or types.is_binary(kind) or types.is_large_binary(kind):
        return pc.sum(pc.binary_length(array)).as_py() or 0
    return 0
