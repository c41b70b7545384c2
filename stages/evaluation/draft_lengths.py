"""Every shorter block: how much of it is accepted, by passes of its own."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from dflash_offline.schemas.results.draft_lengths import DraftLength, DraftLengths, ServedCost, StepCosts
from dflash_offline.schemas.results.rounds import Rounds, round_figures
from dflash_offline.schemas.settings.evaluate import EvalConfig
from dflash_offline.stages.draft.decode import SpeculativeDecoding
from dflash_offline.stages.draft.model import DraftModel
from dflash_offline.stages.draft.weights import run_as
from dflash_offline.stages.evaluation.decoding import Case, Decoder, Outcome, in_turn, rounds_of, tokens_per_s
from dflash_offline.stages.evaluation.expected import expected_speeds
from dflash_offline.stages.evaluation.samples import EvalSamples, Walk, walk_samples
from dflash_offline.stages.progress import Progress


def shortened(draft: DraftModel, block_size: int) -> DraftModel:
    """Return the same weights as a draft of blocks of another size."""
    return run_as(draft, replace(draft.config, block_size=block_size))


def decode_lengths(decoder: Decoder, outcomes: Sequence[Outcome], progress: Progress) -> tuple[DraftLength, ...]:
    """Return what blocks of 1, 2, ... drafted tokens give on the prompts of `outcomes`, which are of whole blocks.

    The sizes take turns at going first, so that none has the warmer machine.
    """
    config = decoder.draft.config
    sizes = range(1 + config.variant.first_slot, config.block_size)
    drafts = [shortened(decoder.draft, size) for size in sizes]
    done: list[list[SpeculativeDecoding]] = []
    progress.start("Decoding with shorter blocks", len(outcomes), "prompts")
    try:
        for i, outcome in enumerate(outcomes):
            ways = [partial(decoder.speculate, outcome.case, i, draft=draft) for draft in drafts]
            done.append([*in_turn(ways, i), outcome.speculative])
            progress.advance(1)
    finally:
        progress.finish()
    cases = [outcome.case for outcome in outcomes]
    return tuple(_decoded_length(number, cases, each) for number, each in enumerate(zip(*done, strict=True), start=1))


def walk_lengths(chosen: EvalSamples, draft: DraftModel, progress: Progress) -> tuple[Walk, tuple[DraftLength, ...]]:
    """Return the walk of whole blocks over a cache's samples, and what every shorter block gives."""
    sizes = range(draft.config.block_size, draft.config.variant.first_slot, -1)
    walked = walk_samples(chosen, [shortened(draft, size) for size in sizes], progress)
    lengths = enumerate(reversed(walked), start=1)
    return walked[0], tuple(draft_length(number, walk.rounds) for number, walk in lengths)


def _decoded_length(number: int, cases: Sequence[Case], done: Sequence[SpeculativeDecoding]) -> DraftLength:
    rounds = [rounds_of(case, one) for case, one in zip(cases, done, strict=True)]
    return draft_length(number, rounds, tokens_per_s(done))


def draft_length(number: int, rounds: Sequence[Rounds], speed: float | None = None) -> DraftLength:
    """Return what the rounds of blocks of so many drafted tokens come to."""
    figures = round_figures(rounds, 1 + number)
    return DraftLength(
        num_speculative_tokens=number,
        acceptance=figures["acceptance"],
        acceptance_by_kind=figures["acceptance_by_kind"],
        tokens_per_s=speed,
    )


def advise(
    lengths: tuple[DraftLength, ...], costs: Sequence[StepCosts], served: Sequence[ServedCost], config: EvalConfig
) -> DraftLengths:
    """Return the lengths with the speeds to expect of them, and what would tell more."""
    expected, notes = expected_speeds(lengths, costs, served), []
    known = {one.concurrency for one in expected}
    if missing := [str(number) for number in config.concurrency if number not in known]:
        notes.append(
            f"what a round costs at {', '.join(missing)} at a time is not known: name --target, or give --speeds of a "
            f"server at two or more numbers of drafted tokens"
        )
    if any(one.speedup is None for one in expected):
        notes.append("plain decoding was not timed on the server: name --plain-server to see how much faster it is")
    return DraftLengths(lengths=lengths, costs=tuple(costs), expected=expected, notes=tuple(notes))
