"""The target's own states as they reach the objective: before each label, padded or packed."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import TinyBatch, pack, tiny_batch, tiny_draft_config, tiny_trainer
from torch import Tensor

from dflash_offline.schemas.errors import DflashError
from dflash_offline.stages.draft.variants.variant import Slots, SlotTerms
from dflash_offline.stages.trainer import DFlashTrainerModule

LENGTHS = [14, 9, 20]


def told_by_place(batch: TinyBatch, width: int) -> Tensor:
    """Return states that say where they stand: the token there, and the one after it in its document."""
    following = batch.input_ids.roll(-1, dims=1)
    return torch.stack((batch.input_ids, following), dim=-1).float().repeat(1, 1, width // 2)


def slots_of_a_step(trainer: DFlashTrainerModule, batch: TinyBatch, final: Tensor | None) -> Slots:
    found: list[Slots] = []
    computes = trainer._computes

    def terms(draft: Any, slots: Slots, *given: Any) -> SlotTerms:
        found.append(slots)
        return computes.terms(draft, slots, *given)

    trainer._computes = SimpleNamespace(terms=terms)
    trainer(
        batch.input_ids,
        batch.hidden_states,
        batch.loss_mask,
        document_ids=batch.document_ids,
        generator=torch.Generator().manual_seed(0),
        final=final,
    )
    return found[0]


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_a_slots_teacher_is_the_state_before_its_label(packed: bool) -> None:
    config = tiny_draft_config()
    batch = tiny_batch(config, LENGTHS)
    batch = pack(batch, padding=3) if packed else batch
    slots = slots_of_a_step(tiny_trainer(), batch, told_by_place(batch, config.hidden_size))
    assert slots.teacher is not None and len(slots.labels) > 30
    states = slots.teacher()
    assert states.shape == slots.hidden.shape
    assert torch.equal(states[:, 0].long(), slots.previous()), "the state of the token before the label"
    assert torch.equal(states[:, 1].long(), slots.labels), "which the label follows"


def test_a_batch_without_states_has_no_teacher_and_one_of_another_shape_is_refused() -> None:
    batch = tiny_batch(tiny_draft_config(), LENGTHS)
    assert slots_of_a_step(tiny_trainer(), batch, None).teacher is None
    with pytest.raises(DflashError, match=r"final is \[3, 19, 32\]; expected \[3, 20, 32\]"):
        slots_of_a_step(tiny_trainer(), batch, torch.zeros(3, 19, 32))
