"""The loss: cross-entropy of the supervised slots through the frozen head, weighted by slot, and its metrics."""

# Axes: B rows, S positions, N anchors, K block size, M supervised slots, H hidden size, V vocabulary.

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

LOSS_TYPES = ("dflash", "dpace")


def slot_weights(block_size: int, gamma: float | None, device: torch.device | None = None) -> Tensor:
    """Return w_k = exp(-(k-1)/gamma) for k = 1..K-1 as float32 [K-1]; all ones when gamma is None."""
    if gamma is None:
        return torch.ones(block_size - 1, device=device)
    return torch.exp(-torch.arange(block_size - 1, dtype=torch.float32, device=device) / gamma)


def dpace_weights(label_probability: Tensor, supervised: Tensor, alpha: float) -> Tensor:
    """Return the D-PACE weights w_j = sum over t >= j of prod over i <= t of q_i, q = (1-alpha) p + alpha.

    `label_probability` is the draft's probability p of each label, float [B, N, K-1], already detached; `supervised`
    is bool of the same shape. A slot that is not supervised neither breaks nor lengthens the run: it is a factor of
    one and adds no term. Source: arXiv 2605.18810.
    """
    q = torch.where(supervised, (1 - alpha) * label_probability + alpha, 1.0)
    survival = q.cumprod(dim=-1) * supervised
    return survival.flip(-1).cumsum(dim=-1).flip(-1) * supervised


def supervised_slots(
    anchors: Tensor, keep: Tensor, loss_mask: Tensor, document_ids: Tensor | None, block_size: int
) -> tuple[Tensor, Tensor]:
    """Return the label positions int64 [B, N, K-1] of slots 1..K-1 and which of them are supervised, bool.

    A slot of a kept block is supervised where its position lies in the row, in the anchor's document, and under the
    loss mask. Positions beyond the row are clamped to its end and not supervised.
    """
    num_rows, seq_len = loss_mask.shape
    position = anchors[:, :, None] + torch.arange(1, block_size, device=anchors.device)
    inside = position < seq_len
    position = position.clamp(max=seq_len - 1)
    row = torch.arange(num_rows, device=anchors.device)[:, None, None]
    supervised = keep[:, :, None] & inside & (loss_mask[row, position] > 0.5)
    if document_ids is not None:
        supervised &= document_ids[row, position] == document_ids[row, anchors[:, :, None]]
    return position, supervised


class _HeadCrossEntropy(torch.autograd.Function):
    """Cross-entropy through a frozen head, a chunk of slots at a time.

    Cross-entropy's gradient is linear in what arrives from above, one number a slot. So the forward pass forms each
    slot's gradient with respect to its hidden state while the chunk's logits exist, the logits are dropped, and the
    backward pass only scales. Stored for it: one hidden state a slot.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        labels: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        chunk_slots: int,
        with_grad: bool,
    ) -> tuple[Tensor, Tensor]:
        ce = torch.empty(labels.shape, dtype=torch.float32, device=hidden.device)
        correct = torch.empty(labels.shape, dtype=torch.bool, device=hidden.device)
        grad = torch.empty_like(hidden) if with_grad else None
        for start in range(0, len(labels), chunk_slots):
            chunk = slice(start, start + chunk_slots)
            label = labels[chunk, None]
            logits = F.linear(hidden[chunk].to(weight.dtype), weight, bias)
            correct[chunk] = logits.argmax(dim=-1) == label[:, 0]
            logits = logits.float()
            log_sum = logits.logsumexp(dim=-1, keepdim=True)
            ce[chunk] = (log_sum - logits.gather(1, label))[:, 0]
            if grad is not None:
                probability = logits.sub_(log_sum).exp_()
                probability.scatter_add_(1, label, torch.full_like(label, -1, dtype=torch.float32))
                grad[chunk] = probability.to(weight.dtype) @ weight
        if grad is not None:
            ctx.save_for_backward(grad)
        ctx.mark_non_differentiable(correct)
        return ce, correct

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        return grad * grad_outputs[0][:, None].to(grad.dtype), None, None, None, None, None


def head_cross_entropy(hidden: Tensor, labels: Tensor, head: nn.Linear, chunk_slots: int) -> tuple[Tensor, Tensor]:
    """Return cross-entropy float32 [M], differentiable in `hidden`, and whether the greedy token is the label [M].

    `hidden` is [M, H], `labels` int64 [M]. The head gets no gradient. Logits are formed in the autocast dtype, or in
    the head's own without autocast, `chunk_slots` slots at a time; the softmax is float32.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else head.weight.dtype
    weight = head.weight.detach().to(dtype)
    bias = None if head.bias is None else head.bias.detach().to(dtype)
    with_grad = torch.is_grad_enabled() and hidden.requires_grad
    with torch.autocast(device, enabled=False):
        return _HeadCrossEntropy.apply(hidden, labels, weight, bias, chunk_slots, with_grad)


def accepted_prefix(correct: Tensor, supervised: Tensor) -> Tensor:
    """Return the number of leading correct slots of each block, int64 [B, N].

    Both inputs are bool [B, N, K-1]. A slot that is not supervised neither ends nor lengthens the prefix.
    """
    unbroken = (correct | ~supervised).cumprod(dim=-1).bool()
    return (unbroken & supervised).sum(dim=-1)
