"""What a plan says of its samples in numbers, from columns of samples.parquet and rejects.parquet alone."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from dflash_offline.schemas.errors import CacheError
from dflash_offline.schemas.manifest import REJECTS, SAMPLES

NUM_BINS = 32
"""Bars of a histogram, at most."""
NUM_EXAMPLES = 3
"""Rejected rows shown for each reason."""
_REJECTS_READ = 262_144
"""Rejected rows looked through for examples, at most."""
_BATCH = 8192
"""Samples whose tokens are in memory at once."""


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Raise `CacheError` where the file cannot be read: of a static file only the size was compared."""
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        raise CacheError(
            f"{path} cannot be read: {' '.join(str(error).split())}. Restore it from a copy, or extract again."
        ) from error


def read_tokens(
    cache: Path, row_groups: list[int] | None = None
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.uint32]]]:
    """Yield for each few thousand samples their lengths and their tokens laid end to end."""
    path = cache / SAMPLES
    with _readable(path):
        file = pq.ParquetFile(path)
        groups = list(range(file.num_row_groups)) if row_groups is None else row_groups
        for batch in file.iter_batches(_BATCH, row_groups=groups, columns=["input_ids"]):
            lengths = pc.list_value_length(batch["input_ids"]).to_numpy(zero_copy_only=False).astype(np.int64)
            yield lengths, batch["input_ids"].flatten().to_numpy()


def spread(values: NDArray[Any]) -> dict[str, Any]:
    """Return least, quantiles, mean, most and a histogram of some numbers; whole numbers stay whole."""
    if not len(values):
        return {"least": 0, "p05": 0, "median": 0, "mean": 0, "p95": 0, "most": 0, "histogram": histogram(values)}
    low, p05, median, p95, high = np.percentile(values, [0, 5, 50, 95, 100]).tolist()
    if np.issubdtype(values.dtype, np.integer):
        low, high = int(low), int(high)
    return {
        "least": low,
        "p05": p05,
        "median": median,
        "mean": float(values.mean()),
        "p95": p95,
        "most": high,
        "histogram": histogram(values),
    }


def histogram(values: NDArray[Any]) -> dict[str, list[float]]:
    """Return `edges` and `counts`: bin i holds edges[i] <= value < edges[i + 1], the last bin its upper edge too."""
    if not len(values):
        return {"edges": [], "counts": []}
    low, high = float(values.min()), float(values.max())
    edges: NDArray[Any]
    if np.issubdtype(values.dtype, np.integer):
        width = -(-(int(high - low) + 1) // NUM_BINS)
        edges = np.arange(int(low), int(high) + width + 1, width)
    else:
        edges = np.linspace(low, high, NUM_BINS + 1) if high > low else np.array([low, low + 1])
    counts, _ = np.histogram(values, edges)
    return {"edges": edges.tolist(), "counts": counts.tolist()}


def reject_examples(cache: Path, reasons: dict[str, int]) -> dict[str, list[dict[str, Any]]]:
    """Return for each reason the first few rows that were left out for it: source, row and detail."""
    found: dict[str, list[dict[str, Any]]] = {reason: [] for reason in reasons}
    wanted = {reason: min(count, NUM_EXAMPLES) for reason, count in reasons.items()}
    path = cache / REJECTS
    if not reasons or not path.is_file():
        return found
    with _readable(path):
        seen = 0
        for batch in pq.ParquetFile(path).iter_batches(_BATCH, columns=["source", "row", "reason", "detail"]):
            for reason in reasons:
                missing = wanted[reason] - len(found[reason])
                if missing > 0:
                    rows = batch.filter(pc.equal(batch.column("reason"), reason)).slice(0, missing).to_pylist()
                    found[reason] += [{name: row[name] for name in ("source", "row", "detail")} for row in rows]
            seen += len(batch)
            if seen >= _REJECTS_READ or all(len(found[reason]) == wanted[reason] for reason in reasons):
                break
    return found


def mask_token_use(cache: Path, token: int, most_tokens: int) -> dict[str, Any]:
    """Return in how many samples a token occurs, the first of them, and how many of all samples were looked at.

    Parts of the plan whose smallest and largest token leave it out are settled without being read; of the others the
    first `most_tokens` tokens are read. `dflash verify` reads all of them.
    """
    with _readable(cache / SAMPLES):
        file = pq.ParquetFile(cache / SAMPLES)
    places = [i for i in range(file.metadata.num_columns) if file.schema.column(i).path.startswith("input_ids")]
    found, settled, first = 0, 0, None
    left = most_tokens
    begin = 0
    for group in range(file.num_row_groups):
        part = file.metadata.row_group(group)
        bounds = part.column(places[0]).statistics
        if bounds is not None and bounds.has_min_max and not bounds.min <= token <= bounds.max:
            settled += part.num_rows
        elif left > 0:
            at = begin
            for lengths, ids in read_tokens(cache, [group]):
                hits = np.unique(np.repeat(np.arange(len(lengths)), lengths)[ids == token])
                first = at + int(hits[0]) if first is None and len(hits) else first
                found += len(hits)
                settled += len(lengths)
                at += len(lengths)
                left -= len(ids)
                if left <= 0:
                    break
        begin += part.num_rows
    return {"samples": found, "first_sample": first, "samples_checked": settled}
