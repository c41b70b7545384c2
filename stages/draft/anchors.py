"""Which positions anchor a block, and how they are drawn.

A candidate is a supervised position with a whole block after it, or, by a partial rule, with a supervised token near
enough behind it. How far the text reaches is known in two ways: the bare rule of a padded batch knows only the padded
length; the document rule knows each document's own end, so that neither padding nor the other documents of a batch
change what a document trains on.
"""

# Axes: B rows, S positions, N anchors, T tokens of one document, K block size.

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dflash_offline.schemas.draft.anchor_rule import WHOLE, AnchorRule
from dflash_offline.schemas.errors import NoValidAnchorsError
from dflash_offline.schemas.samples import document_anchors

Anchors = tuple[Tensor, Tensor]
"""Positions int64 [B, N] and keep mask bool [B, N]; slots that are not kept hold position 0."""


def draw_anchors(
    loss_mask: NDArray[np.bool_], rule: AnchorRule, num_anchors: int, seed: int, epoch: int, sample_id: int
) -> NDArray[np.int64]:
    """Return min(num_anchors, candidates) anchors of one document, drawn without replacement, ascending.

    The draw depends on the document and on `seed`, `epoch` and `sample_id` (integers in [0, 2**64)) only, whatever
    the batch, the order of samples or the number of ranks: seed and sample are the key of a counter-based Philox
    generator and the epoch is the highest word of its counter, so that no two streams overlap. Every candidate gets
    one raw word and the smallest win; raw words, unlike numpy's distributions, stay the same across its versions.
    """
    candidates = document_anchors(loss_mask, rule)
    if len(candidates) <= num_anchors:
        return candidates
    philox = np.random.Philox(key=np.array([seed, sample_id], np.uint64), counter=np.array([0, 0, 0, epoch], np.uint64))
    chance = philox.random_raw(len(candidates))
    return np.sort(candidates[np.argpartition(chance, num_anchors)[:num_anchors]])


def collate_anchors(anchors: Sequence[Sequence[NDArray[np.int64]]], offsets: Sequence[Sequence[int]]) -> Anchors:
    """Return the anchors of a batch: `anchors[b][d]` lie in document d of row b, which starts at `offsets[b][d]`.

    N is the largest number of anchors in a row. A padded batch has one document per row, at offset 0.
    """
    rows = [
        np.concatenate([np.zeros(0, np.int64), *(a + start for a, start in zip(row, starts, strict=True))])
        for row, starts in zip(anchors, offsets, strict=True)
    ]
    positions = np.zeros((len(rows), max(map(len, rows), default=0)), np.int64)
    for b, row in enumerate(rows):
        positions[b, : len(row)] = row
    counts = torch.tensor([len(row) for row in rows])
    return torch.from_numpy(positions), torch.arange(positions.shape[1]) < counts[:, None]


def sample_anchors(
    loss_mask: Tensor, seq_len: int, rule: AnchorRule, num_anchors: int, generator: torch.Generator | None = None
) -> Anchors:
    """Draw anchors by the bare rule of a padded batch: a row is one document, and K what the rule counts.

    Candidates of a whole rule are i in [0, max(S-K, 0)] with loss_mask > 0.5. `loss_mask` is [B, S], int, bool or
    float; N = min(num_anchors, the largest candidate count of a row). Raises `NoValidAnchorsError` when no row has a
    candidate.
    """
    if rule.kind == WHOLE:
        candidate = loss_mask[:, : max(seq_len - rule.tokens, 0) + 1] > 0.5
    else:
        candidate = document_candidates(loss_mask, torch.zeros_like(loss_mask, dtype=torch.long), rule)
    counts = candidate.sum(dim=1)
    num = min(num_anchors, int(counts.max())) if counts.numel() else 0
    if num == 0:
        raise NoValidAnchorsError(_no_anchors_text(tuple(loss_mask.shape), seq_len, rule))
    rand = torch.rand(candidate.shape, device=loss_mask.device, generator=generator)
    order = rand.masked_fill(~candidate, 2.0).argsort(dim=1)[:, :num]
    return _ascending(order, counts, num, seq_len)


def sample_document_anchors(
    loss_mask: Tensor,
    document_ids: Tensor,
    rule: AnchorRule,
    num_anchors: int,
    generator: torch.Generator | None = None,
) -> Anchors:
    """Draw up to `num_anchors` anchors of every document by the document rule.

    `loss_mask` is [B, S], `document_ids` int [B, S] with -1 for padding; a document is a contiguous run of one id.
    N is the largest number of anchors in a row. Raises `NoValidAnchorsError` when no document has a candidate.
    """
    seq_len = loss_mask.shape[1]
    candidate = document_candidates(loss_mask, document_ids, rule)
    starts = document_starts(document_ids)
    rand = torch.rand(candidate.shape, device=loss_mask.device, generator=generator)
    # Sort each row by document, then by chance; a candidate's rank within its document decides.
    by_chance = rand.masked_fill(~candidate, 2.0).argsort(dim=1)
    by_document = by_chance.gather(1, starts.gather(1, by_chance).argsort(dim=1, stable=True))
    rank = torch.arange(seq_len, device=loss_mask.device) - starts
    drawn = torch.zeros_like(candidate).scatter(1, by_document, rank < num_anchors) & candidate
    counts = drawn.sum(dim=1)
    num = int(counts.max()) if counts.numel() else 0
    if num == 0:
        raise NoValidAnchorsError(_no_anchors_text(tuple(loss_mask.shape), seq_len, rule))
    order = drawn.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :num]
    return _ascending(order, counts, num, seq_len)


def document_candidates(loss_mask: Tensor, document_ids: Tensor, rule: AnchorRule) -> Tensor:
    """Return bool [B, S]: supervised positions behind which enough follows of the same document."""
    supervised = (loss_mask > 0.5) & (document_ids >= 0)
    follows = torch.zeros_like(supervised)
    offsets = [rule.tokens - 1] if rule.kind == WHOLE else range(1, rule.tokens)
    for offset in offsets:
        if offset < supervised.shape[1]:
            same = document_ids[:, :-offset] == document_ids[:, offset:]
            follows[:, :-offset] |= same if rule.kind == WHOLE else same & supervised[:, offset:]
    return supervised & follows


def document_starts(document_ids: Tensor) -> Tensor:
    """Return int64 [B, S]: the index at which each position's document (a contiguous run of one id) begins."""
    index = torch.arange(document_ids.shape[1], device=document_ids.device).expand(document_ids.shape)
    begins = torch.ones_like(document_ids, dtype=torch.bool)
    begins[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return index.masked_fill(~begins, 0).cummax(dim=1).values


def _ascending(order: Tensor, counts: Tensor, num: int, seq_len: int) -> Anchors:
    """Sort each row's first `counts` drawn positions ascending; the rest become position 0, not kept."""
    keep = torch.arange(num, device=order.device) < counts[:, None]
    positions = order.masked_fill(~keep, seq_len).sort(dim=1).values
    return positions.masked_fill(~keep, 0), keep


def _no_anchors_text(shape: tuple[int, ...], seq_len: int, rule: AnchorRule) -> str:
    smaller = f"before their last {rule.tokens - 1} tokens, or use a smaller block size"
    instead = smaller if rule.kind == WHOLE else "and another near behind it"
    return (
        f"No anchor in a batch of {shape[0]} rows: looked for a supervised position with {rule.wanted}, at padded "
        f"length S = {seq_len} and K = {rule.tokens}, and found none. Leave out samples without a supervised position "
        f"{instead}."
    )
