"""Time `dflash inspect` on the plan of a large cache: a million samples in 20,000 shards, features absent.

`python tests/benchmarks/bench_inspect.py`, or `make bench-inspect`: makes a plan of about 250 million tokens and
records whose shard files are holes of the recorded sizes, and prints time and peak memory of the command in a process
of its own with no record there, with half of them, with all, and with all but no shard file. Exit 1 if one is over 5 s
or 1 GB, or says wrong numbers.
"""

import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dflash_offline.pipeline.demo import TARGET as EMBEDDED
from dflash_offline.schemas.commits import Commit, LayerStatistics, ShardFileRecord, commit_path
from dflash_offline.schemas.manifest import CAPTURE_RULE, COMMITS, FEATURES, REJECTS, SAMPLES, TARGET, Layout, Manifest
from dflash_offline.schemas.samples import Reject, RejectWriter, write_samples
from dflash_offline.stages.store.create import create_arrays, publish_cache

NUM_SAMPLES, NUM_SHARDS = 1_000_000, 20_000
MOST_SECONDS, MOST_BYTES = 5.0, 1_000_000_000
LAYER_IDS = [1, 9, 17, 25, 33]
WIDTH, CHUNK, VOCABULARY = 4096, 128, 151_936
MASK_TOKEN = 151_000
"""Within the range of the tokens that the plan holds, so that they have to be looked through."""


def make_plan(cache: Path) -> Manifest:
    """Publish a cache of which nothing is extracted."""
    rng = np.random.default_rng(0)
    num_tokens = np.minimum(20 + rng.gamma(1.3, 180, NUM_SAMPLES).astype(np.int64), 4096)
    slots = -(-num_tokens // CHUNK) * CHUNK
    shard = np.arange(NUM_SAMPLES, dtype=np.int64) * NUM_SHARDS // NUM_SAMPLES
    firsts = np.searchsorted(shard, np.arange(NUM_SHARDS))
    shard_tokens = int(np.add.reduceat(slots, firsts).max())
    before = np.cumsum(slots) - slots
    words = np.minimum(rng.zipf(1.2, 1 << 22), VOCABULARY - 1).astype(np.uint32)
    words[words == MASK_TOKEN] = 0
    layout = Layout(
        num_shards=NUM_SHARDS,
        shard_tokens=shard_tokens,
        chunk_tokens=CHUNK,
        num_layers=len(LAYER_IDS),
        hidden_size=WIDTH,
    )

    def read(begin: int, end: int) -> tuple[NDArray[np.uint32], NDArray[np.bool_]]:
        places = np.arange(begin, end)
        return words[(places * 31) & (len(words) - 1)], (places >> 6) % 3 > 0

    building = cache.with_name("building")
    (building / TARGET).mkdir(parents=True)
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(EMBEDDED / name, building / TARGET)
    write_samples(
        building / SAMPLES,
        sources=[f"part-{i:03d}.jsonl" for i in range(100)],
        source_index=(np.arange(NUM_SAMPLES) // 10_000).astype(np.int32),
        numbers={
            "row": np.arange(NUM_SAMPLES) % 10_000 + 1,
            "answer": np.zeros(NUM_SAMPLES, np.int64),
            "num_tokens": num_tokens,
            "num_supervised": num_tokens // 2 + 1,
            "num_anchors": np.maximum(num_tokens // 2 - 15, 1),
            "shard": shard,
            "start": shard * shard_tokens + before - before[firsts][shard],
        },
        read=read,
    )
    reasons = ("duplicate", "no supervised token")
    rejects = [Reject(source="part-000.jsonl", row=i, reason=reasons[i % 2], detail="x") for i in range(50_000)]
    with RejectWriter(building / REJECTS) as writer:
        for reject in rejects:
            writer.add(reject)
    create_arrays(building / FEATURES, layout, LAYER_IDS)
    publish_cache(
        building,
        cache,
        identity={
            "layer_ids": LAYER_IDS,
            "capture": CAPTURE_RULE,
            "mask_rule": "assistant",
            "target": {"dtype": "bfloat16", "attn_implementation": "sdpa", "end_ids": [2]},
        },
        origin={"target": "made for the benchmark", "software": {}},
        decoder={
            **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size"), 64),
            "hidden_size": layout.hidden_size,
            "vocab_size": VOCABULARY,
            "num_hidden_layers": 36,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1e6,
            "max_position_embeddings": 40_960,
        },
        layout=layout,
        plan={
            "samples": NUM_SAMPLES,
            "tokens": int(num_tokens.sum()),
            "supervised": int((num_tokens // 2 + 1).sum()),
            "anchors": int(np.maximum(num_tokens // 2 - 15, 1).sum()),
            "mask_token_id": MASK_TOKEN,
            "block_size": 16,
            "truncated": 0,
            "rejects": dict.fromkeys(reasons, 25_000),
        },
    )
    return Manifest.read(cache)


def write_records(cache: Path, manifest: Manifest, shards: range) -> None:
    """Write records of finished shards, and holes where their files would be."""
    rng = np.random.default_rng(shards.start)
    for shard in shards:
        size = int(rng.integers(300e6, 400e6))
        names = (f"hidden_states/c/{shard}/0/0", f"input_ids/c/{shard}", f"loss_mask/c/{shard}")
        files = {}
        for name, length in zip(names, (size, 20_000, 900), strict=True):
            path = cache / FEATURES / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as file:
                file.truncate(length)
            crc = int(rng.integers(1 << 32))
            files[f"{FEATURES}/{name}"] = ShardFileRecord(
                size=length, sha256=rng.bytes(32).hex(), index_crc32c=crc, first_chunk_crc32c=crc ^ 1
            )
        layers = [
            LayerStatistics(layer_id=i, mean=float(rng.normal()), std=1 + i / 9, max_abs=900.0 + shard % 7, zeros=0.0)
            for i in LAYER_IDS
        ]
        commit = Commit(
            shard=shard,
            manifest=manifest.checksum,
            num_samples=NUM_SAMPLES // NUM_SHARDS,
            num_tokens=12_800,
            skipped=[],
            files=files,
            layers=layers,
            worker=f"node{shard % 8}:4242",
            started="2026-01-01T00:00:00.000+00:00",
            finished="2026-01-01T00:00:09.500+00:00",
        )
        (cache / COMMITS / commit_path(cache, shard).name).write_bytes(commit.to_bytes())


def measured(cache: Path, *flags: str) -> tuple[float, int, str]:
    """Return seconds, peak bytes and output of the command in a process of its own, the peak of the largest so far."""
    command = [sys.executable, "-m", "dflash_offline.pipeline.app", "inspect", str(cache), *flags]
    began = time.perf_counter()
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    seconds = time.perf_counter() - began
    return seconds, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024, output


def main() -> int:
    """Print the table; returns the exit code."""
    within = True
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder) / "cache"
        manifest = make_plan(cache)
        measured(cache)  # the files' first reading is the disk's
        print(f"{NUM_SAMPLES:,} samples, {NUM_SHARDS:,} shards; at most {MOST_SECONDS:g} s, {MOST_BYTES / 1e6:.0f} MB")
        done = 0
        for upto in (0, NUM_SHARDS // 2, NUM_SHARDS):
            write_records(cache, manifest, range(done, upto))
            done = upto
            for flags in ((), ("--json",)):
                seconds, peak, output = measured(cache, *flags)
                within &= seconds < MOST_SECONDS and peak < MOST_BYTES
                print(
                    f"{done:>6} done {' '.join(flags) or 'tables':<7} {seconds:5.2f} s  {peak / 1e6:5.0f} MB",
                    flush=True,
                )
                if flags:
                    found = json.loads(output)
                    within &= (found["samples"], found["shards_done"]) == (NUM_SAMPLES, done) and not found["marks"]
        for array in ("hidden_states", "input_ids", "loss_mask"):
            shutil.rmtree(cache / FEATURES / array / "c")
        seconds, peak, output = measured(cache, "--json")
        within &= seconds < MOST_SECONDS and peak < MOST_BYTES and len(json.loads(output)["damaged_records"]) == done
        print(f"{done:>6} without their files {seconds:5.2f} s  {peak / 1e6:5.0f} MB")
        for flags in (("--shard", "12345"), ("--top", "longest")):
            seconds, peak, _ = measured(cache, *flags)
            print(f"{done:>6} done {' '.join(flags):<14} {seconds:5.2f} s  {peak / 1e6:5.0f} MB")
    print("within bounds" if within else "OUT OF BOUNDS")
    return 0 if within else 1


if __name__ == "__main__":
    sys.exit(main())
