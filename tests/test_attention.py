"""What a block may see, materialised for each backend and compared with brute force."""

import pytest
import torch
from reference import visible_by_brute_force
from tiny import TinyBatch, pack, tiny_batch, tiny_draft_config
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.nn.attention.flex_attention import create_block_mask, create_mask

from dflash_offline.stages import attention
from dflash_offline.stages.anchors import sample_document_anchors
from dflash_offline.stages.attention import dense_mask, flex_mask
from dflash_offline.stages.drafter import attend


def cases() -> dict[str, TinyBatch]:
    padded = tiny_batch(tiny_draft_config(), [14, 6, 3])
    return {"padded": padded, "packed": pack(padded, padding=4), "single": tiny_batch(tiny_draft_config(), [40])}


def drawn(batch: TinyBatch) -> tuple[Tensor, Tensor]:
    return sample_document_anchors(batch.loss_mask, batch.document_ids, 4, 5, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["padded", "packed", "single"])
def test_every_backends_mask_equals_brute_force(name: str) -> None:
    batch = cases()[name]
    anchors, keep = drawn(batch)
    seq_len = batch.input_ids.shape[1]
    expected = visible_by_brute_force(anchors.tolist(), keep.tolist(), batch.document_ids.tolist(), 4)
    assert torch.equal(dense_mask(anchors, keep, batch.document_ids, seq_len, 4), expected)
    flex = flex_mask(anchors, keep, batch.document_ids, seq_len, 4)
    assert torch.equal(create_mask(flex.mask_mod, len(anchors), 1, *expected.shape[-2:], device="cpu"), expected)
    if name == "padded":  # one document a row: saying so changes nothing
        assert torch.equal(dense_mask(anchors, keep, None, seq_len, 4), expected)


def test_flex_block_mask_covers_every_visible_pair() -> None:
    batch = tiny_batch(tiny_draft_config(), [300, 150])
    anchors, keep = sample_document_anchors(batch.loss_mask, batch.document_ids, 4, 70)
    dense = dense_mask(anchors, keep, batch.document_ids, 300, 4)
    flex = flex_mask(anchors, keep, batch.document_ids, 300, 4)
    tiles = flex.to_dense().bool()
    padded = torch.zeros(2, 1, tiles.shape[2] * 128, tiles.shape[3] * 128, dtype=torch.bool)
    padded[:, :, : dense.shape[2], : dense.shape[3]] = dense
    wanted = padded.unflatten(2, (-1, 128)).unflatten(4, (-1, 128)).any(dim=5).any(dim=3)
    assert torch.equal(tiles, wanted)


@pytest.mark.parametrize("name", ["padded", "packed", "single"])
def test_every_query_sees_something_even_of_a_block_that_is_not_kept(name: str) -> None:
    batch = cases()[name]
    anchors, keep = drawn(batch)
    mask = dense_mask(anchors, torch.zeros_like(keep), batch.document_ids, batch.input_ids.shape[1], 4)
    assert bool((mask.sum(dim=-1) == 4).all())


@pytest.mark.parametrize("kv_heads", [1, 4])
def test_flex_attention_equals_sdpa_and_eager(kv_heads: int) -> None:
    batch = cases()["packed"]
    anchors, keep = drawn(batch)
    seq_len, generator = batch.input_ids.shape[1], torch.Generator().manual_seed(0)
    num_queries = anchors.shape[1] * 4
    q = torch.randn(1, 4, num_queries, 16, generator=generator)
    k, v = torch.randn(2, 1, kv_heads, seq_len + num_queries, 16, generator=generator)
    dense = dense_mask(anchors, keep, batch.document_ids, seq_len, 4)
    sdpa = attend(q, k, v, dense, "sdpa")
    flex = attend(q, k, v, flex_mask(anchors, keep, batch.document_ids, seq_len, 4), "flex_attention")
    torch.testing.assert_close(flex, sdpa, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(attend(q, k, v, dense, "eager"), sdpa, atol=2e-6, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own, while it traces
def test_compiled_block_mask_is_not_made_anew_for_every_row_length(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = CompileCounter()
    monkeypatch.setattr(attention, "create_block_mask", torch.compile(create_block_mask, backend=compiled))
    for seq_len in range(300, 310):
        anchors, keep = torch.zeros(2, 4, dtype=torch.long), torch.ones(2, 4, dtype=torch.bool)
        documents = torch.zeros(2, seq_len, dtype=torch.long)
        flex_mask(anchors, keep, documents, seq_len, 4)
    assert compiled.frame_count <= 2  # one for the first length, one for all others
