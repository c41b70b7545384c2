"""Losses against the target's own distribution, of a chunk of slots while its logits exist: values and gradients.

P = softmax(z / t) of the target's logits z at the position before the label, t the teacher's temperature, and
Q = softmax(u) of the draft's. Logarithms are natural, sums over the vocabulary:

    kl       sum P log(P / Q)
    soft-ce  -sum P log Q: kl and the entropy of P, so another value with the same gradient
    tv       1 - alpha, alpha = sum min(P, Q) being the probability that a token drawn from Q is accepted
    lk       lambda kl + (1 - lambda) tv, lambda = exp(-3 alpha) without a gradient (arXiv 2602.23881)

With respect to u the gradients are Q - P for kl and soft-ce and, with m = 1 where Q < P and else 0, Q (sum Q m - m)
for tv. That of a mixture is linear in them, so each slot's follows in one pass over its logits.
"""

# Axes: M slots of a chunk, V vocabulary.

from typing import NamedTuple

import torch
from torch import Tensor

from dflash_offline.schemas.settings.losses import LossMixture

LK_DECAY = 3.0
"""By how much alpha turns lk from kl to tv."""


class ChunkBuffers(NamedTuple):
    """Memory of one chunk, float32 [M, V] each, which serves one chunk after the other."""

    draft: Tensor
    teacher: Tensor
    probability: Tensor

    def rows(self, num: int) -> "ChunkBuffers":
        """Return the first rows."""
        return ChunkBuffers(*(buffer[:num] for buffer in self))


def soft_chunk_loss(
    logits: Tensor,
    teacher: Tensor,
    label: Tensor,
    mixture: LossMixture,
    temperature: float,
    with_grad: bool,
    buffers: ChunkBuffers | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return a chunk's loss and cross-entropy, float32 [M, 1], whether the greedy token is the label, and a gradient.

    The gradient [M, V], None if not asked for, is that of the loss with respect to the logits, in their dtype.
    `logits` and `teacher` are [M, V], `label` is int64 [M, 1]; `teacher` may be overwritten. What lies between is
    float32, in the buffers if they are given; that of the probability may be the memory of a float32 `teacher`.
    """
    hit = logits.argmax(dim=-1, keepdim=True) == label
    log_q, log_p, p = buffers or (None, None, None)
    scaled = teacher if temperature == 1 else teacher.float().div_(temperature)
    log_q = torch.log_softmax(logits, dim=-1, dtype=torch.float32, out=log_q)
    log_p = torch.log_softmax(scaled, dim=-1, dtype=torch.float32, out=log_p)
    p = torch.exp(log_p, out=p)
    ce = -log_q.gather(1, label)
    soft_ce = -_row_products(p, log_q)
    ratio = log_p.sub_(log_q)
    kl = _row_products(p, ratio)
    is_short = ratio.gt_(0)  # 1 where Q < P
    q = log_q.exp_()
    q_short = _row_products(q, is_short)
    tv = _row_products(p, is_short) - q_short
    blend = torch.exp(LK_DECAY * (tv - 1))
    by_ce, by_soft_ce = mixture.of("dflash") + mixture.of("dpace"), mixture.of("soft-ce")
    by_kl, by_tv = mixture.of("kl") + mixture.of("lk") * blend, mixture.of("tv") + mixture.of("lk") * (1 - blend)
    loss = by_ce * ce + by_soft_ce * soft_ce + by_kl * kl + by_tv * tv
    if not with_grad:
        return loss, ce, hit, None
    towards_p = by_kl + by_soft_ce
    by_logit = q.mul_(is_short.mul_(-by_tv).add_(by_ce + towards_p + by_tv * q_short)).sub_(p.mul_(towards_p))
    if by_ce:
        by_logit.scatter_add_(1, label, torch.full_like(ce, -by_ce))
    return loss, ce, hit, by_logit.to(logits.dtype)


def _row_products(left: Tensor, right: Tensor) -> Tensor:
    """Return the sum of products of each row, float32 [M, 1], without a product of all elements in memory."""
    if torch.compiler.is_compiling():
        return (left * right).sum(dim=-1, keepdim=True)  # which becomes a part of the kernel that makes them
    return torch.bmm(left[:, None], right[:, :, None])[:, 0]
