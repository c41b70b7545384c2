"""Anchors: which positions are candidates, and draws that depend on nothing but their key."""

import numpy as np
import pytest
import torch
from tiny import pack, tiny_batch, tiny_draft_config, tiny_trainer

from dflash_offline.schemas.draft.anchor_rule import AnchorRule
from dflash_offline.schemas.errors import NoValidAnchorsError
from dflash_offline.schemas.samples import count_anchors, document_anchors
from dflash_offline.stages.draft.anchors import (
    collate_anchors,
    document_candidates,
    document_starts,
    draw_anchors,
    sample_anchors,
    sample_document_anchors,
)

PARTIAL = AnchorRule(4, "partial")


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_mask(length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random(length) < 0.6


@pytest.mark.parametrize("length", [0, 1, 3, 4, 5, 30])
def test_document_anchors_have_a_whole_block_after_them(length: int) -> None:
    mask = random_mask(length)
    expected = [i for i in range(length) if mask[i] and i + 3 <= length - 1]
    assert document_anchors(mask, AnchorRule(4)).tolist() == expected
    assert count_anchors(mask, AnchorRule(4)) == len(expected)


@pytest.mark.parametrize("tokens", [2, 4, 9])
@pytest.mark.parametrize("length", [0, 1, 2, 3, 4, 5, 30])
def test_a_partial_block_needs_one_supervised_token_behind_its_anchor(length: int, tokens: int) -> None:
    rule = AnchorRule(tokens, "partial")
    for seed in range(5):
        mask = random_mask(length, seed)
        expected = [
            i for i in range(length) if mask[i] and any(mask[j] for j in range(i + 1, length) if j < i + tokens)
        ]
        assert document_anchors(mask, rule).tolist() == expected
        assert count_anchors(mask, rule) == len(expected)


def test_draw_anchors_is_ascending_without_repetition_and_from_the_candidates() -> None:
    mask = random_mask(200)
    drawn = draw_anchors(mask, AnchorRule(8), 32, seed=1, epoch=2, sample_id=3)
    assert drawn.dtype == np.int64 and len(drawn) == 32
    assert (np.diff(drawn) > 0).all()
    assert set(drawn) <= set(document_anchors(mask, AnchorRule(8)))


def test_draw_anchors_depends_on_seed_epoch_and_sample_only() -> None:
    mask = random_mask(200)
    keys = [(1, 2, 3), (2, 2, 3), (1, 3, 3), (1, 2, 4), (2, 1, 3), (3, 2, 1)]
    draws = {key: tuple(draw_anchors(mask, AnchorRule(8), 32, *key)) for key in keys}
    assert len(set(draws.values())) == len(keys)
    for key in reversed(keys):
        assert tuple(draw_anchors(mask, AnchorRule(8), 32, *key)) == draws[key]


def test_draw_anchors_is_pinned_so_that_a_resumed_run_draws_the_same() -> None:
    assert draw_anchors(np.ones(50, bool), AnchorRule(8), 5, seed=7, epoch=1, sample_id=11).tolist() == [
        10,
        15,
        20,
        27,
        28,
    ]


def test_draw_anchors_draws_each_candidate_alike() -> None:
    counts = np.zeros(12)
    for epoch in range(3000):
        counts[draw_anchors(np.ones(15, bool), AnchorRule(4), 3, seed=0, epoch=epoch, sample_id=0)] += 1
    assert counts.sum() == 9000
    assert abs(counts - 750).max() < 6 * np.sqrt(750)


def test_draw_anchors_returns_all_candidates_when_there_are_few() -> None:
    mask = random_mask(12)
    assert draw_anchors(mask, AnchorRule(4), 512, 0, 0, 0).tolist() == document_anchors(mask, AnchorRule(4)).tolist()
    assert len(draw_anchors(np.ones(3, bool), AnchorRule(4), 512, 0, 0, 0)) == 0


def test_collate_anchors_shifts_documents_and_marks_what_is_kept() -> None:
    a, b, none = np.array([0, 5]), np.array([1]), np.array([], np.int64)
    anchors, keep = collate_anchors([[a, none, b], [none], [b]], [[0, 10, 20], [0], [7]])
    assert anchors.tolist() == [[0, 5, 21], [0, 0, 0], [8, 0, 0]]
    assert keep.tolist() == [[True] * 3, [False] * 3, [True, False, False]]
    assert anchors.dtype == torch.int64


def test_sample_anchors_follows_the_rand_and_sort_procedure() -> None:
    batch = tiny_batch(tiny_draft_config(), [30, 12, 4], seq_len=30)
    anchors, keep = sample_anchors(batch.loss_mask, 30, AnchorRule(4), 9, torch.Generator().manual_seed(5))
    rand = torch.rand(3, 27, generator=torch.Generator().manual_seed(5))
    for b in range(3):
        candidates = [i for i in range(27) if batch.loss_mask[b, i] == 1]
        chosen = sorted(sorted(candidates, key=lambda i: rand[b, i].item())[:9])
        assert anchors[b].tolist() == chosen + [0] * (9 - len(chosen))
        assert keep[b].tolist() == [j < len(chosen) for j in range(9)]


def test_sample_anchors_takes_no_more_than_the_fullest_row_has() -> None:
    mask = torch.zeros(2, 20)
    mask[0, [3, 9]] = 1
    mask[1, [2, 4, 16, 17]] = 1  # 17 has no whole block after it
    anchors, keep = sample_anchors(mask, 20, AnchorRule(4), 512)
    assert anchors.tolist() == [[3, 9, 0], [2, 4, 16]]
    assert keep.tolist() == [[True, True, False], [True, True, True]]


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_trainer_samples_anchors_from_any_mask_dtype(dtype: torch.dtype) -> None:
    trainer = tiny_trainer(num_anchors=3)
    anchors, keep = trainer._sample_anchor_positions(10, torch.ones(2, 10).to(dtype), torch.device("cpu"))
    assert anchors.shape == keep.shape == (2, 3)
    assert int(anchors.max()) <= 6 and bool(keep.all())


def test_no_valid_anchors_says_what_was_looked_for() -> None:
    mask = torch.zeros(2, 9)
    mask[:, 6:] = 1
    for sample in (
        lambda: sample_anchors(mask, 9, AnchorRule(4), 8),
        lambda: sample_document_anchors(mask, torch.zeros(2, 9, dtype=torch.long), AnchorRule(4), 8),
    ):
        with pytest.raises(NoValidAnchorsError, match=r"supervised position with a whole block after it.*S = 9.*K = 4"):
            sample()


def test_row_shorter_than_a_block_may_anchor_only_at_zero_by_the_bare_rule_and_nowhere_by_the_document_rule() -> None:
    mask, ids = torch.ones(1, 3), torch.zeros(1, 3, dtype=torch.long)
    assert sample_anchors(mask, 3, AnchorRule(4), 8)[0].tolist() == [[0]]
    with pytest.raises(NoValidAnchorsError):
        sample_document_anchors(mask, ids, AnchorRule(4), 8)


def test_document_candidates_of_a_packed_row_are_those_of_each_document() -> None:
    batch = tiny_batch(tiny_draft_config(), [11, 3, 4, 17])
    packed = pack(batch, padding=6)
    found = document_candidates(packed.loss_mask, packed.document_ids, AnchorRule(4))[0].nonzero()[:, 0].tolist()
    expected, start = [], 0
    for row, length in zip(batch.loss_mask, [11, 3, 4, 17], strict=True):
        expected += (document_anchors(row[:length].bool().numpy(), AnchorRule(4)) + start).tolist()
        start += length
    assert found == expected
    assert document_starts(packed.document_ids)[0].tolist() == [0] * 11 + [11] * 3 + [14] * 4 + [18] * 17 + [35] * 6


@pytest.mark.parametrize("tokens", [2, 4, 40])
def test_partial_candidates_of_a_packed_row_do_not_look_into_the_next_document(tokens: int) -> None:
    lengths, rule = [11, 2, 1, 4, 17], AnchorRule(tokens, "partial")
    batch = tiny_batch(tiny_draft_config(), lengths)
    packed = pack(batch, padding=6)
    found = document_candidates(packed.loss_mask, packed.document_ids, rule)[0].nonzero()[:, 0].tolist()
    starts = np.cumsum([0, *lengths[:-1]]).tolist()
    rows = zip(batch.loss_mask, lengths, starts, strict=True)
    each = [(document_anchors(row[:length].bool().numpy(), rule) + start).tolist() for row, length, start in rows]
    assert found == [anchor for one in each for anchor in one]
    padded = document_candidates(batch.loss_mask, batch.document_ids, rule)
    assert padded.sum(dim=1).tolist() == [len(one) for one in each]


def test_partial_blocks_of_a_bare_batch_are_drawn_up_to_the_rows_last_pair() -> None:
    mask = torch.zeros(2, 20)
    mask[0, [3, 9, 10]] = 1
    mask[1, [2, 4, 16, 18, 19]] = 1
    anchors, keep = sample_anchors(mask, 20, PARTIAL, 512)
    assert anchors.tolist() == [[9, 0, 0], [2, 16, 18]]
    assert keep.tolist() == [[True, False, False], [True, True, True]]
    with pytest.raises(NoValidAnchorsError, match=r"a supervised token among the 3 after it.*another near behind it"):
        sample_anchors(mask[:1, :9], 9, PARTIAL, 8)


def test_sample_document_anchors_counts_per_document_and_ignores_padding() -> None:
    batch = pack(tiny_batch(tiny_draft_config(), [25, 3, 9, 30]), padding=5)
    anchors, keep = sample_document_anchors(
        batch.loss_mask, batch.document_ids, AnchorRule(4), 5, torch.Generator().manual_seed(0)
    )
    candidates = document_candidates(batch.loss_mask, batch.document_ids, AnchorRule(4))
    kept = anchors[keep]
    assert bool(candidates[0, kept].all()) and bool((kept.diff() > 0).all())
    per_document = batch.document_ids[0, kept].bincount(minlength=4).tolist()
    available = batch.document_ids[0, candidates[0]].bincount(minlength=4).tolist()
    assert per_document == [min(5, n) for n in available]
    again, _ = sample_document_anchors(
        batch.loss_mask, batch.document_ids, AnchorRule(4), 5, torch.Generator().manual_seed(1)
    )
    assert again.tolist() != anchors.tolist()


def test_sample_document_anchors_draws_each_candidate_alike() -> None:
    mask = torch.ones(400, 15)
    ids = torch.tensor([0] * 8 + [1] * 7).expand(400, 15)
    counts = torch.zeros(15)
    for seed in range(10):
        anchors, keep = sample_document_anchors(mask, ids, AnchorRule(4), 2, torch.Generator().manual_seed(seed))
        counts += anchors[keep].bincount(minlength=15)
    assert counts.sum() == 16_000
    first, second = counts[:5], counts[8:12]
    assert (first - 1600).abs().max() < 6 * 40 and (second - 2000).abs().max() < 6 * 45
