"""What a plan says of its samples in numbers, from columns of samples.parquet and rejects.parquet alone."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from tokenizers import Tokenizer

from dflash_offline.schemas.errors import CacheError
from dflash_offline.schemas.manifest import REJECTS, SAMPLES, TARGET, Manifest
from dflash_offline.schemas.samples import REJECT_SCHEMA, SAMPLE_SCHEMA, open_table

NUM_BINS = 32
"""Bars of a histogram, at most."""
NUM_EXAMPLES = 3
"""Rejected rows shown for each reason."""
_REJECTS_READ = 262_144
"""Rejected rows looked through for examples, at most."""
_BATCH = 8192
"""Samples whose tokens are in memory at once."""


@dataclass(frozen=True)
class Histogram:
    """Bin i holds edges[i] <= value < edges[i + 1], the last bin its upper edge too."""

    edges: Sequence[float]
    counts: Sequence[int]


@dataclass(frozen=True)
class Spread:
    """How some numbers are distributed; the extremes of whole numbers stay whole."""

    least: float
    p05: float
    median: float
    mean: float
    p95: float
    most: float
    histogram: Histogram

    def range_text(self) -> str:
        """Return the extremes and the median."""
        return f"{self.least:,} to {self.most:,}, median {self.median:,.0f}"


@dataclass(frozen=True)
class RejectedRow:
    """An input row that became no sample."""

    source: str
    row: int
    detail: str


@dataclass(frozen=True)
class MaskTokenUse:
    """How many samples hold the mask token."""

    samples: int
    first_sample: int | None
    samples_checked: int
    """How many of all samples were looked at."""


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Raise `CacheError` where the file cannot be read: of a static file only the size was compared."""
    try:
        yield
    except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
        raise CacheError(
            f"{path} cannot be read: {' '.join(str(error).split())}. Restore it from a copy, or extract again."
        ) from error


def read_tokens(
    cache: Path, row_groups: list[int] | None = None
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.uint32]]]:
    """Yield for each few thousand samples their lengths and their tokens laid end to end."""
    path = cache / SAMPLES
    with _readable(path):
        file = open_table(path, SAMPLE_SCHEMA)
        groups = list(range(file.num_row_groups)) if row_groups is None else row_groups
        for batch in file.iter_batches(_BATCH, row_groups=groups, columns=["input_ids"]):
            lengths = pc.list_value_length(batch["input_ids"]).to_numpy(zero_copy_only=False).astype(np.int64)
            yield lengths, batch["input_ids"].flatten().to_numpy()


def spread(values: NDArray[Any]) -> Spread:
    """Return how numbers are distributed; zeros where there are none."""
    if not len(values):
        return Spread(0, 0, 0, 0, 0, 0, Histogram([], []))
    low, p05, median, p95, high = np.percentile(values, [0, 5, 50, 95, 100]).tolist()
    if np.issubdtype(values.dtype, np.integer):
        low, high = int(low), int(high)
    return Spread(low, p05, median, float(values.mean()), p95, high, _histogram(values))


def _histogram(values: NDArray[Any]) -> Histogram:
    low, high = float(values.min()), float(values.max())
    edges: NDArray[Any]
    if np.issubdtype(values.dtype, np.integer):
        width = -(-(int(high - low) + 1) // NUM_BINS)
        edges = np.arange(int(low), int(high) + width + 1, width)
    else:
        edges = np.linspace(low, high, NUM_BINS + 1) if high > low else np.array([low, low + 1])
    counts, _ = np.histogram(values, edges)
    return Histogram(edges.tolist(), counts.tolist())


def reject_examples(cache: Path, reasons: dict[str, int]) -> dict[str, list[RejectedRow]]:
    """Return the first few rows that were left out for each reason."""
    examples: dict[str, list[RejectedRow]] = {reason: [] for reason in reasons}
    path = cache / REJECTS
    if not reasons or not path.is_file():
        return examples
    with _readable(path):
        seen, file = 0, open_table(path, REJECT_SCHEMA, ["source", "reason", "detail"])
        for batch in file.iter_batches(_BATCH, columns=["source", "row", "reason", "detail"]):
            if any(column.null_count for column in batch.columns):
                raise pa.ArrowInvalid("a value is missing")
            missing = {r: min(count, NUM_EXAMPLES) - len(examples[r]) for r, count in reasons.items()}
            if seen >= _REJECTS_READ or not any(missing.values()):
                break
            for reason, number in missing.items():
                rows = batch.filter(pc.equal(batch["reason"], reason)).slice(0, number) if number else batch[:0]
                examples[reason] += [RejectedRow(**row) for row in rows.select(["source", "row", "detail"]).to_pylist()]
            seen += len(batch)
    return examples


def mask_token_use(cache: Path, token: int, most_tokens: int) -> MaskTokenUse:
    """Return in how many samples a token occurs.

    Row groups whose smallest and largest token exclude it are settled without being read; of the others the first
    `most_tokens` tokens are read. `dflash verify` reads all of them.
    """
    with _readable(cache / SAMPLES):
        file = open_table(cache / SAMPLES, SAMPLE_SCHEMA)
        names = [file.schema.column(i).path for i in range(file.metadata.num_columns)]
    column = next(i for i, name in enumerate(names) if name.startswith("input_ids"))
    holding, checked, first = 0, 0, None
    left, begin = most_tokens, 0
    for number in range(file.num_row_groups):
        group = file.metadata.row_group(number)
        bounds = group.column(column).statistics
        if bounds is not None and bounds.has_min_max and not bounds.min <= token <= bounds.max:
            checked += group.num_rows
        elif left > 0:
            at = begin
            for lengths, ids in read_tokens(cache, [number]):
                hits = np.unique(np.repeat(np.arange(len(lengths)), lengths)[ids == token])
                first = at + int(hits[0]) if first is None and len(hits) else first
                holding += len(hits)
                checked += len(lengths)
                at += len(lengths)
                left -= len(ids)
                if left <= 0:
                    break
        begin += group.num_rows
    return MaskTokenUse(holding, first, checked)


def describe_token(cache: Path, manifest: Manifest, token: int) -> tuple[str | None, str]:
    """Return a token's text, None if the tokenizer has none, and why it should not be the mask token, if so."""
    num_rows = manifest.decoder.get("vocab_size", token + 1)
    if token >= num_rows:
        return None, f"is no row of the embedding table of {num_rows}"
    try:
        tokenizer = Tokenizer.from_file(str(cache / TARGET / "tokenizer.json"))
    except Exception:  # the library raises bare Exception; the rest of a cache can be shown without
        return None, ""
    name = tokenizer.id_to_token(token)
    if name is None:
        return None, ""  # a spare row of the embedding table
    if token in manifest.identity["target"].get("end_ids", ()):
        return name, "ends an answer"
    if token not in tokenizer.get_added_tokens_decoder():
        return name, "is an ordinary token, which a prompt may contain"
    return name, ""
