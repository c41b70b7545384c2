"""Batches streamed from the cache: read and decoded ahead of the step by threads of the loader's own.

Axes: B samples, S positions, N anchors, L captured layers, H hidden size.
"""

import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dflash_offline.schemas.files import sha256_bytes
from dflash_offline.schemas.samples import SampleTable
from dflash_offline.stages.anchors import collate_anchors, draw_anchors
from dflash_offline.stages.cache import CacheReader
from dflash_offline.stages.encoding import FeatureEncoder

BUCKET = 32
"""Batches whose samples are sorted by length together, so that rows of a batch are padded little."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One micro-batch: a sample a row, padded on the right."""

    samples: list[int]
    input_ids: Tensor
    """[B, S] int64."""
    hidden_states: Tensor
    """[B, S, L*H] bfloat16."""
    loss_mask: Tensor
    """[B, S] bool."""
    document_ids: Tensor
    """[B, S] int64; 0, and -1 where padded."""
    anchors: Tensor
    """[B, N] int64."""
    keep_mask: Tensor
    """[B, N] bool."""
    wait_s: float = 0.0
    """Seconds the step waited for this batch."""

    @property
    def num_tokens(self) -> int:
        """Real tokens, padding left out."""
        return int((self.document_ids >= 0).sum())

    def to(self, device: torch.device) -> "Batch":
        """Return the batch on a device."""
        moved: dict[str, Any] = {
            field.name: value.to(device, non_blocking=True)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return replace(self, **moved)


def split_samples(samples: SampleTable, num_held_out: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return (training, held-out) samples: at most `num_held_out`, and at most a tenth, are held out.

    A function of content: the same tokens always fall on the same side, so repeated conversations do not leak.
    """
    digests = [sha256_bytes(samples.input_ids(i).tobytes()) for i in range(len(samples))]
    room = min(num_held_out, len(samples) // 10)
    held_out = set()
    for digest, copies in sorted(Counter(digests).items()):
        if copies <= room:
            held_out.add(digest)
            room -= copies
    is_held_out = np.array([digest in held_out for digest in digests], np.bool_)
    return np.flatnonzero(~is_held_out), np.flatnonzero(is_held_out)


def epoch_batches(
    samples: SampleTable, members: NDArray[np.int64], batch_size: int, seed: int, epoch: int
) -> list[NDArray[np.int64]]:
    """Return one epoch's batches: a global shuffle by (seed, epoch), samples of like length together.

    Lengths are sorted within stretches of `BUCKET` batches only, and the batches are shuffled again.
    """
    generator = np.random.default_rng([seed, epoch])
    order = generator.permutation(members)
    stretch = BUCKET * batch_size
    batches: list[NDArray[np.int64]] = []
    for begin in range(0, len(order), stretch):
        part = order[begin : begin + stretch]
        part = part[np.argsort(samples.num_tokens[part], kind="stable")]
        batches += [part[i : i + batch_size] for i in range(0, len(part), batch_size)]
    return [batches[i] for i in generator.permutation(len(batches))]


class BatchLoader:
    """Loads batches of one cache for one draft: which layers, which blocks, which anchors."""

    def __init__(
        self, reader: CacheReader, *, columns: list[int], block_size: int, num_anchors: int, seed: int, pinned: bool
    ) -> None:
        self.reader = reader
        self.encoder = FeatureEncoder(reader.codec)
        self.columns = columns
        self.block_size = block_size
        self.num_anchors = num_anchors
        self.seed = seed
        self.pinned = pinned

    def load(self, members: NDArray[np.int64], epoch: int) -> Batch:
        """Return the samples as one batch; the anchors depend on (seed, epoch, sample) alone."""
        samples, width = self.reader.samples, self.reader.manifest.layout.hidden_size
        lengths = samples.num_tokens[members]
        shape = (len(members), int(lengths.max()))
        codes = torch.zeros((*shape, len(self.columns), width), dtype=torch.int16, pin_memory=self.pinned)
        bits = codes.numpy().view(np.uint16)
        ids, mask = np.zeros(shape, np.int64), np.zeros(shape, np.bool_)
        anchors = []
        for row, sample in enumerate(members.tolist()):
            count = lengths[row]
            self.reader.read_codes(sample, self.columns, out=bits[row, :count])
            ids[row, :count] = samples.input_ids(sample)
            mask[row, :count] = samples.loss_mask(sample)
            anchors.append(
                draw_anchors(samples.loss_mask(sample), self.block_size, self.num_anchors, self.seed, epoch, sample)
            )
        positions, keep = collate_anchors([[a] for a in anchors], [[0]] * len(anchors))
        return Batch(
            samples=members.tolist(),
            input_ids=torch.from_numpy(ids),
            hidden_states=self.encoder.widen(codes, self.columns).flatten(2),
            loss_mask=torch.from_numpy(mask),
            document_ids=torch.from_numpy(np.where(np.arange(shape[1]) < lengths[:, None], 0, -1)),
            anchors=positions,
            keep_mask=keep,
        )

    def stream(self, batches: Iterable[tuple[NDArray[np.int64], int]], threads: int) -> Iterator[Batch]:
        """Yield a batch for each (samples, epoch), `threads` of them read ahead."""
        pending: deque[Future[Batch]] = deque()
        source = iter(batches)
        with ThreadPoolExecutor(threads, thread_name_prefix="loader") as pool:

            def submit() -> None:
                for members, epoch in source:
                    pending.append(pool.submit(self.load, members, epoch))
                    return

            try:
                for _ in range(threads + 1):
                    submit()
                while pending:
                    began = time.perf_counter()
                    batch = pending.popleft().result()
                    submit()
                    yield replace(batch, wait_s=time.perf_counter() - began)
            finally:
                for future in pending:
                    future.cancel()
