"""A cache of made-up features, and a process that fills it: everything of an extraction but the target.

Needs no torch, so that it starts quickly: `python tests/feature_writer.py CACHE WORKER`.
"""

import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dflash_offline.schemas.locks import building_folder
from dflash_offline.schemas.manifest import CAPTURE_RULE, FEATURES, REJECTS, SAMPLES, FeatureLayout, Layout, Manifest
from dflash_offline.schemas.samples import RejectWriter, SampleTable, write_samples
from dflash_offline.stages.store.cache import Cache
from dflash_offline.stages.store.create import create_arrays, publish_cache
from dflash_offline.stages.store.writer import ShardWriter

CHUNK, BLOCK = 32, 8


def create(
    cache: Path,
    *,
    num_shards: int,
    shard_tokens: int = 256,
    width: int = 64,
    seed: int = 0,
    supervised: float = 0.8,
    mask_token_id: int = 1000,
    tokenizer: Path | None = None,
    features: FeatureLayout | None = None,
) -> Manifest:
    """Publish an empty cache of three layers, with samples of 20 to 90 tokens, ids below 1,000."""
    rng = np.random.default_rng(seed)
    lengths, starts, shards = [], [], []
    for shard in range(num_shards):
        used = 0
        while used + CHUNK * 3 <= shard_tokens:
            length = int(rng.integers(20, CHUNK * 3 - 5))
            lengths.append(length)
            starts.append(shard * shard_tokens + used)
            shards.append(shard)
            used += -(-length // CHUNK) * CHUNK
    ids = rng.integers(0, 1000, sum(lengths)).astype(np.uint32)
    mask = rng.random(sum(lengths)) < supervised
    parts = np.split(mask, np.cumsum(lengths)[:-1])
    numbers = {
        "row": np.arange(1, len(lengths) + 1),
        "answer": np.zeros(len(lengths), np.int32),
        "num_tokens": np.array(lengths),
        "num_supervised": np.array([part.sum() for part in parts]),
        "num_anchors": np.array([part[: 1 - BLOCK].sum() for part in parts]),
        "shard": np.array(shards),
        "start": np.array(starts),
    }
    layout = Layout(
        num_shards=num_shards,
        shard_tokens=shard_tokens,
        chunk_tokens=CHUNK,
        num_layers=3,
        hidden_size=width,
        features=features or FeatureLayout(),
    )
    with building_folder(cache) as folder:
        write_samples(
            folder / SAMPLES,
            sources=["made.jsonl"],
            source_index=np.zeros(len(lengths), np.int32),
            numbers=numbers,
            read=lambda begin, end: (ids[begin:end], mask[begin:end]),
        )
        with RejectWriter(folder / REJECTS):
            pass  # none
        create_arrays(folder / FEATURES, layout, [1, 2, 4], _scales(rng, layout))
        (folder / "target").mkdir()
        (folder / "target" / "config.json").write_text('{"model_type": "none"}')
        if tokenizer is not None:
            shutil.copy(tokenizer, folder / "target")
        publish_cache(
            folder,
            cache,
            identity={
                "layer_ids": [1, 2, 4],
                "seed": seed,
                "capture": CAPTURE_RULE,
                "mask_rule": "by chance",
                "target": {"dtype": "bfloat16", "attn_implementation": "none"},
            },
            origin={"target": "none", "software": {}},
            decoder=decoder(width, vocab_size=1001),
            layout=layout,
            plan={
                "samples": len(lengths),
                "tokens": int(numbers["num_tokens"].sum()),
                "supervised": int(numbers["num_supervised"].sum()),
                "anchors": int(numbers["num_anchors"].sum()),
                "mask_token_id": mask_token_id,
                "block_size": BLOCK,
                "truncated": 0,
                "rejects": {},
            },
        )
    return Manifest.read(cache)


def decoder(width: int, vocab_size: int) -> dict[str, float]:
    """Return the numbers of a decoder of eight layers."""
    sizes = dict.fromkeys(("num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size"), 8)
    numbers = {"hidden_size": width, "vocab_size": vocab_size, "num_hidden_layers": 8, **sizes}
    return {**numbers, "rms_norm_eps": 1e-6, "rope_theta": 1e4, "max_position_embeddings": 4096}


def _scales(rng: np.random.Generator, layout: Layout) -> tuple[NDArray[np.float32], NDArray[np.float32]] | None:
    """Return center and step of scaled features, whose distribution `features` makes the standard one."""
    if layout.features.step is None:
        return None
    shape = (layout.num_layers, layout.hidden_size)
    spread = rng.uniform(0.5, 2.0, shape)
    return rng.standard_normal(shape).astype(np.float32), (spread * layout.features.step).astype(np.float32)


Change = Callable[[NDArray[np.float32]], NDArray[np.float32]]
"""Of a sample's features [T, L, H], to plant a fault."""


def features(
    manifest: Manifest, samples: SampleTable, shard: int, fill: int, change: Change | None = None
) -> NDArray[np.uint16]:
    """Return a shard's codes; a function of the cache's seed and the sample."""
    layout = manifest.layout
    codes = np.full((layout.shard_tokens, layout.num_layers, layout.hidden_size), fill, np.uint16)
    for sample in samples.samples_of_shard(shard).tolist():
        rng = np.random.default_rng([manifest.identity["seed"], sample])
        count = int(samples.num_tokens[sample])
        values = rng.standard_normal((count, layout.num_layers, layout.hidden_size), dtype=np.float32)
        values = values if change is None else change(values)
        begin = int(samples.start[sample]) - shard * layout.shard_tokens
        codes[begin : begin + count] = _codes(values, layout.features)
    return codes


def _codes(values: NDArray[np.float32], features: FeatureLayout) -> NDArray[np.uint16]:
    """Return features as a layout stores them, cut off instead of rounded: whole bits are all that matters here."""
    if features.step is not None:  # in standard deviations from the center
        steps = (values / np.float32(features.step)).astype(np.int32)
        return (2 * np.abs(steps) + (steps < 0)).astype(np.uint16)
    kept = 7 if features.mantissa_bits is None else features.mantissa_bits
    return ((values.view(np.uint32) >> 16) & ~np.uint32((1 << (7 - kept)) - 1)).astype(np.uint16)


def fill_cache(cache: Path, worker: int = 0, change: Change | None = None) -> None:
    """Write every shard that is left, in an order of this worker's own."""
    opened = Cache(cache)
    writer = ShardWriter(opened)
    order = list(range(opened.layout.num_shards))
    random.Random(worker).shuffle(order)
    for wait in (False, True):
        for shard in order:
            if opened.is_done(shard):
                continue
            with writer.claim(shard, wait=wait) as ours:
                if ours:
                    writer.commit(shard, features(opened.manifest, opened.samples, shard, opened.codec.fill, change))


if __name__ == "__main__":
    fill_cache(Path(sys.argv[1]), int(sys.argv[2]))
    assert "torch" not in sys.modules
