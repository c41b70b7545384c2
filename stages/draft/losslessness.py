"""Whether a draft has changed an answer, or rounding alone has chosen between two tokens."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from dflash_offline.schemas.evaluation import Difference


@dataclass(frozen=True, kw_only=True)
class TokenGap:
    """How far below the target's best logit the worse of two tokens lies."""

    gap: float
    """In logits."""
    tolerance: float
    """What rounding can do to logits of this size and dtype."""

    @property
    def tie(self) -> bool:
        """Whether rounding alone decides which of the two tokens is chosen."""
        return self.gap <= self.tolerance


def compare_answers(
    target: PreTrainedModel, prompt: str, prompt_ids: list[int], plain: list[int], speculative: list[int]
) -> Difference | None:
    """Return where the answer decoded with a draft leaves the target's own, and whether rounding explains it.

    `prompt` names the prompt; None if both answers are the same.
    """
    position = first_difference(plain, speculative)
    if position is None:
        return None
    ended = position >= min(len(plain), len(speculative))
    measured = None
    if not ended:
        measured = token_gap(target, prompt_ids + plain[:position], plain[position], speculative[position])
    return Difference(
        prompt=prompt,
        position=position,
        plain_token=plain[position] if position < len(plain) else None,
        speculative_token=speculative[position] if position < len(speculative) else None,
        gap=measured.gap if measured else None,
        tolerance=measured.tolerance if measured else None,
        tie=measured is not None and measured.tie,
    )


def first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    """Return the first index at which two token lists differ, or None if they are equal.

    Where one list only continues the other, that is the length of the shorter one.
    """
    for i, (left, right) in enumerate(zip(a, b, strict=False)):
        if left != right:
            return i
    return None if len(a) == len(b) else min(len(a), len(b))


def rounding_share(dtype: torch.dtype) -> float:
    """Return the share of the largest logit that rounding can move a logit by.

    It is 4 units in the last place, and 64 in float32, where long sums and not the storage of the activations make the
    error.
    """
    return max(4 * torch.finfo(dtype).eps, 64 * torch.finfo(torch.float32).eps)


@torch.inference_mode()
def token_gap(target: PreTrainedModel, context_ids: Sequence[int], token_a: int, token_b: int) -> TokenGap:
    """Return how close two candidate tokens after `context_ids` are, by one plain forward without a cache."""
    ids = torch.tensor([list(context_ids)], device=target.device)
    logits = target(ids, use_cache=False, logits_to_keep=1).logits[0, -1]
    share = rounding_share(logits.dtype)
    logits = logits.float()
    gap = logits.max() - torch.minimum(logits[token_a], logits[token_b])
    return TokenGap(gap=float(gap), tolerance=share * float(logits.abs().max()))
