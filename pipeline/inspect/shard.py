"""`dflash inspect CACHE --shard K` and `--top`: one shard's record and samples; the longest or rarest samples."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from dflash_offline.pipeline.inspect.plan_statistics import read_tokens
from dflash_offline.pipeline.inspect.shard_statistics import (
    ArrayBytes,
    PooledLayer,
    bytes_by_array,
    commit_seconds,
    shard_states,
)
from dflash_offline.pipeline.terminal import FLATTENED, OMITTED_IF_NONE, columns, facts, open_console
from dflash_offline.schemas.commits import Commit, LayerStatistics, SkippedSample
from dflash_offline.schemas.errors import CacheError, DflashError, dflash_line
from dflash_offline.schemas.samples import NUMBERS, SampleTable, origin
from dflash_offline.stages.progress import readable_bytes
from dflash_offline.stages.store.cache import Cache

TOP = {
    "longest": "The longest samples",
    "shortest": "The shortest samples",
    "rare": "The samples of the rarest tokens: bits a token by the tokens' shares in this cache",
}
NUM_TOP = 20
_SHOWN = 20


@dataclass(frozen=True, kw_only=True)
class SampleRow:
    """One sample of a table of samples."""

    sample: int
    source: str
    row: int
    answer: int
    """Counts the assistant's turns of the row, up to the last one that is supervised; 0 for the whole row."""
    num_tokens: int
    num_supervised: int
    num_anchors: int
    shard: int
    start: int
    bits: float | None = field(default=None, metadata=OMITTED_IF_NONE)
    """How rare its tokens are, if that was asked for."""


@dataclass(frozen=True, kw_only=True)
class FinishedShard:
    """What a finished shard's record says, and how long it took and what it saved."""

    commit: Commit = field(metadata=FLATTENED)
    seconds: float
    arrays: dict[str, ArrayBytes]


@dataclass(frozen=True, kw_only=True)
class ShardView:
    """One shard: its state, its record if it is finished, and every sample that lies in it."""

    cache: str
    shard: int
    state: str
    fault: str
    """What is wrong with its record or files; empty if nothing is."""
    slots: int
    tokens: int
    samples: list[SampleRow]
    record: FinishedShard | None = field(metadata=FLATTENED)


@dataclass(frozen=True, kw_only=True)
class TopView:
    """The samples that come first in some order."""

    cache: str
    top: str
    """A key of `TOP`."""
    samples: list[SampleRow]


def shard_view(cache: Cache, shard: int) -> ShardView:
    """Return one shard; `DflashError` if the cache has no such shard."""
    layout, samples = cache.layout, cache.samples
    if not 0 <= shard < layout.num_shards:
        raise DflashError(f"{cache.path} has shards 0 to {layout.num_shards - 1}; {shard} is not one of them.")
    members = samples.samples_of_shard(shard)
    commit, record, fault = None, None, ""
    try:
        commit = cache.record(shard)
    except CacheError as error:
        fault = str(error)
    if commit is not None:
        arrays = bytes_by_array({shard: commit}, layout)
        record = FinishedShard(commit=commit, seconds=commit_seconds(commit), arrays=arrays)
    return ShardView(
        cache=cache.name,
        shard=shard,
        state=shard_states(cache.path, layout, {shard: commit} if commit else {}).get(shard, "left"),
        fault=fault,
        slots=layout.shard_tokens,
        tokens=int(samples.num_tokens[members].sum()),
        samples=[_sample_row(samples, sample) for sample in members.tolist()],
        record=record,
    )


def _sample_row(samples: SampleTable, sample: int, bits: float | None = None) -> SampleRow:
    numbers = {name: int(getattr(samples, name)[sample]) for name in NUMBERS}
    return SampleRow(sample=sample, source=samples.source(sample), bits=bits, **numbers)


def print_shard(view: ShardView) -> None:
    """Print a shard for a person."""
    console, record = open_console(), view.record
    rows = [("Shard", f"{view.shard}: {view.state}")]
    if view.fault:
        rows.append(("Fault", view.fault))
    rows.append(("Samples", f"{len(view.samples):,}, {view.tokens:,} tokens in {view.slots:,} slots"))
    if record is not None:
        rate = view.tokens / record.seconds if record.seconds else 0
        rows.append(("Worker", f"{record.commit.worker}, {record.seconds:.1f} s, {rate:,.0f} tokens/s"))
        rows.append(("Times", f"{record.commit.started} to {record.commit.finished}"))
        rows += [("Left out", skipped_text(sample)) for sample in record.commit.skipped]
        for name, size in record.arrays.items():
            rows.append(("Bytes", f"{name}: {readable_bytes(size.stored)}, {size.ratio or 0:.3f} of raw"))
    console.print(facts(rows))
    if record is not None and record.commit.layers:
        console.print(columns(list(map(layer_cells, record.commit.layers))))
    console.print()
    _print_samples(console, view.samples, view.cache)


def skipped_text(skipped: SkippedSample) -> str:
    """Return a sample that was left out, why, and where in it."""
    return f"sample {skipped.sample}: {skipped.reason} at layer {skipped.layer_id}, position {skipped.position}"


def layer_cells(layer: LayerStatistics | PooledLayer) -> dict[str, str]:
    """Return a layer's statistics as a table shows them, by the names of its columns."""
    cells = {"layer": str(layer.layer_id), "mean": f"{layer.mean:.4g}", "std": f"{layer.std:.4g}"}
    if isinstance(layer, PooledLayer):
        cells["std by shard"] = f"{layer.std_least:.3g} to {layer.std_most:.3g}"
    return cells | {"largest": f"{layer.max_abs:.4g}", "zeros": f"{layer.zeros:.2%}"}


def _print_samples(console: Console, samples: list[SampleRow], cache: str) -> None:
    """Print the first of some samples as a table, and how to see one."""
    table = []
    for sample in samples[:_SHOWN]:
        numbers = {"tokens": sample.num_tokens, "superv.": sample.num_supervised, "anchors": sample.num_anchors}
        bits = {} if sample.bits is None else {"bits": f"{sample.bits:.2f}"}
        row = {"sample": str(sample.sample), **{name: f"{number:,}" for name, number in numbers.items()}}
        table.append(
            row | {"shard": str(sample.shard), **bits, "from": origin(sample.source, sample.row, sample.answer)}
        )
    console.print(columns(table, left=("from",)))
    if len(samples) > _SHOWN:
        console.print(f"and {len(samples) - _SHOWN:,} more; all with --json")
    if samples:
        console.print(f"Next: {dflash_line('inspect', cache, '--sample', samples[0].sample)}", soft_wrap=True)


def top_view(cache: Cache, top: str) -> TopView:
    """Return the twenty longest or shortest samples, or those of the rarest tokens.

    How rare a sample is: the mean over its tokens of -log2(the token's share of all tokens of the cache), in bits a
    token. Text in another language or script, tables and noise come first.
    """
    if top not in TOP:
        raise DflashError(f"--top is {top!r}; expected one of {', '.join(TOP)}.")
    samples = cache.samples
    bits = token_bits(cache.path) if top == "rare" else None
    score = samples.num_tokens if bits is None else bits
    order = np.argsort(score if top == "shortest" else -score, kind="stable")[:NUM_TOP].tolist()
    rows = [_sample_row(samples, sample, None if bits is None else float(bits[sample])) for sample in order]
    return TopView(cache=cache.name, top=top, samples=rows)


def token_bits(cache: Path) -> NDArray[np.float64]:
    """Return each sample's mean of -log2(share of its tokens among all tokens of the cache), [samples]."""
    counts = np.zeros(0, np.int64)
    for _, ids in read_tokens(cache):
        part = np.bincount(ids)
        counts = np.pad(counts, (0, max(len(part) - len(counts), 0)))
        counts[: len(part)] += part
    bits = -np.log2(np.maximum(counts, 1) / max(counts.sum(), 1))
    parts = []
    for lengths, ids in read_tokens(cache):
        sums = np.concatenate([[0.0], np.cumsum(bits[ids])])
        ends = np.cumsum(lengths)
        parts.append((sums[ends] - sums[ends - lengths]) / np.maximum(lengths, 1))
    return np.concatenate(parts) if parts else np.zeros(0)


def print_top(view: TopView) -> None:
    """Print the samples for a person."""
    console = open_console()
    console.print(TOP[view.top])
    _print_samples(console, view.samples, view.cache)
