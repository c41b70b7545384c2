"""Where a plan's samples go: their order, their shards and their first slots."""

import numpy as np
from numpy.typing import NDArray

WINDOW = 64
"""Shards within which samples are ordered by length, so that those of a shard, which are run together, are alike."""


def shard_slots(num_tokens: NDArray[np.int32], chunk: int, wanted: int) -> int:
    """Return the slots of a shard, whole chunks: about as many as wanted, at least the longest sample, at most all."""
    longest = -(-int(num_tokens.max()) // chunk) * chunk
    return int(min(max(wanted // chunk * chunk, longest), _ends(num_tokens, chunk)[-1]))


def ordered(num_tokens: NDArray[np.int32], chunk: int, shard_tokens: int | None) -> NDArray[np.int64]:
    """Return the samples by length within windows of 64 shards; as they come if the slots of a shard are not given.

    The first window begins with its longest sample, every other one with its shortest, so that the samples of a shard
    that two windows share are alike, too.
    """
    if shard_tokens is None:
        return np.arange(len(num_tokens))
    window = (_ends(num_tokens, chunk) - 1) // (WINDOW * shard_tokens)
    return np.lexsort((np.where(window % 2, num_tokens, -num_tokens), window))


def places(num_tokens: NDArray[np.int32], chunk: int, shard_tokens: int) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Return each sample's shard and first slot: as many samples as fit, in order, each on a chunk of its own."""
    ends = _ends(num_tokens, chunk)
    shard, start = np.zeros(len(ends), np.int32), np.zeros(len(ends), np.int64)
    first = used = current = 0
    while first < len(ends):
        end = int(np.searchsorted(ends, used + shard_tokens, "right"))
        shard[first:end] = current
        start[first + 1 : end] = ends[first : end - 1] - used
        start[first:end] += current * shard_tokens
        first, used, current = end, int(ends[end - 1]), current + 1
    return shard, start


def _ends(num_tokens: NDArray[np.int32], chunk: int) -> NDArray[np.int64]:
    """Return where each sample's slots end if samples are laid end to end, each on a chunk of its own."""
    return np.cumsum(-(-num_tokens // chunk) * chunk, dtype=np.int64)
