"""The bytes of an object of a bucket, by ranges, as a shard file is read."""

import numpy as np
from numpy.typing import NDArray

from dflash_offline.schemas.errors import CacheError
from dflash_offline.stages.buckets.bucket import Bucket


class Fetched:
    """Bytes of an object that were fetched, from the place `begin` in it; safe in threads."""

    def __init__(self, begin: int, content: memoryview, size: int) -> None:
        self._begin, self._content, self._size = begin, content, size

    def size(self) -> int:
        """Return the object's bytes."""
        return self._size

    def read(self, begin: int, end: int) -> bytes:
        """Return the bytes from `begin` to `end`, which were fetched."""
        return bytes(self._content[begin - self._begin : end - self._begin])

    def fill(self, out: memoryview, begin: int) -> int:
        """Fill `out` with the bytes from `begin`; returns how many there were."""
        found = self._content[begin - self._begin :][: len(out)]
        out[: len(found)] = found
        return len(found)

    def ahead(self, _places: NDArray[np.uint64]) -> "Fetched":
        """Return itself."""
        return self


class ObjectRanges:
    """One object by ranges; safe in threads. A sample's chunks lie together, so that they are one request."""

    def __init__(self, bucket: Bucket, name: str) -> None:
        """`CacheError` if there is no such object."""
        self._bucket, self._name = bucket, name
        size = bucket.size(name)
        if size is None:
            raise CacheError(
                f"{bucket.url}/{name} is missing. Run `dflash verify --repair` on this cache, then repeat the "
                f"`dflash extract` that made it."
            )
        self._size = size

    def size(self) -> int:
        """Return the object's bytes."""
        return self._size

    def read(self, begin: int, end: int) -> bytes:
        """Return the bytes from `begin` to `end`, by one request."""
        return bytes(self._bucket.read_range(self._name, begin, end)) if begin < end else b""

    def fill(self, out: memoryview, begin: int) -> int:
        """Fill `out` with the bytes from `begin`; returns how many there were."""
        content = self.read(begin, min(begin + len(out), self._size))
        out[: len(content)] = content
        return len(content)

    def ahead(self, places: NDArray[np.uint64]) -> Fetched:
        """Return the chunks at these places, (offset, size) each, and what lies between them, by one request."""
        begins, sizes = places.reshape(-1, 2).T
        begin, end = int(begins.min()), int((begins + sizes).max())
        return Fetched(begin, memoryview(self._bucket.read_range(self._name, begin, end)), self._size)
