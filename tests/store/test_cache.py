"""Readers of a cache keep no more files open than the process may have."""

import resource
from pathlib import Path

import numpy as np
from feature_writer import create, fill_cache
from processes import FORKING

from dflash_offline.stages.store.cache import Cache

FILES = 64
"""That the reading process may have open; the caches together have as many shards."""


def read_all_with_few_files(caches: list[Path]) -> None:
    """Read each cache alone, then all in turn, and compare."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (FILES, FILES))
    readers = [Cache.open(cache) for cache in caches]
    alone = [[reader.codes(sample) for sample in range(len(reader.samples))] for reader in readers]
    for sample in range(len(alone[0])):
        for reader, codes in zip(readers, alone, strict=True):
            np.testing.assert_array_equal(reader.codes(sample), codes[sample])


def test_several_readers_share_the_files_that_a_process_may_have_open(tmp_path: Path) -> None:
    caches = [tmp_path / f"cache-{number}" for number in range(4)]
    for seed, cache in enumerate(caches):
        create(cache, num_shards=FILES // len(caches), shard_tokens=96, seed=seed)
        fill_cache(cache)
    process = FORKING.Process(target=read_all_with_few_files, args=(caches,))
    process.start()
    process.join()
    assert process.exitcode == 0
