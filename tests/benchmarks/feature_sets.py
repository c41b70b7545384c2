"""Features to measure a store with: the embedded target's own, the same at a real model's width, and both stressed.

Axes: T tokens, L captured layers, H hidden size; a feature set is a list of samples, each [T, L, H] bfloat16.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dflash_offline.schemas.commits import commit_path
from dflash_offline.schemas.manifest import CAPTURE_RULE, FEATURES, HIDDEN, SAMPLES, FeatureLayout, Layout, feature_file
from dflash_offline.schemas.samples import write_samples
from dflash_offline.schemas.settings.extract import ExtractConfig
from dflash_offline.stages.capture.encode import FeatureEncoder, calibrate
from dflash_offline.stages.extract import extract
from dflash_offline.stages.progress import Silent
from dflash_offline.stages.store.cache import Cache
from dflash_offline.stages.store.create import create_arrays, publish_cache
from dflash_offline.stages.store.feature_ranges import Sums
from dflash_offline.stages.store.writer import ShardWriter

EMBEDDED = Path(__file__).parents[2] / "pipeline" / "embedded"
TARGET = EMBEDDED / "target"
CHUNK_TOKENS = ExtractConfig.chunk_tokens
CALIBRATION_TOKENS = 4096

WIDE_RULE = """\
wide: a channel is the sum of three of its layer's own channels, drawn at random with random signs, each brought to
mean 0 and standard deviation 1, and noise of 0.1; then given mean and standard deviation of another of the layer's
channels, both times exp(0.3 n), n normal. Tokens, tails, correlations and ranges stay the target's; seed 0."""
OUTLIER_RULE = """\
outliers: one channel in 500 of each layer (two at least) times a factor from 100 to 1,000, even in its logarithm, and
every channel of each sample's first token times 3,000; seed 0."""


def embedded_features(num_conversations: int) -> tuple[list[Tensor], list[Tensor]]:
    """Return the features of the embedded target on its own conversations, and their tokens, by `dflash extract`."""
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data.jsonl"
        with (EMBEDDED / "conversations.jsonl").open() as lines:
            data.write_text("".join(next(lines) for _ in range(num_conversations)))
        config = ExtractConfig(data=(data,), target=str(TARGET), out=Path(folder) / "cache", block_size=8, device="cpu")
        extract(config, Silent())
        reader = Cache.open(config.out)
        ids = [torch.from_numpy(reader.samples.input_ids(i).astype(np.int64)) for i in reader.usable().tolist()]
        return [read_features(reader, i) for i in reader.usable().tolist()], ids


def joined(samples: Sequence[Tensor], num_tokens: int, count: int) -> list[Tensor]:
    """Return longer samples: consecutive ones end to end, cut at `num_tokens`."""
    tokens = torch.cat(list(samples))[: num_tokens * count]
    return [sample.clone() for sample in tokens.split(num_tokens)]


def widened(samples: Sequence[Tensor], width: int) -> list[Tensor]:
    """Return the samples at another width, by `WIDE_RULE`."""
    generator = torch.Generator().manual_seed(0)
    narrow = torch.cat(list(samples)).float()
    wide = torch.empty(*narrow.shape[:2], width, dtype=torch.bfloat16)
    for layer in range(narrow.shape[1]):
        states = narrow[:, layer]
        mean, std = states.mean(dim=0), states.std(dim=0)
        normed = (states - mean) / std
        values = 0.1 * torch.randn(len(states), width, generator=generator)
        for _ in range(3):
            source = torch.randint(states.shape[1], (width,), generator=generator)
            values += normed[:, source] * (2.0 * torch.randint(2, (width,), generator=generator) - 1) / 3**0.5
        like = torch.randint(states.shape[1], (width,), generator=generator)
        gain = (0.3 * torch.randn(width, generator=generator)).exp()
        wide[:, layer] = ((values * std[like] + mean[like]) * gain).to(torch.bfloat16)
    return [sample.clone() for sample in wide.split([len(sample) for sample in samples])]


def stressed(samples: Sequence[Tensor]) -> list[Tensor]:
    """Return the samples with outlier channels and first tokens, by `OUTLIER_RULE`."""
    generator = torch.Generator().manual_seed(0)
    _, num_layers, width = samples[0].shape
    gain = torch.ones(num_layers, width)
    count = max(2, width // 500)
    for layer in range(num_layers):
        chosen = torch.randperm(width, generator=generator)[:count]
        gain[layer, chosen] = 10 ** (2 + torch.rand(count, generator=generator))
    scaled = [sample.float() * gain for sample in samples]
    for sample in scaled:
        sample[0] *= 3000
    return [sample.to(torch.bfloat16) for sample in scaled]


@dataclass(frozen=True)
class Store:
    """A cache of one shard, static files published, and its codes, ready to be committed."""

    writer: ShardWriter
    codes: NDArray[np.uint16]
    """[shard_tokens, L, H]."""
    sums: list[Sums]
    """Of each layer, as extraction adds them up on its device."""

    @property
    def cache(self) -> Path:
        """Where it is."""
        return self.writer.cache.path

    @property
    def path(self) -> Path:
        """The shard's file of features."""
        return self.cache / feature_file(HIDDEN, 0)

    def forget(self) -> None:
        """Remove the shard."""
        commit_path(self.cache, 0).unlink(missing_ok=True)
        self.path.unlink(missing_ok=True)

    def commit(self) -> int:
        """Write the shard, synced; returns the bytes of its features' file."""
        self.writer.commit(0, self.codes, sums=self.sums)
        return self.path.stat().st_size


def new_store(cache: Path, samples: Sequence[Tensor], features: FeatureLayout) -> Store:
    """Publish a cache for these samples, as extraction does, and encode them; no shard is written yet."""
    lengths = np.array([len(sample) for sample in samples])
    slots = -(-lengths // CHUNK_TOKENS) * CHUNK_TOKENS
    start = np.cumsum(slots) - slots
    _, num_layers, width = samples[0].shape
    layout = Layout(
        num_shards=1,
        shard_tokens=int(slots.sum()),
        chunk_tokens=CHUNK_TOKENS,
        num_layers=num_layers,
        hidden_size=width,
        features=features,
    )
    building = cache.with_name(f"{cache.name}.building")
    building.mkdir(parents=True)
    layer_ids = list(range(num_layers))
    write_samples(
        building / SAMPLES,
        sources=["benchmark"],
        source_index=np.zeros(len(samples), np.int32),
        numbers={
            "row": np.arange(1, len(samples) + 1),
            "answer": np.zeros(len(samples), np.int64),
            **dict.fromkeys(("num_tokens", "num_supervised", "num_anchors"), lengths),
            "shard": np.zeros(len(samples), np.int64),
            "start": start,
        },
        read=lambda begin, end: (np.zeros(end - begin, np.uint32), np.ones(end - begin, np.bool_)),
    )
    create_arrays(building / FEATURES, layout, layer_ids, _scales(samples, features))
    publish_cache(building, cache, layout=layout, **_sections(layer_ids, lengths, width))
    opened = Cache(cache)
    codec = opened.codec
    encoder = FeatureEncoder(codec)
    codes = np.full((layout.shard_tokens, num_layers, width), codec.fill, np.uint16)
    for begin, sample in zip(start.tolist(), samples, strict=True):
        for layer in range(num_layers):
            encoded = encoder.encode(sample[:, layer], layer)
            codes[begin : begin + len(sample), layer] = encoded.numpy().view(np.uint16)
    values = [
        codec.values(codes[begin : begin + len(s)], range(num_layers))
        for begin, s in zip(start.tolist(), samples, strict=True)
    ]
    sums = Sums.of_layers(np.concatenate(values).transpose(1, 0, 2))
    return Store(ShardWriter(opened), codes, sums)


def _sections(layer_ids: list[int], lengths: NDArray[np.int64], width: int) -> dict[str, Any]:
    """Return the manifest's other sections."""
    sizes = "hidden_size vocab_size num_attention_heads num_key_value_heads head_dim intermediate_size".split()
    decoder = {"num_hidden_layers": len(layer_ids), "max_position_embeddings": 4096}
    totals = dict.fromkeys(("tokens", "supervised", "anchors"), int(lengths.sum()))
    target = {"dtype": "bfloat16", "attn_implementation": "none"}
    return {
        "identity": {"target": target, "layer_ids": layer_ids, "capture": CAPTURE_RULE, "mask_rule": "none"},
        "origin": {"target": "none", "software": {}},
        "decoder": {**dict.fromkeys(sizes, width), **decoder, "rms_norm_eps": 1e-6, "rope_theta": 1e4},
        "plan": {
            **{"samples": len(lengths), **totals, "mask_token_id": 1, "block_size": 2, "truncated": 0, "rejects": {}}
        },
    }


def _scales(
    samples: Sequence[Tensor], features: FeatureLayout
) -> tuple[NDArray[np.float32], NDArray[np.float32]] | None:
    """Return center and step [L, H] as extraction calibrates them, from samples spread over the set."""
    if features.step is None:
        return None
    every = max(1, sum(map(len, samples)) // CALIBRATION_TOKENS)
    states = torch.cat(list(samples[::every]))[:CALIBRATION_TOKENS]
    centers, steps = zip(*(calibrate(states[:, layer], features.step) for layer in range(states.shape[1])), strict=True)
    return np.stack(centers), np.stack(steps)


def read_features(reader: Cache, sample: int) -> Tensor:
    """Return a sample's features as training reads them: codes, widened to bfloat16."""
    codes = torch.from_numpy(reader.codes(sample).view(np.int16))
    return FeatureEncoder(reader.codec).widen(codes, range(codes.shape[1]))
