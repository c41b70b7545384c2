"""Simulated serving against plain drafting, a block at a time, and its arithmetic on cases worked by hand."""

from dataclasses import replace

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
    draft_everywhere,
    simulate_serving,
    simulate_turn,
    turns,
)
from dflash_offline.stages.training.sums import sums_of


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
def _slow_draft(module: DFlashTrainerModule, batch: Batch, row: int, anchor: int) -> list[int]:
    """Draft one block as serving does."""
    draft, size = module.draft_model, module.block_size
    block = torch.full((1, size), module.mask_token_id)
    block[0, 0] = batch.input_ids[row, anchor]
    hidden = draft(
        position_ids=torch.arange(anchor + size)[None],
        noise_embedding=module.target_embed_tokens(block),
        target_hidden=batch.hidden_states[row : row + 1, :anchor].float(),
    )
    return module.target_lm_head(hidden[0, 1:]).argmax(dim=-1).tolist()


def _slow_prefix(module: DFlashTrainerModule, batch: Batch, row: int, anchor: int) -> int:
    """Draft one block as serving does and count the leading slots that equal the text."""
    size, drafted = module.block_size, _slow_draft(module, batch, row, anchor)
    length = int((batch.document_ids[row] >= 0).sum())
    text = batch.input_ids[row, anchor + 1 : length].tolist()
    count = 0
    while count < min(len(text), size - 1) and drafted[count] == text[count]:
        count += 1
    return count


def test_prefixes_equal_drafting_one_block_at_a_time() -> None:
    module, batch = _module_and_batch()
    # Make some drafts right: write each supervised anchor's own first drafted tokens into the text of row 0.
    for row in range(2):
        batch.input_ids[row, 7:10] = torch.tensor(_slow_draft(module, batch, row, 6)[:3])
    batch.loss_mask[:, 6] = True
    (prefixes,) = draft_everywhere(module, batch, anchors_at_once=5).prefix
    assert prefixes.max() >= 3
    for row in range(2):
        for anchor in batch.loss_mask[row].nonzero()[:, 0].tolist():
            if anchor:
                assert prefixes[row, anchor] == _slow_prefix(module, batch, row, anchor)
        assert (prefixes[row][~batch.loss_mask[row].numpy()] == 0).all()
    (documents,) = simulate_serving(module, batch).walks
    produced = [sum(map(sum, turns)) for turns in documents]
    expected = [sum(last - first for first, last in turns(mask.numpy())) for mask in batch.loss_mask]
    assert produced == expected


def test_a_compiled_draft_is_asked_for_equally_many_anchors_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    module, batch = _module_and_batch()
    expected, serve, asked = draft_everywhere(module, batch, anchors_at_once=5).prefix, module.serve, []

    def note(*arguments: Tensor) -> object:
        asked.append(arguments[4].shape)
        with monkeypatch.context() as here:
            here.setattr(module, "compiled", False)  # nothing need be compiled for it
            return serve(*arguments)

    monkeypatch.setattr(module, "serve", note)
    monkeypatch.setattr(module, "compiled", True)
    assert int(batch.loss_mask.sum(dim=1).max()) % 5
    np.testing.assert_array_equal(draft_everywhere(module, batch, anchors_at_once=5)[0], expected)
    assert len(asked) > 1 and set(asked) == {(2, 5)}


@pytest.mark.parametrize("loss_type", ["dflash", "dpace"])
@pytest.mark.parametrize("num_kept", [0, 1, 6])
def test_the_sums_are_those_of_a_forward_pass_and_the_context_is_projected_once(num_kept: int, loss_type: str) -> None:
    module, batch = _module_and_batch()
    module.loss_type, projected = loss_type, []
    positions = [row.nonzero()[:, 0][torch.tensor([0, 2, 3, 7, 8, 11])] for row in batch.loss_mask]
    batch = replace(batch, anchors=torch.stack(positions), keep_mask=(torch.arange(6) < num_kept).expand(2, 6))
    with torch.no_grad():
        wanted = module(
            batch.input_ids,
            batch.hidden_states,
            batch.loss_mask,
            document_ids=batch.document_ids,
            anchors=batch.anchors,
            keep_mask=batch.keep_mask,
        )
    module.draft_model.fc.register_forward_hook(lambda *_: projected.append(1))
    for at_once in (3, 100):
        sums = draft_everywhere(module, batch, anchors_at_once=at_once).sums
        torch.testing.assert_close(sums, sums_of(wanted), rtol=1e-5, atol=1e-9)
    assert len(projected) == 2
