"""Simulated serving against plain drafting, a block at a time, and its arithmetic on cases worked by hand."""

import numpy as np
import pytest
import torch
from tiny import tiny_draft_config
from torch import Tensor

from dflash_offline.stages.draft.model import DraftModel
from dflash_offline.stages.trainer import DFlashTrainerModule
from dflash_offline.stages.training.loader import Batch
from dflash_offline.stages.training.simulated_serving import (
    ServingSums,
    accepted_prefixes,
    simulate_serving,
    simulate_turn,
    turns,
)


def test_a_turn_is_a_supervised_run_up_to_its_end_token() -> None:
    mask = np.array([0, 1, 1, 0, 0, 1], np.bool_)
    assert turns(mask) == [(1, 2), (5, 5)]


def test_each_round_gives_its_prefix_and_one_token_and_stops_at_the_end() -> None:
    prefix = np.array([0, 3, 0, 0, 0, 0, 7, 0, 0, 0])
    # from 1: 3 right and one more to 5; from 5: none right, one to 6; from 6: 7 right, but the turn ends at 9
    assert simulate_turn(1, 9, prefix) == [4, 1, 3]
    assert simulate_turn(4, 4, prefix) == []


def test_pooled_and_mean_of_samples_differ_and_are_both_given() -> None:
    sums = ServingSums()
    sums.add([[4, 4], [1]])
    sums.add([[1]])
    sums.add([[]])
    assert (sums.tokens, sums.rounds, sums.samples) == (10, 4, 2)
    assert sums.pooled == 2.5 and sums.mean_of_samples == 2.0


def _module_and_batch() -> tuple[DFlashTrainerModule, Batch]:
    torch.manual_seed(0)
    config = tiny_draft_config()
    table = torch.nn.Embedding(config.vocab_size, config.hidden_size)
    head = torch.nn.Linear(config.hidden_size, config.vocab_size, bias=False)
    draft = DraftModel(config)
    module = DFlashTrainerModule(
        draft, head, table, config.mask_token_id, block_size=config.block_size, attention_backend="sdpa"
    )
    num_rows, seq_len, lengths = 2, 23, torch.tensor([23, 17])
    document_ids = torch.where(torch.arange(seq_len) < lengths[:, None], 0, -1)
    mask = (torch.rand(num_rows, seq_len) < 0.8) & (document_ids >= 0)
    width = len(config.target_layer_ids) * config.hidden_size
    batch = Batch(
        samples=[0, 1],
        spans=[(0, 0, 23), (1, 0, 17)],
        input_ids=torch.randint(0, config.vocab_size, (num_rows, seq_len)),
        hidden_states=torch.randn(num_rows, seq_len, width).to(torch.bfloat16),
        loss_mask=mask,
        document_ids=document_ids,
        anchors=torch.zeros(num_rows, 1, dtype=torch.int64),
        keep_mask=torch.ones(num_rows, 1, dtype=torch.bool),
    )
    return module, batch


@torch.no_grad()
def _slow_prefix(module: DFlashTrainerModule, batch: Batch, row: int, anchor: int) -> int:
    """Draft one block as serving does and count the leading slots that equal the text."""
    draft, size = module.draft_model, module.block_size
    length = int((batch.document_ids[row] >= 0).sum())
    block = torch.full((1, size), module.mask_token_id)
    block[0, 0] = batch.input_ids[row, anchor]
    hidden = draft(
        position_ids=torch.arange(anchor + size)[None],
        noise_embedding=module.target_embed_tokens(block),
        target_hidden=batch.hidden_states[row : row + 1, :anchor].float(),
    )
    drafted = module.target_lm_head(hidden[0, 1:]).argmax(dim=-1).tolist()
    text = batch.input_ids[row, anchor + 1 : length].tolist()
    count = 0
    while count < min(len(text), size - 1) and drafted[count] == text[count]:
        count += 1
    return count


def test_prefixes_equal_drafting_one_block_at_a_time() -> None:
    module, batch = _module_and_batch()
    # Make some drafts right: write each supervised anchor's own first drafted tokens into the text of row 0.
    anchors = torch.arange(6, 7)[None].expand(2, 1)
    drafted = module.draft_tokens(batch.input_ids, batch.hidden_states, batch.document_ids, anchors, anchors > 0)
    batch.input_ids[:, 7:10] = drafted[:, 0, :3]
    batch.loss_mask[:, 6] = True
    prefixes = accepted_prefixes(module, batch, anchors_at_once=5)
    assert prefixes.max() >= 3
    for row in range(2):
        for anchor in batch.loss_mask[row].nonzero()[:, 0].tolist():
            if anchor:
                assert prefixes[row, anchor] == _slow_prefix(module, batch, row, anchor)
        assert (prefixes[row][~batch.loss_mask[row].numpy()] == 0).all()
    produced = [sum(map(sum, turns)) for turns in simulate_serving(module, batch)]
    expected = [sum(last - first for first, last in turns(mask.numpy())) for mask in batch.loss_mask]
    assert produced == expected


def test_a_compiled_draft_is_asked_for_equally_many_anchors_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    module, batch = _module_and_batch()
    expected, draft_tokens, asked = accepted_prefixes(module, batch, anchors_at_once=5), module.draft_tokens, []

    def note(*arguments: Tensor) -> Tensor:
        asked.append(arguments[3].shape)
        return draft_tokens(*arguments)

    monkeypatch.setattr(module, "draft_tokens", note)
    monkeypatch.setattr(module, "compiled", True)
    assert int(batch.loss_mask.sum(dim=1).max()) % 5
    np.testing.assert_array_equal(accepted_prefixes(module, batch, anchors_at_once=5), expected)
    assert len(asked) > 1 and set(asked) == {(2, 5)}
