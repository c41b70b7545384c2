"""Reading a cache of a bucket for training, and opening one of many shards, from a server that is far away.

Run by `make bench-buckets`. The server is `large/range_server.py`: 200 MB a second for all requests together, and 30 ms
for each. The first part makes a cache of noise, and drains the loader of a run from the folder, from the bucket with a
local copy that is filled, and from the bucket alone, in turn within one run. The second makes the plan and the records
of a cache of `--shards`, its features absent, and times what a reader does before the first feature: from the folder,
and from the bucket with bundles of records; up to 20,000 shards also from the bucket with records alone.
"""

import argparse
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path
from subprocess import PIPE

import numpy as np
import torch
import zstandard
from large.range_server import DELAY_S, RATE, serving
from obstore.store import LocalStore
from sides import interleaved, machine, median_ratio, spread

from dflash_offline.schemas.commits import Commit, LayerStatistics, ShardFileRecord
from dflash_offline.schemas.draft.anchor_rule import AnchorRule
from dflash_offline.schemas.files import sha256_bytes
from dflash_offline.schemas.manifest import HIDDEN, Manifest, feature_file, shard_files
from dflash_offline.stages.buckets.bucket import Bucket
from dflash_offline.stages.buckets.bundles import write_bundles
from dflash_offline.stages.progress import readable_bytes
from dflash_offline.stages.store.cache import Cache
from dflash_offline.stages.training.corpus import Corpus
from dflash_offline.stages.training.loader import BatchLoader
from dflash_offline.stages.training.schedule import Rows

sys.path.insert(0, str(Path(__file__).parent.parent))

URL = "s3://bucket/cache"
BATCH_TOKENS = 1024


def main() -> None:
    """Print both parts' figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batches", type=int, default=24, help="of a turn")
    parser.add_argument("--mb-per-s", type=float, default=RATE / 1e6, help="of the server")
    parser.add_argument("--shards", type=int, default=200_000)
    parser.add_argument("--only", choices=("reading", "opening"))
    parser.add_argument("--folder", type=Path, help="for the files, in place of a temporary folder")
    arguments = parser.parse_args()
    print(f"{machine()}; {arguments.mb_per_s:.0f} MB/s, {DELAY_S * 1e3:.0f} ms a request")
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        if arguments.only != "opening":
            reading(Path(folder) / "reading", arguments.rounds, arguments.batches, 1e6 * arguments.mb_per_s)
        if arguments.only != "reading":
            opening(Path(folder) / "opening", arguments.shards)


def make_cache(cache: Path) -> None:
    """Make a cache whose samples have the sizes of those of an 8B target: 8 MB of 3 layers of 4,096, compressed."""
    from feature_writer import create, fill_cache  # type: ignore[import-not-found]

    create(cache, num_shards=6, shard_tokens=2048, width=4096)
    fill_cache(cache)


def reading(folder: Path, rounds: int, num_batches: int, rate: float) -> None:
    """Drain the loader of two threads from each place in turn."""
    folder.mkdir()
    cache = folder / "bucket" / "cache"
    make_cache(cache)
    size = sum(commit.files[feature_file(HIDDEN, shard)].size for shard, commit in Cache(cache).commits.items())
    with serving(folder / "bucket", rate) as environment:
        os.environ |= environment
        corpora = {"disk": Corpus([Cache(cache)])}
        corpora |= {name: Corpus([Cache(Path(URL))]) for name in ("warm", "cold")}
        corpora["warm"].copy_locally(folder / "copy", 1 << 40, print)
        order = np.random.default_rng(0).permutation(len(corpora["disk"]))
        groups = np.array_split(order, max(1, int(corpora["disk"].num_tokens.sum()) // BATCH_TOKENS))

        def batches() -> Iterator[tuple[Rows, int]]:
            while True:
                yield from (([group], 0) for group in groups)

        fetched = dict.fromkeys(corpora, 0)
        streams = {}
        for name, corpus in corpora.items():
            loader = BatchLoader(
                corpus,
                layer_ids=corpus.caches[0].layer_ids,
                anchor_rule=AnchorRule(8),
                num_anchors=16,
                seed=0,
                shape=None,
                device=torch.device("cpu"),
            )
            streams[name] = (loader, batches)
        for batch in islice(streams["warm"][0].stream(islice(batches(), len(groups)), 2), len(groups)):
            del batch  # the local copy is filled

        def drain(name: str) -> None:
            loader, source = streams[name]
            with closing(loader.stream(islice(source(), num_batches), 2)) as stream:
                for batch in stream:
                    fetched[name] += batch.num_tokens

        seconds = interleaved({name: lambda name=name: drain(name) for name in corpora}, rounds)
        tokens = int(corpora["disk"].num_tokens.sum())
        turn_bytes = fetched["cold"] / (rounds + 1) * size / tokens
        print(f"reading: {readable_bytes(size)} of features; {readable_bytes(turn_bytes)} a turn")
        for name, values in seconds.items():
            print(f"  {name:<5} {spread(values)} s a turn")
        print(f"  warm / disk, rate: {median_ratio(seconds, 'warm', 'disk'):.3f} (floor 0.98)")
        shares = [turn_bytes / value / rate for value in seconds["cold"]]
        print(f"  cold, share of what the server gives: {statistics.median(shares):.3f} (floor 0.9)")
        bound = [
            max(turn_bytes / rate, disk) / cold for disk, cold in zip(seconds["disk"], seconds["cold"], strict=True)
        ]
        print(f"  cold, over the slower of server and disk: {statistics.median(bound):.3f}")
        print(f"  private copy: {sum(1 for _ in (folder / 'copy').rglob('*-*'))} files")


OPEN = """
import json, resource, sys, time
from pathlib import Path
from dflash_offline.stages.store.cache import Cache
marks = [time.perf_counter()]
cache = Cache.open(Path(sys.argv[1]))
marks.append(time.perf_counter())
cache.require_complete()
marks.append(time.perf_counter())
assert len(cache.usable()) == len(cache.samples)
marks.append(time.perf_counter())
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps([b - a for a, b in zip(marks, marks[1:])] + [time.process_time(), peak]))
"""


def opening(folder: Path, num_shards: int) -> None:
    """Open a cache of many shards in fresh processes."""
    import bench_inspect

    bench_inspect.NUM_SAMPLES = bench_inspect.NUM_SHARDS = num_shards
    folder.mkdir()
    cache = folder / "bucket" / "cache"
    cache.parent.mkdir()
    manifest = bench_inspect.make_plan(cache)
    num_bytes = write_records(cache, manifest, num_shards)
    print(f"opening: {num_shards:,} shards, records of {num_bytes / num_shards:,.0f} bytes", flush=True)

    def opened(what: str, address: str | Path) -> None:
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            program = [sys.executable, "-c", OPEN, str(address)]
            run = subprocess.run(program, env=os.environ | {"TMPDIR": temporary}, stdout=PIPE, check=True, text=True)
        static, commits, plan, cpu, peak = json.loads(run.stdout)
        phases = f"static files {static:6.1f} s, records {commits:6.1f} s, plan {plan:5.1f} s"
        print(f"  {what:<24} {phases}; {cpu:.1f} s of CPU, {readable_bytes(1024 * peak)}", flush=True)

    opened("folder", cache)
    if num_shards <= 20_000:
        with serving(folder / "bucket") as environment:
            os.environ |= environment
            opened("bucket, records alone", URL)
    began = time.perf_counter()
    names = write_bundles(Bucket("gs://of/files", LocalStore(cache)), manifest)  # lists of files are in no order
    sizes = [(cache / name).stat().st_size for name in names]
    print(
        f"  {len(names)} bundles of {statistics.mean(sizes):,.0f} bytes, written in {time.perf_counter() - began:.1f} s"
    )
    retagged(cache, names)
    with serving(folder / "bucket") as environment:
        os.environ |= environment
        for _ in range(2):
            opened("bucket, bundles", URL)


def write_records(cache: Path, manifest: Manifest, num_shards: int) -> int:
    """Write sound records of all shards, each of other numbers, and holes for their files; returns their bytes."""
    chance, told = random.Random(0), 999_983
    names = shard_files(told)
    model = Commit(
        shard=told,
        manifest=manifest.checksum,
        num_samples=50,
        num_tokens=12_800,
        skipped=[],
        files={
            name: ShardFileRecord(size=size, sha256=f"{size:064x}", index_crc32c=size + 1, first_chunk_crc32c=size + 2)
            for name, size in zip(names, (400_000_001, 20_000, 900), strict=True)
        },
        layers=[
            LayerStatistics(layer_id=layer, mean=0.5, std=1.25, max_abs=900.0, zeros=0.0)
            for layer in manifest.identity["layer_ids"]
        ],
        worker="node17:4242",
        started="2026-01-01T00:00:00.000+00:00",
        finished="2026-01-01T00:00:09.500+00:00",
    ).to_bytes()
    document = b"".join(line + b"\n" for line in model.splitlines() if b'"checksum"' not in line).decode()
    pieces = re.split(r"(999983|0\.5(?=,)|1\.25|[0-9a-f]{64}|(?<=crc32c\": )\d+)", document)
    made = {
        "999983": lambda shard: str(shard),
        "0.5": lambda _: repr(chance.gauss(0, 1)),
        "1.25": lambda _: repr(chance.uniform(1, 9)),
    }
    total = 0
    for shard in range(num_shards):
        parts = [
            piece
            if not number % 2 or piece == manifest.checksum
            else made[piece](shard)
            if piece in made
            else f"{chance.getrandbits(256):064x}"
            if len(piece) == 64
            else str(chance.getrandbits(32))
            for number, piece in enumerate(pieces)
        ]
        body = "".join(parts)
        checksum = sha256_bytes(body.encode().translate(None, b"\n "))
        content = f'{{\n "checksum": "{checksum}",\n' + body.removeprefix("{\n")
        (cache / "commits" / f"{shard:06d}.json").write_text(content)
        total += len(content)
        for name, size in zip(shard_files(shard), (400_000_001, 20_000, 900), strict=True):
            path = cache / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
            os.truncate(path, size)
    return total


def retagged(cache: Path, names: list[str]) -> None:
    """Let bundles that were written through the file system hold the entity tags that the server gives."""
    for name in names:
        copies = json.loads(zstandard.decompress((cache / name).read_bytes()[64:]))
        for shard, copy in copies.items():
            status = (cache / "commits" / f"{int(shard):06d}.json").stat()
            copy["e_tag"] = f'"{status.st_mtime_ns:x}-{status.st_size:x}"'
        packed = zstandard.compress(json.dumps(copies).encode())
        (cache / name).write_bytes(sha256_bytes(packed).encode() + packed)


if __name__ == "__main__":
    main()
