"""The samples of every micro-batch: a function of the samples' lengths, the settings, the seed and the epoch alone.

No feature is read for it, and neither ranks nor threads nor an interruption change it.
"""

import math
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dflash_offline.schemas.errors import DflashError

POOL = 64
"""Documents among which the next one of a row is chosen."""
STRETCH = 16_384
"""Most documents that are packed apart from the others; the last row of each stretch is seldom full."""
NO_DOCUMENT = -1
BUCKET = 32
"""Padded micro-batches whose samples are sorted by length together, so that rows need little padding."""
ALIGNMENT = 128
"""Lengths of rows, and their block tokens, are multiples of this: tiles of attention are then all whole."""
ROW_RULE = "anchors by trial, multiples of 128"
"""How `row_shape` chooses; recorded with a run, so that one which was begun by another rule goes on by that."""
SHARES = (1.0, 0.94, 0.88, 0.82, 0.76, 0.7)
"""What `row_shape` tries: room for blocks, over what a row full of tokens would have on average."""
TRIED = 1024
"""Documents that it packs to try one."""
CONTEXT_WORK = 0.13
"""Work of a context token over that of a block token, in a draft for an 8B target."""

Samples = NDArray[np.int64]
Rows = list[Samples]
"""One micro-batch: the samples of each of its rows, in order."""


@dataclass(frozen=True, kw_only=True)
class RowShape:
    """The shape of all packed micro-batches, one for all, so that nothing is compiled twice."""

    rows: int
    """B."""
    tokens: int
    """S."""
    anchors: int
    """N; blocks beyond a row's own are not kept."""


@dataclass(frozen=True, kw_only=True)
class RowLimits:
    """What a packed micro-batch may hold."""

    batch_tokens: int
    """Tokens of its rows."""
    batch_block_tokens: int
    """Tokens of its blocks."""
    block_size: int
    row_tokens: int | None
    """Length of a row; None to choose it."""
    long_rows: bool
    """Where it is chosen: as long as the limits allow, or as short as the longest document allows."""


def row_shape(num_tokens: Samples, num_anchors: Samples, limits: RowLimits) -> RowShape:
    """Return the shape for documents of these lengths and numbers of anchors.

    Blocks cost many times what tokens do, so a row has room for fewer than a row full of tokens would have, if that
    packs to less work in all: some documents are packed with each of `SHARES`. Raises `DflashError` if a document is
    longer or has more blocks than the limits allow, or a row is longer.
    """
    most, room = int(num_anchors.max()), limits.batch_block_tokens // limits.block_size
    if max(most, 1) > room:
        raise DflashError(
            f"A document has {most:,} blocks of {limits.block_size} tokens, and a micro-batch "
            f"{limits.batch_block_tokens:,} block tokens. Raise --batch-block-tokens to "
            f"{max(most, 1) * limits.block_size:,} or more, or lower --num-anchors."
        )
    density = float(num_anchors.sum() / num_tokens.sum())
    tokens = limits.row_tokens or _row_length(int(num_tokens.max()), density, room, limits)
    _refuse_longer(int(num_tokens.max()), tokens, limits.batch_tokens)
    step = ALIGNMENT // math.gcd(ALIGNMENT, limits.block_size)
    step = step if step <= 16 else 8  # blocks of an odd length would need many more

    def shaped(share: float) -> RowShape:
        wanted = max(most, math.ceil(share * density * tokens), 1)
        anchors = min(math.ceil(wanted / step) * step, room)
        return RowShape(
            rows=max(1, min(limits.batch_tokens // tokens, room // anchors)), tokens=tokens, anchors=anchors
        )

    shapes = list(dict.fromkeys(map(shaped, SHARES)))
    if len(shapes) == 1:
        return shapes[0]
    some = np.random.default_rng(0).permutation(len(num_tokens))[:TRIED]
    work = [
        len(pack(num_tokens, num_anchors, some, shape)) * (shape.anchors * limits.block_size + CONTEXT_WORK * tokens)
        for shape in shapes
    ]
    # Less than a hundredth is not worth a smaller micro-batch.
    return next(shape for shape, its in zip(shapes, work, strict=True) if its <= 1.01 * min(work))


def _row_length(longest: int, density: float, room: int, limits: RowLimits) -> int:
    """Return the length of a row, given the blocks for each token and the blocks of a micro-batch."""
    shortest = math.ceil(longest / ALIGNMENT) * ALIGNMENT
    if limits.long_rows:
        full = limits.batch_tokens if not density else min(limits.batch_tokens, int(room / density))
        shortest = max(shortest, full if full == limits.batch_tokens else full // ALIGNMENT * ALIGNMENT)
    return min(limits.batch_tokens, shortest)


def earlier_row_shape(num_tokens: Samples, num_anchors: Samples, batch_tokens: int, row_tokens: int | None) -> RowShape:
    """Return the shape that runs without a recorded `ROW_RULE` have."""
    longest = int(num_tokens.max())
    tokens = row_tokens or min(batch_tokens, math.ceil(longest / 64) * 64)
    _refuse_longer(longest, tokens, batch_tokens)
    anchors = max(int(num_anchors.max()), math.ceil(num_anchors.sum() / num_tokens.sum() * tokens))
    return RowShape(rows=batch_tokens // tokens, tokens=tokens, anchors=anchors)


def _refuse_longer(longest: int, tokens: int, batch_tokens: int) -> None:
    if not longest <= tokens <= batch_tokens:
        raise DflashError(
            f"The longest document has {longest:,} tokens, a row {tokens:,} and a micro-batch {batch_tokens:,}; each "
            f"must hold the one before. Raise --batch-tokens, and --row-tokens, if you set it, to {longest:,} or more."
        )


def pack(num_tokens: Samples, num_anchors: Samples, order: Samples, shape: RowShape) -> Rows:
    """Return rows of whole documents, none with more tokens or anchors than the shape has; every sample once.

    Rows are filled one after the other. The next document is chosen among the first `POOL` that are left in `order`: of
    those that fit, the one that takes most of what the row has most of (the largest inner product of the document's
    needs and the row's free shares). Stretches of `order` are packed independently and in lockstep, so that all of
    them take hardly longer than one.
    """
    # Axes: two needs (tokens, anchors), G stretches, POOL documents to choose from.
    if not len(order):
        return []
    parts = np.array_split(order, math.ceil(len(order) / STRETCH))
    queue = np.full((len(parts), len(parts[0]) + POOL), NO_DOCUMENT)
    for stretch, part in enumerate(parts):
        queue[stretch, : len(part)] = part
    needs = np.stack([num_tokens[queue] / shape.tokens, num_anchors[queue] / shape.anchors])
    needs[:, queue == NO_DOCUMENT] = 2.0  # more than any row has
    pool, wanted, following = queue[:, :POOL].copy(), needs[:, :, :POOL].copy(), np.full(len(parts), POOL)
    row, free = np.arange(len(parts)) * len(order), np.ones((2, len(parts), 1))
    documents, rows, num_left = [], [], len(order)
    while num_left:
        fits = np.all(wanted <= free + 1e-9, axis=0)
        place = np.where(fits, (wanted * free).sum(axis=0), -1.0).argmax(axis=1)
        takes = np.take_along_axis(fits, place[:, None], axis=1)[:, 0]
        row[~takes] += 1
        free[:, ~takes] = 1.0
        (taking,) = takes.nonzero()
        place, then = place[taking], following[taking]
        documents.append(pool[taking, place])
        rows.append(row[taking])
        free[:, taking, 0] -= wanted[:, taking, place]
        pool[taking, place], wanted[:, taking, place] = queue[taking, then], needs[:, taking, then]
        following[taking] += 1
        num_left -= len(taking)
    number = np.concatenate(rows)
    by_row = number.argsort(kind="stable")
    return np.split(np.concatenate(documents)[by_row], np.flatnonzero(np.diff(number[by_row])) + 1)


def pad(num_tokens: Samples, order: Samples, batch_size: int) -> list[Rows]:
    """Return micro-batches of `batch_size` rows, a sample a row, of like length; every sample once.

    Lengths are sorted within stretches of `BUCKET` micro-batches of `order` only.
    """
    batches: list[Rows] = []
    for begin in range(0, len(order), BUCKET * batch_size):
        part = order[begin : begin + BUCKET * batch_size]
        part = part[np.argsort(num_tokens[part], kind="stable")]
        batches += [list(part[i : i + batch_size, None]) for i in range(0, len(part), batch_size)]
    return batches


@dataclass(frozen=True, kw_only=True)
class Batching:
    """How samples become micro-batches: packed into rows of one shape, or padded."""

    num_tokens: Samples
    """Of every sample of the corpus."""
    num_anchors: Samples
    """Of every sample: how many an epoch draws."""
    shape: RowShape | None
    """None to pad."""
    batch_size: int
    """Rows of a padded micro-batch."""

    @property
    def largest(self) -> tuple[int, int, int]:
        """Rows, tokens of a row and blocks of a row of the largest micro-batch; all are alike when packed."""
        if self.shape is None:
            return min(self.batch_size, len(self.num_tokens)), int(self.num_tokens.max()), int(self.num_anchors.max())
        return self.shape.rows, self.shape.tokens, self.shape.anchors

    def batches(self, order: Samples) -> list[Rows]:
        """Return the micro-batches of these samples."""
        if self.shape is None:
            return pad(self.num_tokens, order, self.batch_size)
        rows = pack(self.num_tokens, self.num_anchors, order, self.shape)
        return [rows[i : i + self.shape.rows] for i in range(0, len(rows), self.shape.rows)]


class Schedule:
    """The endless sequence of a run's micro-batches, epoch after epoch."""

    def __init__(self, batching: Batching, members: list[Samples], weights: list[float], seed: int) -> None:
        """`members` are each cache's training samples; an epoch takes the share `weights` of each."""
        self.batching = batching
        self.members = members
        self.weights = weights
        self.seed = seed
        self._counts: dict[int, int] = {}

    def order(self, epoch: int) -> Samples:
        """Return an epoch's samples: each cache's share is drawn, then all are shuffled, by (seed, epoch)."""
        taken = []
        for cache, (members, weight) in enumerate(zip(self.members, self.weights, strict=True)):
            if weight < 1:
                # A spawn key, because a list that ends in cache 0 would give the stream of the shuffle below.
                stream = np.random.SeedSequence([self.seed, epoch], spawn_key=[cache])
                members = np.random.default_rng(stream).permutation(members)[: math.ceil(weight * len(members))]
            taken.append(members)
        return np.random.default_rng([self.seed, epoch]).permutation(np.concatenate(taken))

    def epoch(self, epoch: int) -> list[Rows]:
        """Return an epoch's micro-batches, in an order of their own: packing takes long documents first."""
        batches = self.batching.batches(self.order(epoch))
        self._counts[epoch] = len(batches)
        return [batches[i] for i in np.random.default_rng([self.seed, epoch, len(batches)]).permutation(len(batches))]

    def count(self, epoch: int) -> int:
        """Return the number of an epoch's micro-batches."""
        if epoch not in self._counts:
            self.epoch(epoch)
        return self._counts[epoch]

    def batches_of(self, epochs: float) -> int:
        """Return the number of micro-batches of so many epochs; packing makes no two alike."""
        whole = math.floor(epochs)
        rest = epochs - whole
        return sum(map(self.count, range(whole))) + (math.ceil(rest * self.count(whole)) if rest else 0)

    def between(self, first: int, last: int) -> Iterator[tuple[Rows, int]]:
        """Yield (rows, epoch) of the micro-batches from number `first` up to `last`, counted from the run's start.

        An epoch is packed beside the steps of the one before it.
        """
        epoch, begin = 0, 0
        with ThreadPoolExecutor(1, thread_name_prefix="packer") as packer:
            packed: dict[int, Future[list[Rows]]] = {}
            while begin < last:
                if epoch not in self._counts or begin + self._counts[epoch] > first:
                    batches = packed.pop(epoch).result() if epoch in packed else self.epoch(epoch)
                    end = begin + len(batches)
                    if first < end < last:
                        packed[epoch + 1] = packer.submit(self.epoch, epoch + 1)
                    yield from ((rows, epoch) for rows in batches[max(first - begin, 0) : last - begin])
                epoch, begin = epoch + 1, begin + self._counts[epoch]
