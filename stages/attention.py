"""What a block may see: one predicate, materialised for every attention backend."""

# Axes: B rows, S context positions, N anchors, K block size; queries are N*K, keys are S + N*K.

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

Predicate = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def visible(
    row: Tensor,
    query: Tensor,
    key: Tensor,
    anchors: Tensor,
    keep: Tensor,
    document_ids: Tensor | None,
    seq_len: int,
    block_size: int,
) -> Tensor:
    """Return whether a query sees a key; the int tensors `row`, `query` and `key` broadcast.

    A query of block j sees context positions strictly before anchor j and of the anchor's document, if block j is
    kept, and every token of its own block. A block that is not kept still sees itself: a softmax over nothing is NaN.
    `anchors` is int64 [B, N], `keep` bool [B, N], `document_ids` int [B, S] or None for one document per row.
    Keys below `seq_len` are context positions, the others block tokens.
    """
    block = query // block_size
    anchor = anchors[row, block]
    # The anchor is a context position, so key < anchor also says that the key is one.
    context = (key < anchor) & keep[row, block]
    if document_ids is not None:
        position = torch.where(key < seq_len, key, 0)
        context = context & (document_ids[row, position] == document_ids[row, anchor])
    own_block = (key >= seq_len) & ((key - seq_len) // block_size == block)
    return context | own_block


def dense_mask(anchors: Tensor, keep: Tensor, document_ids: Tensor | None, seq_len: int, block_size: int) -> Tensor:
    """Return the predicate as bool [B, 1, N*K, S + N*K]; True is visible."""
    num_rows, num_queries = anchors.shape[0], anchors.shape[1] * block_size
    row = torch.arange(num_rows, device=anchors.device)[:, None, None, None]
    query = torch.arange(num_queries, device=anchors.device)[:, None]
    key = torch.arange(seq_len + num_queries, device=anchors.device)
    return visible(row, query, key, anchors, keep, document_ids, seq_len, block_size)


def flex_mask(anchors: Tensor, keep: Tensor, document_ids: Tensor | None, seq_len: int, block_size: int) -> BlockMask:
    """Return the predicate as a flex `BlockMask` over N*K queries and S + N*K keys."""
    num_rows, num_queries = anchors.shape[0], anchors.shape[1] * block_size

    def mask_mod(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return visible(row, query, key, anchors, keep, document_ids, seq_len, block_size)

    create = create_block_mask if anchors.is_cpu else _compiled_create_block_mask()
    return create(mask_mod, B=num_rows, H=None, Q_LEN=num_queries, KV_LEN=seq_len + num_queries, device=anchors.device)


@functools.cache
def _compiled_create_block_mask() -> Callable[..., BlockMask]:
    """Compiled, it finds the block mask without materialising the dense one."""
    return torch.compile(create_block_mask)
