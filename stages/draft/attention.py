"""What a block may see, one predicate materialised for every attention backend, and those backends."""

# Axes: B rows, S context positions, N anchors, K block size; queries are N*K, keys are S + N*K.

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, FlexKernelOptions, flex_attention

from dflash_offline.schemas.draft.config import AttentionRule
from dflash_offline.schemas.settings.train import FLEX_TILES
from dflash_offline.stages.draft.anchors import document_starts

TILE_QUERIES = 128
"""Queries of one tile, about: enough to keep a matmul busy, few enough that neighbours see nearly the same context."""
_FLEX_TILE = 128
"""Queries and keys of a tile of flex attention."""
_BACKWARD_TILES: dict[str, FlexKernelOptions | None] = {
    "default": None,
    "narrow": {"BLOCK_M1": 32, "BLOCK_N1": 128, "BLOCK_M2": 128, "BLOCK_N2": 32},  # of the backward kernels alone
}
"""Kernel options of flex attention for each of `FLEX_TILES`; narrow ones need fewer registers."""
_chosen_tiles = "default"


@dataclass(frozen=True)
class Blocks:
    """Where the blocks of a batch stand."""

    anchors: Tensor
    """int64 [B, N]."""
    keep: Tensor
    """bool [B, N]; a block that is not kept sees only itself."""
    document_ids: Tensor | None
    """int [B, S], or None for one document per row."""
    seq_len: int
    """S."""
    block_size: int
    """K."""

    @property
    def num_queries(self) -> int:
        """N * K."""
        return self.anchors.shape[1] * self.block_size


def visible(row: Tensor, query: Tensor, key: Tensor, blocks: Blocks, rule: AttentionRule) -> Tensor:
    """Return whether a query sees a key; the int tensors `row`, `query` and `key` broadcast.

    A query of block j sees context positions strictly before anchor j and of the anchor's document, if block j is
    kept, and the tokens of its own block. A block that is not kept still sees itself: a softmax over nothing is NaN.
    A window W hides context W or more positions before the query itself; a causal rule hides the later tokens of
    the block. Keys below S are context positions, the others block tokens.
    """
    block, slot = query // blocks.block_size, query % blocks.block_size
    anchor = blocks.anchors[row, block]
    # The anchor is a context position, so key < anchor also says that the key is one.
    context = (key < anchor) & blocks.keep[row, block]
    if rule.window is not None:
        context = context & (anchor + slot - key < rule.window)
    if blocks.document_ids is not None:
        position = torch.where(key < blocks.seq_len, key, 0)
        context = context & (blocks.document_ids[row, position] == blocks.document_ids[row, anchor])
    own = key - blocks.seq_len
    own_block = (own >= 0) & (own // blocks.block_size == block)
    if rule.causal:
        own_block = own_block & (own <= query)
    return context | own_block


def dense_mask(blocks: Blocks, rule: AttentionRule) -> Tensor:
    """Return the predicate as bool [B, 1, N*K, S + N*K]; True is visible."""
    device = blocks.anchors.device
    row = torch.arange(blocks.anchors.shape[0], device=device)[:, None, None, None]
    query = torch.arange(blocks.num_queries, device=device)[:, None]
    key = torch.arange(blocks.seq_len + blocks.num_queries, device=device)
    return visible(row, query, key, blocks, rule)


@dataclass(frozen=True)
class Tile:
    """Neighbouring blocks, and all that any of them can see: one stretch of the context, and themselves."""

    num_queries: int
    """Q."""
    context: slice
    """C positions of the row; no query of the tile sees another."""
    mask: Tensor
    """The predicate, bool [B, 1, Q, C + Q]."""


@dataclass(frozen=True)
class TiledMask:
    """The predicate, cut into tiles of queries in order; what lies outside a tile's keys is not visible."""

    seq_len: int
    tiles: tuple[Tile, ...]


Mask = Tensor | BlockMask | TiledMask | None


def tiled_mask(blocks: Blocks, rule: AttentionRule) -> TiledMask:
    """Return the predicate as tiles. Anchors ascend, so neighbours share their context, and N*K x N*K is never formed.

    Exact for any order of anchors; on a GPU the host waits for them once.
    """
    anchors, keep, size = blocks.anchors, blocks.keep, blocks.block_size
    first = torch.zeros_like(anchors)
    if blocks.document_ids is not None:
        first = document_starts(blocks.document_ids).gather(1, anchors)
    if rule.window is not None:
        first = torch.maximum(first, anchors - rule.window + 1)
    first, last = first.masked_fill(~keep, blocks.seq_len), anchors.masked_fill(~keep, 0)
    begins, ends = torch.stack((first.amin(dim=0), last.amax(dim=0))).tolist()
    row = torch.arange(len(anchors), device=anchors.device)[:, None, None, None]
    step, tiles = max(TILE_QUERIES // size, 1), []
    for block in range(0, len(ends), step):
        end = max(ends[block : block + step])
        context = slice(min(*begins[block : block + step], end), end)
        query = torch.arange(block * size, min(block + step, len(ends)) * size, device=anchors.device)
        position = torch.arange(context.start, context.stop, device=anchors.device)
        mask = visible(row, query[:, None], torch.cat((position, blocks.seq_len + query)), blocks, rule)
        tiles.append(Tile(len(query), context, mask))
    return TiledMask(blocks.seq_len, tuple(tiles))


def flex_mask(blocks: Blocks, rule: AttentionRule) -> BlockMask:
    """Return the predicate as a flex `BlockMask` over N*K queries and S + N*K keys.

    Which tiles of queries and keys to visit is found block by block, K times fewer pairs than token by token: of a
    block's slots the first sees the most of the context and the last the least.
    """
    size, device = blocks.block_size, blocks.anchors.device
    row = torch.arange(len(blocks.anchors), device=device)[:, None, None]
    first_slot = torch.arange(0, blocks.num_queries, size, device=device)[:, None]
    position = torch.arange(blocks.seq_len, device=device)
    most = visible(row, first_slot, position, blocks, rule)
    least = visible(row, first_slot + size - 1, position, blocks, rule)
    key_tile = torch.arange(-(-(blocks.seq_len + blocks.num_queries) // _FLEX_TILE), device=device)
    own = blocks.seq_len + first_slot
    own_tiles = (key_tile >= own // _FLEX_TILE) & (key_tile <= (own + size - 1) // _FLEX_TILE)
    seen = _by_tile(most, len(key_tile)).any(dim=-1) | own_tiles
    whole = _by_tile(least, len(key_tile)).all(dim=-1)
    num_tiles = -(-blocks.num_queries // _FLEX_TILE)
    seen = _by_tile(seen.repeat_interleave(size, dim=1).mT, num_tiles).any(dim=-1).mT
    whole = ~_by_tile(~whole.repeat_interleave(size, dim=1).mT, num_tiles).any(dim=-1).mT

    mask_mod = _interval_mask(blocks, rule)
    partly = seen & ~whole
    # Listed by keys as well, which `from_kv_blocks` would do with indices of the CPU's, so that it waits for a GPU.
    keys, whole_keys, queries, whole_queries = map(_listed, (partly, whole, partly.mT, whole.mT))
    lengths = blocks.num_queries, blocks.seq_len + blocks.num_queries
    return BlockMask(
        lengths, *keys, *whole_keys, *queries, *whole_queries, BLOCK_SIZE=(_FLEX_TILE, _FLEX_TILE), mask_mod=mask_mod
    )


def _interval_mask(blocks: Blocks, rule: AttentionRule) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Return `visible` as flex asks it of every pair of a partly visible tile: as two intervals of keys.

    What a query sees of the context ends at its anchor and begins with the document or the window; the own tokens
    follow one another too. So a kernel looks up two numbers a query, and for a key divides and looks up nothing: of the
    registers that it needs besides, many would spill.
    """
    size, seq_len = blocks.block_size, blocks.seq_len
    anchors = blocks.anchors.to(torch.int32)
    stops = torch.where(blocks.keep, anchors, 0).contiguous()
    starts = torch.zeros_like(anchors)
    if blocks.document_ids is not None:
        starts = document_starts(blocks.document_ids).gather(1, blocks.anchors).to(torch.int32).contiguous()

    def mask_mod(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        block = query // size
        own = seq_len + block * size
        context = (key >= starts[row, block]) & (key < stops[row, block])
        if rule.window is not None:
            context = context & (key > anchors[row, block] + query - block * size - rule.window)
        last = seq_len + query + 1 if rule.causal else own + size
        return context | ((key >= own) & (key < last))

    return mask_mod


def _by_tile(x: Tensor, num_tiles: int) -> Tensor:
    """Return bool [..., n] as [..., num_tiles, tile], false beyond its end."""
    return F.pad(x, (0, num_tiles * _FLEX_TILE - x.shape[-1])).unflatten(-1, (num_tiles, _FLEX_TILE))


def _listed(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """Return, for bool [B, rows, tiles], how many of each row are true and their indices first, as flex lists them.

    Contiguous: its compiled kernels take the strides for granted.
    """
    tiles = tiles[:, None].to(torch.int32).contiguous()
    return tiles.sum(dim=-1, dtype=torch.int32), tiles.argsort(dim=-1, descending=True, stable=True).to(torch.int32)


def served_mask(num_context: int, num_slots: int, rule: AttentionRule, device: torch.device) -> Tensor | None:
    """Return what a served block sees, bool [1, 1, Q, C + Q]; None if that is everything.

    It stands after a context of `num_context` positions, none of them another document's.
    """
    if rule == AttentionRule():
        return None
    start = torch.full((1, 1), num_context, device=device)
    return dense_mask(Blocks(start, torch.ones_like(start, dtype=torch.bool), None, num_context, num_slots), rule)


def default_backend(device: torch.device) -> str:
    """Return the attention backend that training takes on a device unless told otherwise."""
    return "flex_attention" if device.type == "cuda" else "sdpa"


@functools.cache
def _compiled_flex() -> Callable[..., Tensor]:
    return torch.compile(flex_attention)


def choose_flex_tiles(name: str) -> None:
    """Let flex attention's backward kernels on a GPU, of all drafts in this process, use one of `FLEX_TILES`."""
    global _chosen_tiles
    assert name in FLEX_TILES
    _chosen_tiles = name


def _attend_flex(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Tensor:
    enable_gqa = q.shape[1] != k.shape[1]
    tiles = None if q.is_cpu else _BACKWARD_TILES[_chosen_tiles]
    if torch.compiler.is_compiling():
        return flex_attention(q, k, v, block_mask=mask, enable_gqa=enable_gqa, kernel_options=tiles)
    if not q.is_cpu:
        return _compiled_flex()(q, k, v, block_mask=mask, enable_gqa=enable_gqa, kernel_options=tiles)
    with warnings.catch_warnings():
        # Uncompiled, it holds all scores; on a CPU, where it has no backward, that is wanted: no compiler is needed.
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
        return flex_attention(q, k, v, block_mask=mask, enable_gqa=enable_gqa)


def _attend_eager(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = (q @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(dim=-1).to(v.dtype) @ v


def _attend_sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    groups = q.shape[1] // k.shape[1]
    if groups > 1 and mask is not None and not q.is_cpu:
        # A GPU's fused kernels take grouped heads or a mask, not both, and the plain one holds all scores.
        k, v, groups = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1), 1
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=groups > 1)


@torch.compiler.disable  # tiles change from step to step
def _attend_tiled(q: Tensor, k: Tensor, v: Tensor, mask: TiledMask) -> Tensor:
    sizes = [tile.num_queries for tile in mask.tiles]
    context_k, *own_k = k.split([mask.seq_len, *sizes], dim=2)
    context_v, *own_v = v.split([mask.seq_len, *sizes], dim=2)
    attended = [
        _attend_sdpa(
            tile_q,
            torch.cat((context_k[:, :, tile.context], tile_k), dim=2),
            torch.cat((context_v[:, :, tile.context], tile_v), dim=2),
            tile.mask,
        )
        for tile, tile_q, tile_k, tile_v in zip(mask.tiles, q.split(sizes, dim=2), own_k, own_v, strict=True)
    ]
    return torch.cat(attended, dim=2)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask, backend: str) -> Tensor:
    """Return attention [B, heads, Q, head_dim] of q over k, v [B, kv heads, keys, head_dim].

    A `BlockMask` always runs flex attention and a `TiledMask` sdpa. Without them, "flex_attention" means `sdpa`:
    there is nothing to skip.
    """
    if isinstance(mask, BlockMask):
        return _attend_flex(q, k, v, mask)
    if isinstance(mask, TiledMask):
        return _attend_tiled(q, k, v, mask)
    return (_attend_eager if backend == "eager" else _attend_sdpa)(q, k, v, mask)
