"""The losses of the supervised slots through the frozen head, the weights of slots, and accepted prefixes."""

# Axes: B rows, S positions, N anchors, K block size, n predicting slots of a block (K - 1 of the base draft),
# M supervised slots, H hidden size, V vocabulary, k candidates.

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from dflash_offline.schemas.results.expected import TEMPERATURES
from dflash_offline.schemas.settings.losses import LossMixture
from dflash_offline.stages.draft.acceptance import dense_acceptance
from dflash_offline.stages.draft.soft_labels import ChunkBuffers, soft_chunk_loss

CROSS_ENTROPY = LossMixture.read("dflash")
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
    is_unbroken: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return the label positions int64 [B, N, n] of slots `first_slot` to K-1, and which of them are supervised, bool.

    Slot k predicts the token `label_offset` + k after its anchor. A slot of a kept block is supervised where that lies
    in the row, in the anchor's document, and under the loss mask; where `is_unbroken`, and all before it in its block
    do. Positions beyond the row are clamped to its end and not supervised.
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
    if is_unbroken:
        supervised = supervised.cumprod(dim=-1).bool()
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
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function)


@dataclass(frozen=True, kw_only=True)
class _Pass:
    """What a pass over the slots computes, and by how many at a time."""

    mixture: LossMixture
    temperature: float
    chunk_slots: int
    with_grad: bool
    compiled: bool
    top_k: int


class _ChunkLosses:
    """Losses of one chunk after the other; their buffers serve all of them.

    Fresh pages cost a CPU as much as a softmax. Beside the logits themselves hard labels take one of float32, and the
    target's distribution three and its logits, one of which they share where those are float32.
    """

    def __init__(self, wanted: _Pass, weight: Tensor, bias: Tensor | None, shape: tuple[int, int]) -> None:
        self._pass, self._weight, self._bias = wanted, weight, bias
        soft, own = wanted.mixture.needs_final, torch.float32
        self.logits = torch.empty(shape, dtype=weight.dtype, device=weight.device)
        self._teacher = torch.empty_like(self.logits) if soft else None
        self._softmax: Tensor | None = None
        self._buffers: ChunkBuffers | None = None
        if not wanted.compiled and soft:
            assert self._teacher is not None
            third = self._teacher if weight.dtype == own else torch.empty_like(self.logits, dtype=own)
            draft, teacher = (torch.empty_like(self.logits, dtype=own) for _ in range(2))
            self._buffers = ChunkBuffers(draft, teacher, third)
        elif not wanted.compiled:
            self._softmax = torch.empty_like(self.logits, dtype=own)

    def __call__(
        self, hidden: Tensor, teacher: Tensor | None, label: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Return loss and cross-entropy float32 [m, 1], whether the greedy token is the label, and a gradient [m, V].

        The logits stay in `logits` until the next chunk.
        """
        wanted, rows = self._pass, slice(len(label))
        logits = self._project(hidden, self.logits[rows])
        if self._teacher is None or teacher is None:
            function = _compiled(_chunk_loss) if self._softmax is None else _chunk_loss
            out = None if self._softmax is None else self._softmax[rows]
            ce, hit, by_logit = function(logits, label, wanted.with_grad, out)
            return ce, ce, hit, by_logit
        theirs = self._project(teacher, self._teacher[rows])
        function = _compiled(soft_chunk_loss) if self._buffers is None else soft_chunk_loss
        buffers = None if self._buffers is None else self._buffers.rows(len(label))
        return function(logits, theirs, label, wanted.mixture, wanted.temperature, wanted.with_grad, buffers)

    def _project(self, states: Tensor, out: Tensor) -> Tensor:
        torch.mm(states.to(self._weight.dtype), self._weight.t(), out=out)
        if self._bias is not None:
            out += self._bias
        return out


class _HeadLoss(torch.autograd.Function):
    """The losses through a frozen head, a chunk of slots at a time.

    Their gradients are linear in what arrives from above, one number a slot. So the forward pass forms each
    slot's gradient with respect to its hidden state while the chunk's logits exist, the logits are dropped, and the
    backward pass only scales. Stored for it: one hidden state a slot. Each logit is written once by the matmul, read
    by the softmax and the maximum, and its gradient written and read once. The number of slots is known to the host
    only after it has waited for the device; against a step of hundreds of milliseconds that gap is microseconds, and
    projecting every slot to avoid it would cost what the unsupervised ones cost.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        teacher: Tensor | None,
        labels: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        wanted: _Pass,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        loss = torch.empty(labels.shape, dtype=torch.float32, device=hidden.device)
        ce, correct = torch.empty_like(loss), torch.empty_like(loss, dtype=torch.bool)
        values = torch.empty((len(labels), wanted.top_k), dtype=torch.float32, device=hidden.device)
        ids = torch.empty_like(values, dtype=torch.int64)
        grad = torch.empty_like(hidden) if wanted.with_grad else None
        chunk_slots = wanted.chunk_slots
        losses = _ChunkLosses(wanted, weight, bias, (min(chunk_slots, len(labels)), weight.shape[0]))
        for start in range(0, len(labels), chunk_slots):
            chunk = slice(start, start + chunk_slots)
            label = labels[chunk, None]
            theirs = None if teacher is None else teacher[chunk]
            chunk_loss, chunk_ce, hit, by_logit = losses(hidden[chunk], theirs, label)
            loss[chunk], ce[chunk], correct[chunk] = chunk_loss[:, 0], chunk_ce[:, 0], hit[:, 0]
            if wanted.top_k:
                values[chunk], ids[chunk] = top_candidates(losses.logits[: len(label)], wanted.top_k)
            if grad is not None and by_logit is not None:
                grad[chunk] = by_logit @ weight
        if grad is not None:
            ctx.save_for_backward(grad)
        ctx.mark_non_differentiable(ce, correct, values, ids)
        return loss, ce, correct, values, ids

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        return (grad * grad_outputs[0][:, None]).to(grad.dtype), *(None,) * 5


def top_candidates(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Return each row's `top_k` largest logits, float32 [M, k], and their tokens, int64, in the tokens' order.

    In that order the first of equal scores is the one that the greedy choice over the whole row takes.
    """
    values, ids = logits.topk(top_k, dim=-1)
    ids, order = ids.sort(dim=-1)
    return values.gather(-1, order).float(), ids


class HeadTerms(NamedTuple):
    """What the head gives for some slots; only `loss` carries a gradient, to the hidden states."""

    loss: Tensor
    """The mixture of losses, float32 [M]."""
    ce: Tensor
    """Cross-entropy with the label, float32 [M]."""
    correct: Tensor
    """Whether the greedy token is the label, bool [M]."""
    values: Tensor
    """`top_candidates`, float32 [M, k]; k = 0 unless asked for."""
    ids: Tensor
    """Their tokens, int64 [M, k]."""


@dataclass(frozen=True, kw_only=True)
class Head:
    """The target's frozen head, and how a step goes through it; it gets no gradient.

    Logits are formed in the autocast dtype, or in the head's own without autocast, `chunk_slots` slots at a time (by
    default `default_chunk_slots`, and half of that where the target's are formed too); the softmax is float32, and one
    kernel where `compiled`.
    """

    linear: nn.Linear
    chunk_slots: int | None = None
    compiled: bool = False
    mixture: LossMixture = CROSS_ENTROPY
    teacher_temperature: float = 1.0
    """What the target's logits are divided by where the draft learns from its distribution."""

    def cross_entropy(self, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return cross-entropy float32 [M], differentiable in `hidden`, and whether the greedy token is the label [M].

        `hidden` is [M, H], `labels` int64 [M].
        """
        terms = replace(self, mixture=CROSS_ENTROPY).loss(hidden, labels)
        return terms.loss, terms.correct

    def loss(
        self, hidden: Tensor, labels: Tensor, teacher: Callable[[], Tensor] | None = None, top_k: int = 0
    ) -> HeadTerms:
        """Return the mixture of losses of the slots, and what else of their logits is wanted.

        `hidden` is [M, H], `labels` int64 [M]; `teacher` returns the target's state at the position before each label,
        [M, H], and is asked where the mixture needs its distribution.
        """
        device, soft = hidden.device, self.mixture.needs_final
        assert teacher is not None or not soft
        weight, bias = self._weights(device)
        chunk = self.chunk_slots or default_chunk_slots(weight.shape[0], device) // (2 if soft else 1)
        wanted = _Pass(
            mixture=self.mixture,
            temperature=self.teacher_temperature,
            chunk_slots=chunk,
            with_grad=torch.is_grad_enabled() and hidden.requires_grad,
            compiled=self.compiled,
            top_k=top_k,
        )
        with torch.autocast(device.type, enabled=False):
            states = teacher() if soft and teacher is not None else None
            return HeadTerms(*_HeadLoss.apply(hidden, states, labels, weight, bias, wanted))

    @torch.no_grad()
    def acceptance(self, hidden: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        """Return `dense_acceptance` of slots, float32 [M, T], given their states and the target's before the labels."""
        parts = zip(self._logits(hidden), self._logits(teacher), labels.split(self._chunk(hidden)), strict=True)
        return torch.cat([dense_acceptance(*part) for part in parts])

    @torch.no_grad()
    def log_probabilities(self, states: Tensor, tokens: Tensor) -> Tensor:
        """Return the logarithm of the probability that each state [M, H] gives a token [M], float32 [M, T]."""
        found = []
        for logits, token in zip(self._logits(states), tokens.split(self._chunk(states)), strict=True):
            scaled = (torch.log_softmax(logits.float() / temperature, dim=-1) for temperature in TEMPERATURES)
            found.append(torch.cat([each.gather(1, token[:, None]) for each in scaled], dim=-1))
        return torch.cat(found)

    def _chunk(self, states: Tensor) -> int:
        return self.chunk_slots or default_chunk_slots(self.linear.weight.shape[0], states.device) // 2

    def _logits(self, states: Tensor) -> Iterator[Tensor]:
        """Yield the logits [m, V] of some states after others."""
        weight, bias = self._weights(states.device)
        with torch.autocast(states.device.type, enabled=False):
            for part in states.split(self._chunk(states)):
                yield F.linear(part.to(weight.dtype), weight, bias)

    def _weights(self, device: torch.device) -> tuple[Tensor, Tensor | None]:
        head, autocast = self.linear, torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if autocast else head.weight.dtype
        return head.weight.detach().to(dtype), None if head.bias is None else head.bias.detach().to(dtype)


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
