"""The objective: chunked cross-entropy against full logits, weights and prefixes against loops."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dflash_offline.stages.draft import objective
from dflash_offline.stages.draft.objective import (
    accepted_prefix,
    dpace_weights,
    head_cross_entropy,
    slot_weights,
    supervised_slots,
)


def problem(bias: bool = False, slots: int = 13) -> tuple[Tensor, Tensor, nn.Linear]:
    generator = torch.Generator().manual_seed(0)
    head = nn.Linear(8, 20, bias=bias).requires_grad_(False)
    hidden = torch.randn(slots, 8, generator=generator).requires_grad_()
    return hidden, torch.randint(20, (slots,), generator=generator), head


def test_slot_weights_decay_from_one() -> None:
    assert slot_weights(5, 2.0).tolist() == pytest.approx([math.exp(-k / 2) for k in range(4)])
    assert slot_weights(5, None).tolist() == [1.0] * 4


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("chunk", [1, 5, 13, 1000])
def test_head_cross_entropy_and_its_gradient_equal_full_logits(bias: bool, chunk: int) -> None:
    hidden, labels, head = problem(bias)
    upstream = torch.randn(len(labels), generator=torch.Generator().manual_seed(1))
    ce, correct = head_cross_entropy(hidden, labels, head, chunk)
    (grad,) = torch.autograd.grad((ce * upstream).sum(), hidden)
    logits = head(hidden)
    expected = F.cross_entropy(logits, labels, reduction="none")
    (expected_grad,) = torch.autograd.grad((expected * upstream).sum(), hidden)
    torch.testing.assert_close(ce, expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(grad, expected_grad, atol=1e-6, rtol=1e-5)
    assert torch.equal(correct, logits.argmax(-1) == labels)


def test_head_cross_entropy_leaves_the_head_without_a_gradient_and_stores_no_logits() -> None:
    hidden, labels, head = problem()
    head.requires_grad_(True)
    stored: list[tuple[int, ...]] = []

    def note(x: Tensor) -> Tensor:
        stored.append(tuple(x.shape))
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        ce, _ = head_cross_entropy(hidden, labels, head, 4)
        ce.sum().backward()
    assert head.weight.grad is None
    assert (13, 8) in stored and all(20 not in shape for shape in stored)


def test_head_cross_entropy_without_gradients_forms_none(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, labels, head = problem()
    chunk_loss, formed = objective._chunk_loss, []

    def note(*arguments: Any) -> Any:
        formed.append(chunk_loss(*arguments))
        return formed[-1]

    monkeypatch.setattr(objective, "_chunk_loss", note)
    with torch.no_grad():
        ce, _ = head_cross_entropy(hidden, labels, head, 4)
    assert not ce.requires_grad and [grad for *_, grad in formed] == [None] * 4
    torch.testing.assert_close(ce, F.cross_entropy(head(hidden), labels, reduction="none").detach())


def test_head_cross_entropy_of_no_slot_is_empty_and_differentiable() -> None:
    hidden, labels, head = problem(slots=0)
    ce, correct = head_cross_entropy(hidden, labels, head, 4)
    assert ce.shape == correct.shape == (0,)
    ce.sum().backward()
    assert hidden.grad is not None and hidden.grad.shape == (0, 8)


def test_head_cross_entropy_projects_in_bfloat16_under_autocast_with_a_float32_softmax() -> None:
    hidden, labels, head = problem()
    with torch.autocast("cpu", torch.bfloat16):
        ce, _ = head_cross_entropy(hidden, labels, head, 4)
        logits = F.linear(hidden, head.weight)
    assert logits.dtype == torch.bfloat16 and ce.dtype == torch.float32
    expected = F.cross_entropy(logits.float(), labels, reduction="none")
    torch.testing.assert_close(ce, expected, atol=1e-6, rtol=1e-6)
    (grad,) = torch.autograd.grad(ce.sum(), hidden)
    (expected_grad,) = torch.autograd.grad(expected.sum(), hidden)
    assert grad.dtype == torch.float32
    torch.testing.assert_close(grad, expected_grad, atol=2e-2, rtol=2e-2)


def test_head_cross_entropy_uses_a_bfloat16_head_for_float32_hidden_states() -> None:
    hidden, labels, head = problem()
    ce, _ = head_cross_entropy(hidden, labels, head.to(torch.bfloat16), 4)
    ce.sum().backward()
    assert ce.dtype == torch.float32
    assert hidden.grad is not None and hidden.grad.dtype == torch.float32


def test_accepted_prefix_skips_slots_that_are_not_supervised() -> None:
    correct = torch.tensor([[[1, 1, 0, 1], [0, 1, 1, 1], [1, 1, 1, 1], [0, 1, 0, 1]]]).bool()
    supervised = torch.tensor([[[1, 1, 1, 1], [0, 1, 1, 0], [0, 0, 0, 0], [0, 1, 1, 1]]]).bool()
    assert accepted_prefix(correct, supervised).tolist() == [[2, 2, 0, 1]]


def test_dpace_weights_equal_the_formula_on_a_full_block() -> None:
    p = torch.tensor([[[0.9, 0.2, 0.6]]])
    q = [0.5 * x + 0.5 for x in (0.9, 0.2, 0.6)]
    products = [q[0], q[0] * q[1], q[0] * q[1] * q[2]]
    weights = dpace_weights(p, torch.ones(1, 1, 3, dtype=torch.bool), 0.5)
    assert weights[0, 0].tolist() == pytest.approx([sum(products), sum(products[1:]), products[2]])


def test_dpace_weights_pass_over_a_slot_that_is_not_supervised() -> None:
    full = dpace_weights(torch.tensor([[[0.9, 0.6]]]), torch.ones(1, 1, 2, dtype=torch.bool), 0.5)
    gap = dpace_weights(torch.tensor([[[0.9, 0.1, 0.6]]]), torch.tensor([[[True, False, True]]]), 0.5)
    assert gap[0, 0].tolist() == pytest.approx([full[0, 0, 0].item(), 0.0, full[0, 0, 1].item()])


def test_supervised_slots_end_with_the_row_the_document_and_the_mask() -> None:
    anchors, keep = torch.tensor([[0, 2, 5, 0]]), torch.tensor([[True, True, True, False]])
    loss_mask = torch.tensor([[1, 1, 0, 1, 1, 1, 1]])
    documents = torch.tensor([[0, 0, 0, 0, 1, 1, 1]])
    position, supervised = supervised_slots(anchors, keep, loss_mask, documents, 4)
    assert supervised[0].tolist() == [[True, False, True], [True, False, False], [True, False, False], [False] * 3]
    assert position[0, :3].tolist() == [[1, 2, 3], [3, 4, 5], [6, 6, 6]]
    _, supervised = supervised_slots(anchors, keep, loss_mask, None, 4)
    assert supervised[0, 1].tolist() == [True, True, True]
