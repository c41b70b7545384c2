"""What a block may see, materialised for each backend and compared with brute force."""

from dataclasses import replace

import pytest
import torch
from reference import visible_by_brute_force
from tiny import ATTENTION, TinyBatch, pack, tiny_batch, tiny_draft_config
from torch import Tensor
from torch.nn.attention.flex_attention import create_mask

from dflash_offline.schemas.draft.anchor_rule import AnchorRule
from dflash_offline.schemas.draft.config import FULL, SLIDING, AttentionRule
from dflash_offline.stages.draft import attention
from dflash_offline.stages.draft.anchors import sample_document_anchors
from dflash_offline.stages.draft.attention import (
    Blocks,
    TiledMask,
    attend,
    dense_mask,
    flex_mask,
    served_mask,
    tiled_mask,
)


def cases() -> dict[str, TinyBatch]:
    padded = tiny_batch(tiny_draft_config(), [14, 6, 3])
    return {"padded": padded, "packed": pack(padded, padding=4), "single": tiny_batch(tiny_draft_config(), [40])}


def drawn(batch: TinyBatch, num_anchors: int = 5) -> Blocks:
    generator = torch.Generator().manual_seed(0)
    anchors, keep = sample_document_anchors(batch.loss_mask, batch.document_ids, AnchorRule(4), num_anchors, generator)
    return Blocks(anchors, keep, batch.document_ids, batch.input_ids.shape[1], 4)


def joined(mask: TiledMask) -> Tensor:
    """Return the tiles as one dense mask."""
    num_queries = sum(tile.num_queries for tile in mask.tiles)
    shape = (len(mask.tiles[0].mask), 1, num_queries, mask.seq_len + num_queries)
    whole, start = torch.zeros(shape, dtype=torch.bool), 0
    for tile in mask.tiles:
        queries = slice(start, start + tile.num_queries)
        num_context = tile.context.stop - tile.context.start
        whole[:, :, queries, tile.context] = tile.mask[..., :num_context]
        whole[:, :, queries, mask.seq_len :][..., queries] = tile.mask[..., num_context:]
        start = queries.stop
    return whole


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give tiny batches several tiles, the last of them not full."""
    monkeypatch.setattr(attention, "TILE_QUERIES", 11)


def test_tiles_hold_little_more_than_what_is_visible() -> None:
    blocks = drawn(pack(tiny_batch(tiny_draft_config(), [300, 150, 200])), num_anchors=40)
    for rule in (AttentionRule(), AttentionRule(60)):
        mask = tiled_mask(blocks, rule)
        assert len(mask.tiles) == 60
        pairs = sum(tile.mask.numel() for tile in mask.tiles)
        assert pairs < 1.6 * dense_mask(blocks, rule).sum()


RULES = [AttentionRule(), AttentionRule(causal=True), AttentionRule(6), AttentionRule(6, causal=True)]


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("name", ["padded", "packed", "single"])
def test_every_backends_mask_equals_brute_force(name: str, rule: AttentionRule) -> None:
    batch = cases()[name]
    blocks = drawn(batch)
    expected = visible_by_brute_force(
        blocks.anchors.tolist(), blocks.keep.tolist(), batch.document_ids.tolist(), 4, rule.window, rule.causal
    )
    assert torch.equal(dense_mask(blocks, rule), expected)
    flex = flex_mask(blocks, rule)
    assert torch.equal(create_mask(flex.mask_mod, len(expected), 1, *expected.shape[-2:], device="cpu"), expected)
    assert torch.equal(joined(tiled_mask(blocks, rule)), expected)
    if name == "padded":  # one document a row: saying so changes nothing
        assert torch.equal(dense_mask(replace(blocks, document_ids=None), rule), expected)
        assert torch.equal(joined(tiled_mask(replace(blocks, document_ids=None), rule)), expected)


@pytest.mark.parametrize("seed", range(30))
def test_flex_asks_of_every_pair_what_is_visible(seed: int) -> None:
    chance = torch.Generator().manual_seed(seed)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=chance))

    rows, seq_len, num, size = number(1, 4), number(1, 60), number(1, 9), number(2, 7)
    anchors = torch.randint(seq_len, (rows, num), generator=chance)  # in any order, some twice, some on padding
    keep = torch.rand(rows, num, generator=chance) < 0.7
    documents = (torch.rand(rows, seq_len, generator=chance) < 0.15).cumsum(dim=1)  # ids that need not begin at 0
    documents = torch.where(torch.arange(seq_len) < number(1, seq_len + 1), documents * number(1, 3), -1)
    blocks = Blocks(anchors, keep, None if seed % 5 == 0 else documents, seq_len, size)
    for rule in (*RULES, AttentionRule(1), AttentionRule(seq_len + size, causal=True)):
        dense, mask_mod = dense_mask(blocks, rule), flex_mask(blocks, rule).mask_mod
        assert torch.equal(create_mask(mask_mod, rows, 1, *dense.shape[-2:], device="cpu"), dense), rule


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("context", [0, 3, 20])
def test_served_mask_is_the_trained_one_of_a_block_after_its_context(rule: AttentionRule, context: int) -> None:
    trained = visible_by_brute_force([[context]], [[True]], [[0] * (context + 4)], 4, rule.window, rule.causal)
    expected = torch.cat((trained[..., :context], trained[..., context + 4 :]), dim=-1)
    served = served_mask(context, 4, rule, torch.device("cpu"))
    if served is None:
        assert rule == AttentionRule() and bool(expected.all())
    else:
        assert torch.equal(served, expected)


@pytest.mark.parametrize("name", ATTENTION)
def test_a_draft_has_one_rule_for_every_kind_of_layer(name: str) -> None:
    config = tiny_draft_config(**ATTENTION[name])
    assert list(config.attention_rules) == sorted(set(config.layer_types))
    by_layer = [config.attention_rules[kind] for kind in config.layer_types]
    assert (
        by_layer
        == {
            "full": [AttentionRule()] * 2,
            "causal": [AttentionRule(causal=True)] * 2,
            "sliding": [AttentionRule(5)] * 2,
            "causal sliding": [AttentionRule(5, causal=True)] * 2,
            "one sliding": [AttentionRule(), AttentionRule(4)],
            "one causal sliding": [AttentionRule(4, causal=True), AttentionRule()],
        }[name]
    )
    assert config.layer_types == tuple(FULL if rule.window is None else SLIDING for rule in by_layer)


@pytest.mark.parametrize("rule", [AttentionRule(), AttentionRule(40), AttentionRule(300, causal=True)], ids=str)
@pytest.mark.parametrize("lengths", [[300, 150], [512, 500]])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_flex_visits_every_tile_with_a_visible_pair_and_no_other(
    packed: bool, lengths: list[int], rule: AttentionRule
) -> None:
    batch = tiny_batch(tiny_draft_config(), lengths)
    blocks = drawn(pack(batch) if packed else batch, num_anchors=140)
    dense, flex = dense_mask(blocks, rule), flex_mask(blocks, rule)
    by_tile = in_tiles(dense)
    assert torch.equal(flex.to_dense().bool(), by_tile.any(dim=-1))
    assert flex.kv_indices.is_contiguous() and flex.full_kv_indices is not None and flex.full_kv_indices.is_contiguous()
    whole = as_tiles(flex.full_kv_num_blocks, flex.full_kv_indices)
    assert torch.equal(whole, by_tile.all(dim=-1))
    by_key = as_tiles(flex.q_num_blocks, flex.q_indices), as_tiles(flex.full_q_num_blocks, flex.full_q_indices)
    partly = by_tile.any(dim=-1) & ~whole
    assert torch.equal(by_key[0], partly.mT) and torch.equal(by_key[1], whole.mT)
    assert flex.q_indices is not None and flex.q_indices.is_contiguous()
    assert flex.full_q_indices is not None and flex.full_q_indices.is_contiguous()
    assert bool(whole.any()) == (rule != AttentionRule(40))


def in_tiles(dense: Tensor) -> Tensor:
    """Return bool [B, 1, query tiles, key tiles, pairs]; what pads the last tiles repeats the last query and key."""
    for dim in (2, 3):
        index = torch.arange(-(-dense.shape[dim] // 128) * 128).clamp(max=dense.shape[dim] - 1)
        dense = dense.index_select(dim, index)
    return dense.unflatten(2, (-1, 128)).unflatten(4, (-1, 128)).transpose(3, 4).flatten(-2)


def as_tiles(counts: Tensor, indices: Tensor) -> Tensor:
    """Return flex's list of tiles as bool [B, 1, query tiles, key tiles]."""
    listed = torch.arange(indices.shape[-1]) < counts[..., None]
    return torch.zeros_like(indices, dtype=torch.bool).scatter(-1, indices.long(), listed)


@pytest.mark.parametrize("name", ["padded", "packed", "single"])
def test_every_query_sees_something_even_of_a_block_that_is_not_kept(name: str) -> None:
    blocks = drawn(cases()[name])
    nothing_kept = replace(blocks, keep=torch.zeros_like(blocks.keep))
    assert bool((dense_mask(nothing_kept, AttentionRule(6)).sum(dim=-1) == 4).all())
    causal = dense_mask(nothing_kept, AttentionRule(causal=True)).sum(dim=-1)
    assert torch.equal(causal, (torch.arange(blocks.num_queries) % 4 + 1).expand_as(causal))


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_flex_attention_equals_sdpa_eager_and_tiles(kv_heads: int, rule: AttentionRule) -> None:
    blocks, generator = drawn(cases()["packed"]), torch.Generator().manual_seed(0)
    num_queries = blocks.num_queries
    q = torch.randn(1, 4, num_queries, 16, generator=generator)
    k, v = torch.randn(2, 1, kv_heads, blocks.seq_len + num_queries, 16, generator=generator)
    dense = dense_mask(blocks, rule)
    sdpa = attend(q, k, v, dense, "sdpa")
    flex = attend(q, k, v, flex_mask(blocks, rule), "flex_attention")
    torch.testing.assert_close(flex, sdpa, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(attend(q, k, v, dense, "eager"), sdpa, atol=2e-6, rtol=1e-5)
    tiled = attend(q, k, v, tiled_mask(blocks, rule), "sdpa")
    torch.testing.assert_close(tiled, sdpa, atol=2e-6, rtol=1e-5)
