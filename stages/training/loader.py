"""Micro-batches streamed from the caches, read and decoded ahead of the step by the loader's threads.

Axes: B rows, S positions, N anchors, L captured layers, H hidden size.
"""

import copy
import itertools
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from dflash_offline.schemas.draft.anchor_rule import AnchorRule
from dflash_offline.stages.capture.encode import FeatureEncoder
from dflash_offline.stages.draft.anchors import collate_anchors, draw_anchors
from dflash_offline.stages.store.cache import Cache
from dflash_offline.stages.store.shard_file import Chunks
from dflash_offline.stages.training.corpus import Corpus
from dflash_offline.stages.training.schedule import Rows, RowShape

AHEAD = 2
"""Micro-batches kept ready beyond those that the threads are loading."""
FETCHED_BYTES = 512 << 20
"""Features, before compression, that are asked of a bucket beyond the micro-batches being loaded; one more may be."""

_Asked = tuple[Cache, int, list[int], Future[Chunks]]
"""A cache, its sample, the columns, and what comes of having asked for them."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One micro-batch: whole documents one after the other in each row, padded on the right."""

    samples: list[int]
    """Documents, row by row."""
    spans: list[tuple[int, int, int]]
    """(row, first position, position after the last) of each document."""
    input_ids: Tensor
    """[B, S] int64."""
    hidden_states: Tensor
    """[B, S, L*H] bfloat16; before `BatchLoader.widen`, the stored codes, [B, S, L, H] int16."""
    loss_mask: Tensor
    """[B, S] bool."""
    document_ids: Tensor
    """[B, S] int64; 0, 1, ... within a row, and -1 where padded."""
    anchors: Tensor
    """[B, N] int64, positions in the row."""
    keep_mask: Tensor
    """[B, N] bool."""
    final: Tensor | None = None
    """The target's states after its final norm, [B, S, H] bfloat16, where they are asked for; before
    `BatchLoader.widen`, the stored codes, [B, S, 1, H] int16. Positions before no supervised token may hold NaN."""
    wait_s: float = 0.0
    """Seconds the step waited for this micro-batch."""

    @property
    def num_tokens(self) -> int:
        """Real tokens, padding left out."""
        return sum(stop - start for _, start, stop in self.spans)

    def to(self, device: torch.device) -> "Batch":
        """Return the batch on a device; a GPU's current stream makes the copy."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> "Batch":
        """Return the batch in page-locked memory, from which copies to a GPU overlap with the computation."""
        return self._map(lambda tensor: tensor.pin_memory())

    def used_by(self, stream: torch.cuda.Stream) -> None:
        """Keep the tensors' memory from being reused before a stream is done with them."""
        for tensor in self._tensors().values():
            tensor.record_stream(stream)

    def _map(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        changes: dict[str, Any] = {name: function(tensor) for name, tensor in self._tensors().items()}
        return replace(self, **changes)

    def _tensors(self) -> dict[str, Tensor]:
        return {f.name: value for f in fields(self) if isinstance(value := getattr(self, f.name), Tensor)}


class BatchLoader:
    """Loads micro-batches for one draft: which layers, which anchors."""

    def __init__(
        self,
        corpus: Corpus,
        *,
        layer_ids: tuple[int, ...],
        anchor_rule: AnchorRule,
        num_anchors: int,
        seed: int,
        shape: RowShape | None,
        device: torch.device,
        with_final: bool = False,
    ) -> None:
        """`shape` is the shape of every micro-batch; None for the smallest that its documents fit.

        `with_final` loads the final states, too, which the corpus must then have.
        """
        self.corpus = corpus
        self.with_final = with_final
        self.encoders = [FeatureEncoder(cache.codec) for cache in corpus.caches]
        self.final_encoders = [FeatureEncoder(final.codec) for final in corpus.finals]
        self.columns = [[cache.layer_ids.index(layer) for layer in layer_ids] for cache in corpus.caches]
        self.anchor_rule = anchor_rule
        self.num_anchors = num_anchors
        self.seed = seed
        self.shape = shape
        self.device = device
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None

    def changed(self, seed: int, with_final: bool) -> "BatchLoader":
        """Return this loader with another seed, and with or without final states; both copy on one stream.

        A GPU's memory is kept for reuse by stream: with a new one each time, what was freed would not be found again.
        """
        other = copy.copy(self)
        other.seed, other.with_final = seed, with_final
        return other

    def load(self, rows: Rows, epoch: int) -> Batch:
        """Return the rows' samples as one micro-batch of stored codes, on the CPU.

        Anchors depend on (seed, epoch, sample) alone.
        """
        corpus = self.corpus
        ends = [np.cumsum(corpus.num_tokens[row]) for row in rows]
        num_rows = self.shape.rows if self.shape else len(rows)
        seq_len = self.shape.tokens if self.shape else int(max(end[-1] for end in ends))
        width = corpus.caches[0].manifest.layout.hidden_size
        pinned = self._copies is not None

        def empty(num_layers: int) -> Tensor:
            made = torch.empty((num_rows, seq_len, num_layers, width), dtype=torch.int16, pin_memory=pinned)
            for b in range(num_rows):
                made[b, ends[b][-1] if b < len(rows) else 0 :] = 0
            return made

        codes = empty(len(self.columns[0]))
        final = empty(1) if self.with_final else None
        ids = np.zeros((num_rows, seq_len), np.int64)
        mask, documents = np.zeros(ids.shape, np.bool_), np.full(ids.shape, -1, np.int64)
        anchors: list[list[NDArray[np.int64]]] = [[] for _ in range(num_rows)]
        starts: list[list[int]] = [[] for _ in range(num_rows)]
        samples, spans = [], []
        for b, row in enumerate(rows):
            for document, (sample, stop) in enumerate(zip(row.tolist(), ends[b].tolist(), strict=True)):
                input_ids, loss_mask = corpus.tokens(sample)
                start = stop - len(input_ids)
                self._read_codes(sample, codes[b, start:stop])
                if final is not None:
                    self._read_final(sample, final[b, start:stop])
                ids[b, start:stop], mask[b, start:stop], documents[b, start:stop] = input_ids, loss_mask, document
                drawn = draw_anchors(
                    loss_mask, self.anchor_rule, self.num_anchors, self.seed, epoch, corpus.anchor_id(sample)
                )
                anchors[b].append(drawn)
                starts[b].append(start)
                samples.append(sample)
                spans.append((b, start, stop))
        positions, keep = collate_anchors(anchors, starts)
        # At least one block, kept or not, so that a step without an anchor computes nothing instead of failing.
        room = max(self.shape.anchors if self.shape else 1, positions.shape[1]) - positions.shape[1]
        batch = Batch(
            samples=samples,
            spans=spans,
            input_ids=torch.from_numpy(ids),
            hidden_states=codes,
            loss_mask=torch.from_numpy(mask),
            document_ids=torch.from_numpy(documents),
            anchors=F.pad(positions, (0, room)),
            keep_mask=F.pad(keep, (0, room)),
            final=final,
        )
        return batch.pinned() if pinned else batch

    def _read_codes(self, sample: int, out: Tensor) -> None:
        """Read one document's stored codes into `out`, int16 [tokens, L, H]."""
        cache, number = self.corpus.locate(sample)
        self.corpus.caches[cache].codes(number, self.columns[cache], out=out.numpy().view(np.uint16))

    def _read_final(self, sample: int, out: Tensor) -> None:
        """Read one document's stored codes of final states into `out`, int16 [tokens, 1, H]."""
        cache, number = self.corpus.locate(sample)
        self.corpus.finals[cache].codes(number, out=out.numpy().view(np.uint16))

    def _fetch(self, rows: Rows, epoch: int) -> Batch:
        """Return a loaded micro-batch on the device; a copy to a GPU overlaps with the computation and is complete."""
        if self._copies is None:
            return self.load(rows, epoch).to(self.device)
        with torch.cuda.stream(self._copies):  # which also makes its GPU the one that this thread pins memory for
            loaded = self.load(rows, epoch)
            placed = loaded.to(self.device)
            self._copies.synchronize()
        return placed

    def widen(self, batch: Batch) -> Batch:
        """Return the micro-batch with bfloat16 features in place of codes, computed on the device that holds it."""
        features = self._widened(batch, batch.hidden_states, self.encoders, self.columns)
        final = None
        if batch.final is not None:
            final = self._widened(batch, batch.final, self.final_encoders, [[0]] * len(self.encoders))
        return replace(batch, hidden_states=features, final=final)

    def _widened(self, batch: Batch, codes: Tensor, encoders: list[FeatureEncoder], columns: list[list[int]]) -> Tensor:
        """Return bfloat16 features [B, S, L*H] of codes [B, S, L, H], given each cache's encoder and columns."""
        if len(encoders) == 1:
            return encoders[0].widen(codes, columns[0]).flatten(2)
        features = torch.zeros_like(codes, dtype=torch.bfloat16)
        for sample, (row, start, stop) in zip(batch.samples, batch.spans, strict=True):
            cache, _ = self.corpus.locate(sample)
            features[row, start:stop] = encoders[cache].widen(codes[row, start:stop], columns[cache])
        return features.flatten(2)

    def stream(self, batches: Iterable[tuple[Rows, int]], threads: int) -> Generator[Batch, None, None]:
        """Yield a micro-batch on the device for each (rows, epoch); `threads` read, decode and copy ahead."""
        pending: deque[Future[Batch]] = deque()
        asked: deque[list[_Asked]] = deque()
        if any(cache.mirror is not None for cache in self.corpus.caches):
            batches = self._fetched_ahead(batches, asked, threads + AHEAD + 1)
        source = iter(batches)
        with ThreadPoolExecutor(threads, thread_name_prefix="loader") as pool:

            def submit() -> None:
                for rows, epoch in source:
                    pending.append(pool.submit(self._fetch, rows, epoch))
                    return

            try:
                for _ in range(threads + AHEAD):
                    submit()
                while pending:
                    yield self._next(pending, submit)
            finally:
                for future in pending:
                    future.cancel()
                for cache, number, columns, chunks in itertools.chain(*asked):
                    cache.forget_ahead(number, columns, chunks)

    def _fetched_ahead(
        self, batches: Iterable[tuple[Rows, int]], asked: deque[list[_Asked]], most: int
    ) -> Iterator[tuple[Rows, int]]:
        """Yield the batches, those that follow being fetched from their buckets meanwhile, `FETCHED_BYTES` of them.

        `asked` is kept at what was asked for of these and of the last `most` that were yielded, loaded or not.
        """
        waiting = deque[tuple[tuple[Rows, int], int]]()
        held = 0
        slot_bytes = 2 * len(self.columns[0]) * self.corpus.caches[0].layout.hidden_size

        def first() -> tuple[Rows, int]:
            nonlocal held
            batch, num_bytes = waiting.popleft()
            held -= num_bytes
            while len(asked) > len(waiting) + most:
                asked.popleft()
            return batch

        for rows, epoch in batches:
            num_bytes = slot_bytes * int(sum(self.corpus.num_tokens[row].sum() for row in rows))
            asked.append([one for row in rows for sample in row.tolist() if (one := self._ask(sample)) is not None])
            waiting.append(((rows, epoch), num_bytes))
            held += num_bytes
            while held > FETCHED_BYTES and len(waiting) > 1:
                yield first()
        while waiting:
            yield first()

    def _ask(self, sample: int) -> "_Asked | None":
        """Begin to fetch one document's stored codes, if its cache is in a bucket."""
        place, number = self.corpus.locate(sample)
        cache, columns = self.corpus.caches[place], self.columns[place]
        future = cache.ahead(number, columns)
        return None if future is None else (cache, number, columns, future)

    def _next(self, pending: deque[Future[Batch]], submit: Callable[[], None]) -> Batch:
        """Return the next micro-batch, ready for the step; nothing else holds it."""
        began = time.perf_counter()
        batch = pending.popleft().result()
        submit()
        waited = time.perf_counter() - began
        if self._copies is not None:
            batch.used_by(torch.cuda.current_stream(self.device))
        return replace(self.widen(batch), wait_s=waited)
