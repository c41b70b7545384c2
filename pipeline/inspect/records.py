"""A cache opened by its small files: manifest, the plan's numbers, commit records; features a sample at a time.

`CacheReader` is what training reads with; this one needs neither the plan's tokens nor, for a sample, all records.
Axes: T tokens, L captured layers, H hidden size.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dflash_offline.schemas.commits import Commit, read_commits
from dflash_offline.schemas.errors import CacheError
from dflash_offline.schemas.manifest import SAMPLES, Manifest
from dflash_offline.schemas.samples import SampleTable


@dataclass(frozen=True, kw_only=True)
class Records:
    """What a cache's small files say."""

    cache: Path
    manifest: Manifest
    samples: SampleTable
    commits: dict[int, Commit]
    faults: list[str]
    """A line for each record that is damaged or lacks its files."""

    @classmethod
    def read(cls, cache: Path) -> "Records":
        """Return them; `CacheError` if the folder is no cache or lacks a static file."""
        manifest = read_manifest(cache)
        samples = SampleTable.read(cache / SAMPLES)
        commits, faults = read_commits(cache, manifest.layout.num_shards, manifest.checksum)
        return cls(cache=cache, manifest=manifest, samples=samples, commits=commits, faults=faults)

    def usable(self) -> NDArray[np.int64]:
        """Return the samples that have features, in order."""
        finished = np.isin(self.samples.shard, list(self.commits))
        finished[[one.sample for commit in self.commits.values() for one in commit.skipped]] = False
        return np.flatnonzero(finished)

    def features(self, sample: int) -> NDArray[np.float32]:
        """Return a sample's features [T, L, H], checksums checked; `CacheError` if it has none."""
        shard = int(self.samples.shard[sample])
        commit = self.commits.get(shard)
        if commit is None:
            raise CacheError(f"Shard {shard} of {self.cache} is not extracted. Repeat the `dflash extract`.")
        return read_features(self.cache, self.manifest, self.samples, commit, sample)


def read_manifest(cache: Path) -> Manifest:
    """Return a cache's manifest, its static files compared by size: hashing a large target's takes seconds."""
    manifest = Manifest.read(cache)
    manifest.check_static_files(cache, hashed=False)
    return manifest


def read_features(
    cache: Path, manifest: Manifest, samples: SampleTable, commit: Commit, sample: int
) -> NDArray[np.float32]:
    """Return the features [T, L, H] of a sample of a finished shard."""
    from dflash_offline.stages.store.cache import open_codec  # zarr takes a third of a second, and few views need it
    from dflash_offline.stages.store.shard_file import open_shard

    layout = manifest.layout
    file = open_shard(cache, manifest, commit)
    columns = list(range(layout.num_layers))
    codes = np.empty((int(samples.num_tokens[sample]), layout.num_layers, layout.hidden_size), np.uint16)
    file.read(int(samples.start[sample]) - commit.shard * layout.shard_tokens, columns, codes)
    return open_codec(cache, manifest).values(codes, columns)
