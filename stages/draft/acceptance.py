"""How likely drafted tokens stay where tokens are drawn, from a draft's distribution and the target's own.

P and Q are the distributions of target and draft at a temperature, x the token that the answer has. A token drawn from
Q stays as x with probability min(P(x), Q(x)), and x comes from P (arXiv 2211.17192): so given that the answer has x,
its slot drafted it and it stayed with probability min(1, Q(x) / P(x)). The mean of that over P is sum min(P, Q), the
acceptance whatever follows; but products over slots need the tokens, because a draft that is right about one
is likelier right about the next.
"""

# Axes: M slots, V vocabulary, T temperatures, k candidates.

import torch
from torch import Tensor

from dflash_offline.schemas.results.expected import TEMPERATURES


def dense_acceptance(logits: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """Return what stays of slots whose tokens are drawn from all of the vocabulary, float32 [M, T].

    `logits` and `teacher` are the draft's and the target's [M, V], `labels` int64 [M].
    """
    found = []
    for temperature in TEMPERATURES:
        both = (torch.log_softmax(each.float() / temperature, dim=-1) for each in (logits, teacher))
        found.append(_stays(*(each.gather(1, labels[:, None])[:, 0] for each in both)))
    return torch.stack(found, dim=-1)


def sparse_acceptance(scores: Tensor, ids: Tensor, label_log_p: Tensor, labels: Tensor) -> Tensor:
    """Return what stays of slots whose tokens are drawn from a few candidates, float32 [M, T].

    `scores` and `ids` are [M, k], no candidate twice; `label_log_p` [M, T] is log P of the labels.
    """
    is_label, found = ids == labels[:, None], []
    for temperature, log_p in zip(TEMPERATURES, label_log_p.unbind(dim=-1), strict=True):
        log_q = torch.log_softmax(scores / temperature, dim=-1).masked_fill(~is_label, -torch.inf).amax(dim=-1)
        found.append(_stays(log_q, log_p))
    return torch.stack(found, dim=-1)


def _stays(log_q: Tensor, log_p: Tensor) -> Tensor:
    return (log_q - log_p).clamp(max=0).exp()
