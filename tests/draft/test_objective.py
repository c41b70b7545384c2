"""The objective: chunked cross-entropy against full logits, weights and prefixes against loops."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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


class FormedTensors(TorchDispatchMode):
    """Notes the shape of every tensor that takes memory of its own, inside autograd functions too."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = func(*args, **(kwargs or {}))
        held = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        formed = [x for x in tree_leaves(given) if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in held]
        self.shapes += [tuple(x.shape) for x in formed]
        return given


def test_head_cross_entropy_never_forms_the_logits_of_more_slots_than_a_chunk() -> None:
    hidden, labels, head = problem(slots=50)
    with FormedTensors() as formed:
        ce, _ = head_cross_entropy(hidden, labels, head, 4)
        ce.sum().backward()
    rows = [shape[0] for shape in formed.shapes if len(shape) == 2 and shape[1] == 20]
    assert max(rows) == 4
    most = max(math.prod(shape) for shape in formed.shapes)
    assert most == 50 * 8, "nothing is larger than the slots' hidden states"


def test_head_cross_entropy_without_gradients_forms_none() -> None:
    hidden, labels, head = problem()
    with torch.no_grad(), FormedTensors() as formed:
        ce, _ = head_cross_entropy(hidden, labels, head, 4)
    assert not ce.requires_grad
    assert all(shape[-1:] != (8,) for shape in formed.shapes), "no slot's gradient is formed"
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
