"""A process that fills a cache of made-up features in a bucket, as on a machine of its own: `URL FOLDER WORKER`.

FOLDER is its folder for temporary files, so that workers share no lock. Every shard it makes differs in a bit from
those of workers of the other parity, as another kind of GPU rounds.
"""

import os
import random
import sys
import tempfile
from pathlib import Path

from feature_writer import features

from dflash_offline.stages.buckets.mirror import open_mirror
from dflash_offline.stages.store.cache import Cache
from dflash_offline.stages.store.writer import ShardWriter


def fill_bucket(url: str, folder: Path, number: int, endpoint: dict[str, str], *, differs: bool = False) -> None:
    """Write every shard that is left, in an order of this worker's own."""
    os.environ |= endpoint
    folder.mkdir(exist_ok=True)
    tempfile.tempdir = str(folder)
    mirror = open_mirror(url)
    assert mirror.pull()
    cache = Cache(mirror.folder)
    writer = ShardWriter(cache)
    order = list(range(cache.layout.num_shards))
    random.Random(number).shuffle(order)
    for shard in order:
        if cache.is_done(shard):
            continue
        with writer.claim(shard, wait=True) as ours:
            if ours:
                codes = features(cache.manifest, cache.samples, shard, cache.codec.fill)
                if differs and number % 2:
                    codes[cache.slots(int(cache.samples.samples_of_shard(shard)[0])).start, 0, 0] ^= 1
                writer.commit(shard, codes)


if __name__ == "__main__":
    fill_bucket(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), {})
