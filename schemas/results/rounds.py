"""The rounds of answers that were decoded with a draft, and the figures that follow from them alone."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Acceptance:
    """How many tokens the rounds of some prompts produced."""

    prompts: int
    rounds: int
    tokens: int
    """Tokens produced in the rounds; the first token of each answer comes from the prompt's own forward."""
    pooled: float | None
    """Acceptance length: tokens / rounds; None without a round."""
    mean: float | None
    """Mean of the prompts' own acceptance lengths."""


@dataclass(frozen=True, kw_only=True)
class Rounds:
    """The rounds of one answer."""

    kind: str | None
    """Of its prompt."""
    produced: list[int]
    """Tokens of the answer that each round gave."""
    proposed: list[int]
    """Tokens that were drafted in each."""
    kept: list[int]
    """Drafted tokens of each that are in the answer."""


def acceptance(answers: Sequence[Rounds]) -> Acceptance:
    """Return the acceptance length over some prompts."""
    produced = [n for answer in answers for n in answer.produced]
    means = [statistics.fmean(answer.produced) for answer in answers if answer.produced]
    return Acceptance(
        prompts=len(answers),
        rounds=len(produced),
        tokens=sum(produced),
        pooled=sum(produced) / len(produced) if produced else None,
        mean=statistics.fmean(means) if means else None,
    )


def round_figures(answers: Sequence[Rounds], block_size: int) -> dict[str, Any]:
    """Return the fields of an `EvalResult` that follow from the rounds alone; a round gives `block_size` at most."""
    kinds = sorted({answer.kind for answer in answers if answer.kind is not None})
    produced = [n for answer in answers for n in answer.produced]
    proposed = [n for answer in answers for n in answer.proposed]
    kept = [n for answer in answers for n in answer.kept]
    slots = range(1, block_size)
    return {
        "block_size": block_size,
        "acceptance": acceptance(answers),
        "acceptance_by_kind": {kind: acceptance([a for a in answers if a.kind == kind]) for kind in kinds},
        "rounds_by_tokens": tuple(produced.count(n) for n in range(1, block_size + 1)),
        "drafted_by_slot": tuple(sum(n >= slot for n in proposed) for slot in slots),
        "accepted_by_slot": tuple(sum(n >= slot for n in kept) for slot in slots),
        "drafted_tokens": sum(proposed),
        "accepted_tokens": sum(kept),
    }
