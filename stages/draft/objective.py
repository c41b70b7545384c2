"""The loss: cross-entropy of the supervised slots through the frozen head, weighted by slot, and its metrics."""

# Axes: B rows, S positions, N anchors, K block size, n predicting slots of a block (K - 1 of the base draft),
# M supervised slots, H hidden size, V vocabulary, k candidates.

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

HEAD_CHUNK_BYTES = {"cpu": 64 * 2**20, "gpu": 640 * 2**20}
"""Bytes of a chunk's logits, counted in float32. A GPU's share gives 1,024 slots at a vocabulary of 151,936."""


def slot_weights(
    block_size: int, gamma: float | None, device: torch.device | None = None, first_slot: int = 1
) -> Tensor:
    """Return w_k = exp(-(k - first_slot)/gamma) for k = first_slot..K-1, float32 [n]; all ones when gamma is None."""
    num = block_size - first_slot
    if gamma is None:
        return torch.ones(num, device=device)
    return torch.exp(-torch.arange(num, dtype=torch.float32, device=device) / gamma)


def dpace_weights(label_probability: Tensor, supervised: Tensor, alpha: float) -> Tensor:
    """Return the D-PACE weights w_j = sum over t >= j of prod over i <= t of q_i, q = (1-alpha) p + alpha.

    `label_probability` is the draft's probability p of each label, float [B, N, n], already detached; `supervised`
    is bool of the same shape. A slot that is not supervised neither breaks nor lengthens the run: it is a factor of
    one and adds no term. Source: arXiv 2605.18810.
    """
    q = torch.where(supervised, (1 - alpha) * label_probability + alpha, 1.0)
    survival = q.cumprod(dim=-1) * supervised
    return survival.flip(-1).cumsum(dim=-1).flip(-1) * supervised


def supervised_slots(
    anchors: Tensor,
    keep: Tensor,
    loss_mask: Tensor,
    document_ids: Tensor | None,
    block_size: int,
    first_slot: int = 1,
    label_offset: int = 0,
) -> tuple[Tensor, Tensor]:
    """Return the label positions int64 [B, N, n] of slots `first_slot` to K-1, and which of them are supervised, bool.

    Slot k predicts the token `label_offset` + k after its anchor. A slot of a kept block is supervised where that lies
    in the row, in the anchor's document, and under the loss mask. Positions beyond the row are clamped to its end and
    not supervised.
    """
    num_rows, seq_len = loss_mask.shape
    slots = torch.arange(first_slot, block_size, device=anchors.device)
    position = anchors[:, :, None] + label_offset + slots
    inside = position < seq_len
    position = position.clamp(max=seq_len - 1)
    row = torch.arange(num_rows, device=anchors.device)[:, None, None]
    supervised = keep[:, :, None] & inside & (loss_mask[row, position] > 0.5)
    if document_ids is not None:
        supervised &= document_ids[row, position] == document_ids[row, anchors[:, :, None]]
    return position, supervised


def default_chunk_slots(vocab_size: int, device: torch.device) -> int:
    """Return how many slots to project at once: as many as keep a matmul busy, their logits bounded in bytes."""
    slots = HEAD_CHUNK_BYTES["cpu" if device.type == "cpu" else "gpu"] // (4 * vocab_size)
    return max(slots // 128 * 128, 128)


def _chunk_loss(
    logits: Tensor, label: Tensor, with_grad: bool, out: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return a chunk's cross-entropy float32 [M, 1], whether the greedy token is the label, and the gradient [M, V].

    The gradient, None if not asked for, is with respect to the logits and in their dtype; everything before it is
    float32. The largest probability is at least 1 / V, so its logarithm is exact where that of the label's own would
    underflow. `out`, float32 [M, V], receives the softmax.
    """
    top, greedy = logits.max(dim=-1, keepdim=True)
    probability = torch.softmax(logits, dim=-1, dtype=torch.float32, out=out)
    ce = top.float() - logits.gather(1, label).float() - probability.gather(1, greedy).log()
    if not with_grad:
        return ce, greedy == label, None
    less_one = (probability.gather(1, label) - 1).to(logits.dtype)
    return ce, greedy == label, probability.to(logits.dtype).scatter_(1, label, less_one)


@functools.cache
def _compiled_chunk_loss() -> Callable[..., tuple[Tensor, Tensor, Tensor | None]]:
    return torch.compile(_chunk_loss)


class _HeadCrossEntropy(torch.autograd.Function):
    """Cross-entropy through a frozen head, a chunk of slots at a time.

    Cross-entropy's gradient is linear in what arrives from above, one number a slot. So the forward pass forms each
    slot's gradient with respect to its hidden state while the chunk's logits exist, the logits are dropped, and the
    backward pass only scales. Stored for it: one hidden state a slot. Each logit is written once by the matmul, read
    by the softmax and the maximum, and its gradient written and read once; the buffers serve every chunk, because
    fresh pages cost a CPU as much as the softmax. The number of slots is known to the host only after it has waited
    for the device; against a step of hundreds of milliseconds that gap is microseconds, and projecting every slot to
    avoid it would cost what the unsupervised ones cost.
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
        compiled: bool,
        top_k: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        ce = torch.empty(labels.shape, dtype=torch.float32, device=hidden.device)
        correct = torch.empty(labels.shape, dtype=torch.bool, device=hidden.device)
        values = torch.empty((len(labels), top_k), dtype=torch.float32, device=hidden.device)
        ids = torch.empty((len(labels), top_k), dtype=torch.int64, device=hidden.device)
        grad = torch.empty_like(hidden) if with_grad else None
        shape = min(chunk_slots, len(labels)), weight.shape[0]
        logits = torch.empty(shape, dtype=weight.dtype, device=hidden.device)
        softmax = None if compiled else torch.empty(shape, dtype=torch.float32, device=hidden.device)
        for start in range(0, len(labels), chunk_slots):
            chunk = slice(start, start + chunk_slots)
            label = labels[chunk, None]
            rows = slice(len(label))
            torch.mm(hidden[chunk].to(weight.dtype), weight.t(), out=logits[rows])
            if bias is not None:
                logits[rows] += bias
            if softmax is None:
                chunk_ce, hit, by_logit = _compiled_chunk_loss()(logits[rows], label, with_grad)
            else:
                chunk_ce, hit, by_logit = _chunk_loss(logits[rows], label, with_grad, softmax[rows])
            ce[chunk], correct[chunk] = chunk_ce[:, 0], hit[:, 0]
            if top_k:
                values[chunk], ids[chunk] = top_candidates(logits[rows], top_k)
            if grad is not None and by_logit is not None:
                grad[chunk] = by_logit @ weight
        if grad is not None:
            ctx.save_for_backward(grad)
        ctx.mark_non_differentiable(correct, values, ids)
        return ce, correct, values, ids

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        return (grad * grad_outputs[0][:, None]).to(grad.dtype), *(None,) * 7


def top_candidates(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Return each row's `top_k` largest logits, float32 [M, k], and their tokens, int64, in the tokens' order.

    In that order the first of equal scores is the one that the greedy choice over the whole row takes.
    """
    values, ids = logits.topk(top_k, dim=-1)
    ids, order = ids.sort(dim=-1)
    return values.gather(-1, order).float(), ids


@dataclass(frozen=True, kw_only=True)
class Head:
    """The target's frozen head, and how a step goes through it; it gets no gradient.

    Logits are formed in the autocast dtype, or in the head's own without autocast, `chunk_slots` slots at a time (by
    default `default_chunk_slots`); the softmax is float32, and one kernel where `compiled`.
    """

    linear: nn.Linear
    chunk_slots: int | None = None
    compiled: bool = False

    def cross_entropy(self, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return cross-entropy float32 [M], differentiable in `hidden`, and whether the greedy token is the label [M].

        `hidden` is [M, H], `labels` int64 [M].
        """
        ce, correct, _, _ = self.candidates(hidden, labels, 0)
        return ce, correct

    def candidates(self, hidden: Tensor, labels: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return what `cross_entropy` does, and each slot's `top_candidates`, without gradients."""
        device = hidden.device.type
        head = self.linear
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else head.weight.dtype
        weight = head.weight.detach().to(dtype)
        bias = None if head.bias is None else head.bias.detach().to(dtype)
        with_grad = torch.is_grad_enabled() and hidden.requires_grad
        chunk = self.chunk_slots or default_chunk_slots(weight.shape[0], hidden.device)
        with torch.autocast(device, enabled=False):
            return _HeadCrossEntropy.apply(hidden, labels, weight, bias, chunk, with_grad, self.compiled, top_k)


def head_cross_entropy(
    hidden: Tensor, labels: Tensor, head: nn.Linear, chunk_slots: int | None = None, compiled: bool = False
) -> tuple[Tensor, Tensor]:
    """Return `Head.cross_entropy` of a head."""
    return Head(linear=head, chunk_slots=chunk_slots, compiled=compiled).cross_entropy(hidden, labels)


def accepted_prefix(correct: Tensor, supervised: Tensor) -> Tensor:
    """Return the number of leading correct slots of each block, int64 [B, N].

    Both inputs are bool [B, N, n]. A slot that is not supervised neither ends nor lengthens the prefix.
    """
    unbroken = (correct | ~supervised).cumprod(dim=-1).bool()
    return (unbroken & supervised).sum(dim=-1)
