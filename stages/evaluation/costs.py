"""What the steps of a round cost here: a pass of the draft over a block, and the target's reading of it."""

# Axes: B sequences, S context positions, K block size, H hidden size, L captured target layers.

import statistics
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from dflash_offline.schemas.results.draft_lengths import StepCosts
from dflash_offline.stages.draft.decode import Stopwatch
from dflash_offline.stages.draft.layers import DraftCache
from dflash_offline.stages.draft.model import DraftModel
from dflash_offline.stages.draft.sampling import Greedy
from dflash_offline.stages.draft.variants.table import variant_of
from dflash_offline.stages.progress import Progress
from dflash_offline.stages.target.model import capture_layers

TIMES = 15
"""That each step is timed, after once that is not counted; its seconds are the median."""


def measure_costs(
    target: PreTrainedModel,
    draft: DraftModel,
    context: Sequence[int],
    fresh: int,
    concurrencies: Sequence[int],
    progress: Progress,
) -> tuple[StepCosts, ...]:
    """Return the seconds of every step at each concurrency, after a context of these tokens in every sequence.

    `fresh` is the number of positions that a pass of the draft has to take in beside its block: as many as a round
    gives. The steps are timed in turn, so that a disturbance falls on all of them.
    """
    progress.start("Timing", len(concurrencies) * (TIMES + 1), "rounds")
    try:
        return tuple(_Steps(target, draft, context, fresh, number).timed(progress) for number in concurrencies)
    finally:
        progress.finish()


class _Steps:
    """The steps of a round of some sequences, each leaving all as it found it."""

    @torch.inference_mode()
    def __init__(
        self, target: PreTrainedModel, draft: DraftModel, context: Sequence[int], fresh: int, concurrency: int
    ) -> None:
        self._target, self._draft, self._concurrency = target, draft, concurrency
        self._length = len(context)
        rows = torch.tensor([list(context)] * concurrency, device=target.device)
        self._cache = DynamicCache(config=target.config)
        self._cache.activate_past_recording()
        with capture_layers(target, draft.config.target_layer_ids) as features:
            target(rows, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
            states = torch.cat(list(features), dim=-1)
        self._cache.crop(0)
        most = 1 + draft.config.num_draft_tokens
        self._ids = torch.full((concurrency, most), draft.config.mask_token_id, device=rows.device)
        self._ids[:, 0] = rows[:, -1]
        self._noise = target.get_input_embeddings().weight[self._ids]
        self._positions = torch.arange(self._length + draft.config.block_size, device=rows.device).unsqueeze(0)
        self._fresh = states[:, -fresh:].clone()
        self._drafted = DraftCache()
        self._pass(states[:, :-fresh], 0, 1)

    def _pass(self, states: Tensor, start: int, number: int) -> None:
        """Draft so many tokens of every sequence behind some states [B, S, L*H], which are kept in the cache."""
        end, first = start + states.shape[1], self._draft.config.variant.first_slot
        size = first + number
        hidden = self._draft(
            position_ids=self._positions[:, start : end + size],
            noise_embedding=self._noise[:, :size],
            target_hidden=states,
            past_key_values=self._drafted,
        )
        self._drafted.crop(end)
        # Where tokens are chosen one after another, all sequences do it at once: one shows how long it takes.
        head, anchor = self._target.get_output_embeddings(), self._ids[0, :1]
        variant_of(self._draft.config).propose(self._draft, hidden[:1, first:], head, anchor, Greedy()).tolist()
        head(hidden[1:, first:]).argmax(dim=-1)

    def draft(self, number: int) -> None:
        """Draft so many tokens, the states of the round before taken in."""
        start = self._length - self._fresh.shape[1]
        self._pass(self._fresh, start, number)
        self._drafted.crop(start)

    def read(self, size: int) -> None:
        """Let the target read so many tokens of each sequence, and bring back what it would say."""
        logits = self._target(self._ids[:, :size], past_key_values=self._cache, use_cache=True).logits
        logits.argmax(dim=-1).tolist()
        self._cache.crop(-size)

    def verify(self, number: int) -> None:
        """Let the target read so many drafted tokens behind the newest, and give the states that the draft reads."""
        with capture_layers(self._target, self._draft.config.target_layer_ids) as features:
            self.read(1 + number)
            torch.cat(list(features), dim=-1)

    @torch.inference_mode()
    def timed(self, progress: Progress) -> StepCosts:
        numbers = range(1, self._draft.config.num_draft_tokens + 1)
        steps: list[tuple[Callable[[int], None], int]] = [(self.read, 1)]
        steps += [(self.draft, number) for number in numbers] + [(self.verify, number) for number in numbers]
        seconds: list[list[float]] = [[] for _ in steps]
        for turn in range(TIMES + 1):
            for i in range(len(steps)):
                at = (turn + i) % len(steps)
                step, size = steps[at]
                watch = Stopwatch(self._target.device)
                with watch:
                    step(size)
                if turn:
                    seconds[at].append(watch.seconds)
            progress.advance(1)
        plain, *others = (statistics.median(each) for each in seconds)
        return StepCosts(
            concurrency=self._concurrency,
            context_tokens=self._length,
            plain_s=plain,
            draft_s=tuple(others[: len(numbers)]),
            verify_s=tuple(others[len(numbers) :]),
        )
