"""The bytes of an object of a bucket, by ranges, as a shard file is read."""

import os
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dflash_offline.schemas.errors import CacheError, StoreError
from dflash_offline.stages.buckets.bucket import Bucket
from dflash_offline.stages.buckets.local_copy import LocalCopy


class Fetched:
    """Bytes of an object that were fetched, from the place `begin` in it; safe in threads."""

    def __init__(self, begin: int, content: Any) -> None:
        self._begin, self._content = begin, memoryview(content)

    def fill(self, out: memoryview, begin: int) -> int:
        """Fill `out` with the bytes from `begin`; returns how many there were."""
        found = self._content[begin - self._begin :][: len(out)]
        out[: len(found)] = found
        return len(found)


class Kept:
    """Bytes of an object that a local copy says it has; safe in threads.

    They may be damaged, and the file may go at any time: then `forget` lets them be fetched when they are asked for
    again.
    """

    def __init__(self, copy: LocalCopy, place: str, begin: int, end: int) -> None:
        self._copy, self._place, self._begin, self._end = copy, place, begin, end
        self._path = copy.path(place, begin, end)

    def fill(self, out: memoryview, begin: int) -> int:
        """Fill `out` with the bytes from `begin`; returns how many there were. `OSError` if the file is gone."""
        file = os.open(self._path, os.O_RDONLY | os.O_NOFOLLOW)  # anew: thousands may be asked for ahead
        try:
            return os.preadv(file, [out], begin - self._begin)
        finally:
            os.close(file)

    def forget(self) -> None:
        """Remove the file."""
        self._copy.forget(self._place, self._begin, self._end)


class ObjectRanges:
    """One object by ranges; safe in threads. A sample's chunks lie together, so that they are one request."""

    def __init__(self, bucket: Bucket, name: str, copy: LocalCopy | None, place: str) -> None:
        """`place` is the object's in `copy`."""
        self._bucket, self._name = bucket, name
        self._copy, self._place = copy, place

    def end(self, size: int, length: int) -> tuple[int, bytes]:
        """Return the object's bytes and its last `length` ones, by one request if it has `size`; else no last ones.

        `CacheError` if there is no such object.
        """
        try:
            found = self._bucket.read_sized(self._name, max(size - length, 0), size)
        except StoreError:  # a store refuses a range behind the end
            actual = self._bucket.size(self._name)
            if actual == size:
                raise
            found = None if actual is None else (b"", actual)
        if found is None:
            raise CacheError(
                f"{self._bucket.url}/{self._name} is missing. Run `dflash verify --repair` on this cache, then repeat "
                f"the `dflash extract` that made it."
            )
        content, actual = found
        return actual, content if actual == size else b""

    def read(self, begin: int, end: int) -> bytes:
        """Return the bytes from `begin` to `end`, by one request."""
        return bytes(self._bucket.read_range(self._name, begin, end)) if begin < end else b""

    def ahead(self, places: NDArray[np.uint64]) -> Fetched | Kept:
        """Return the chunks at these places, (offset, size) each, and what lies between them.

        They are in the local copy, or are fetched by one request and then kept in it.
        """
        pairs: list[list[int]] = places.reshape(-1, 2).tolist()
        begin, end = min(pairs)[0], max(offset + size for offset, size in pairs)
        if self._copy is None:
            return Fetched(begin, self._bucket.read_range(self._name, begin, end))
        if self._copy.holds(self._place, begin, end):
            return Kept(self._copy, self._place, begin, end)
        content = self._bucket.read_range(self._name, begin, end)
        self._copy.keep(self._place, begin, memoryview(content))
        return Fetched(begin, content)
