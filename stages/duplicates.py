"""Which content was seen before, in some 25 bytes for each: a set of Python's own takes four times as much."""

_SIZE = 16
"""Bytes of a digest."""
_EMPTY = bytes(_SIZE)
_PARTS = 16
"""Tables that grow by themselves, so that only one at a time is held twice."""
_FULLEST = 0.75
_GROWTH = 1.25
_FIRST_SLOTS = 64


class Digests:
    """A set of 16-byte digests that are evenly spread, as hashes are."""

    def __init__(self) -> None:
        self._tables = [bytearray(_FIRST_SLOTS * _SIZE) for _ in range(_PARTS)]
        self._counts = [0] * _PARTS

    def add(self, digest: bytes) -> bool:
        """Add a digest; returns whether it is new."""
        part = digest[0] % _PARTS
        table = self._tables[part]
        slot = _slot(table, digest)
        if table[slot : slot + _SIZE] == digest:
            return False
        table[slot : slot + _SIZE] = digest
        self._counts[part] += 1
        if self._counts[part] > _FULLEST * len(table) / _SIZE:
            self._tables[part] = _grown(table)
        return True


def _slot(table: bytearray, digest: bytes) -> int:
    """Return where a digest stands in a table, or where it would."""
    slot = int.from_bytes(digest[8:]) % (len(table) // _SIZE) * _SIZE
    while table[slot : slot + _SIZE] not in (_EMPTY, digest):
        slot = (slot + _SIZE) % len(table)
    return slot


def _grown(table: bytearray) -> bytearray:
    larger = bytearray(int(len(table) // _SIZE * _GROWTH) * _SIZE)
    for begin in range(0, len(table), _SIZE):
        digest = bytes(table[begin : begin + _SIZE])
        if digest != _EMPTY:
            slot = _slot(larger, digest)
            larger[slot : slot + _SIZE] = digest
    return larger
