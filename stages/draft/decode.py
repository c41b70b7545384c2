"""Decoding of one prompt: by the target alone, with a DFlash draft, and with prompt lookup.

The draft's rounds are those of the reference client, token for token, so that acceptance lengths agree prompt by
prompt. All three keep a key/value cache; nothing is computed twice.
"""

# Axes: P prompt tokens, K block size, Q tokens of one block (K, fewer near the end), C new context positions,
# H hidden size, L captured target layers, V vocabulary. The batch axis is 1 throughout.

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from types import TracebackType

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationConfig, PreTrainedModel

from dflash_offline.stages.draft.layers import DraftCache
from dflash_offline.stages.draft.model import DraftModel
from dflash_offline.stages.draft.sampling import Chooser, Greedy
from dflash_offline.stages.draft.variants.table import variant_of
from dflash_offline.stages.target.model import capture_layers

ROWS_SCORED_AT_ONCE = 64
"""Rows of logits that plain decoding holds before it turns them into log-probabilities, outside the measured time."""


@dataclass(frozen=True, kw_only=True)
class PlainDecoding:
    """What the target answers on its own."""

    tokens: list[int]
    """The answer, with the stop token if one was reached."""
    log_probs: list[float]
    """The target's log-probability of each token, computed in float32."""
    seconds: float
    """Wall time of decoding; the prompt's forward, which gives the first token, is not in it."""


@dataclass(frozen=True, kw_only=True)
class SpeculativeDecoding:
    """What the target answers with the help of a draft."""

    tokens: list[int]
    """The answer, with the stop token if one was reached."""
    produced: list[int]
    """Tokens of each round, cut at the stop token and at the limit; with the prompt's one they make up the answer."""
    proposed: list[int]
    """Tokens that the draft proposed in each round."""
    kept: list[int]
    """Proposed tokens of each round that are in the answer; the others of a round are the target's own."""
    seconds: float
    """Wall time of the rounds; the prompt's forward, which gives the first token, is not in it."""
    blocks: list[list[int]] | None = None
    """The proposed tokens themselves, round by round; None unless they were asked for."""

    @property
    def drafted(self) -> int:
        """Tokens that the draft proposed."""
        return sum(self.proposed)

    @property
    def accepted(self) -> int:
        """Proposed tokens that are in the answer."""
        return sum(self.kept)


@dataclass(frozen=True, kw_only=True)
class LookupDecoding:
    """What the target answers when earlier text of the prompt and the answer serves as the draft."""

    tokens: list[int]
    target_calls: int
    """Forward calls of the target; the first one also reads the prompt."""


class Stopwatch:
    """Adds up the wall time spent inside `with`; waits for the device at both ends."""

    def __init__(self, device: torch.device) -> None:
        self.seconds = 0.0
        self._device = device

    def __enter__(self) -> None:
        self._started = self._now()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.seconds += self._now() - self._started

    def _now(self) -> float:
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)
        return time.perf_counter()


class _BlockDraft:
    """The draft's side of one decoding: its cache, its buffers, and what it borrows from the target."""

    def __init__(
        self,
        target: PreTrainedModel,
        draft: DraftModel,
        num_positions: int,
        chooser: Chooser,
        threshold: float | None,
    ) -> None:
        config = draft.config
        self._chooser, self._threshold = chooser, threshold
        table = target.get_input_embeddings().weight
        self._draft, self._table, self._head = draft, table, target.get_output_embeddings()
        self._variant = variant_of(config)
        self._cache = DraftCache()
        # The table's raw rows: whatever a target's embedding module does beyond the look-up is not part of a block.
        self._noise = table[config.mask_token_id].repeat(1, config.block_size, 1)
        self._positions = torch.arange(num_positions, device=table.device).unsqueeze(0)

    def propose(self, anchor: int, start: int, num_tokens: int, context: Tensor) -> Tensor:
        """Return the block to verify, int64 [1, Q]: `anchor` at position `start` and at most so many drafted tokens.

        `context` holds the features [1, C, L*H] of the positions before `start` that no earlier call has seen.
        """
        first = self._draft.config.variant.first_slot
        size = first + num_tokens
        self._noise[0, 0] = self._table[anchor]
        token = torch.tensor([anchor], device=self._table.device)
        hidden = self._draft(
            position_ids=self._positions[:, start - context.shape[1] : start + size],
            noise_embedding=self._noise[:, :size],
            target_hidden=context,
            past_key_values=self._cache,
        )
        self._cache.crop(start)
        drafted = self._variant.propose(
            self._draft, hidden[:, first:], self._head, token, self._chooser, self._threshold
        )
        return torch.cat((token[None], drafted), dim=1)


@torch.inference_mode()
def plain_decode(
    target: PreTrainedModel,
    prompt_ids: Sequence[int],
    max_new_tokens: int,
    stop_ids: Collection[int],
    chooser: Chooser | None = None,
) -> PlainDecoding:
    """Return the target's own answer: at most `max_new_tokens` tokens, ending with the first of `stop_ids`.

    It is greedy without a `chooser`.
    """
    chooser = chooser or Greedy()
    cache = DynamicCache(config=target.config)
    rows = [_read_prompt(target, prompt_ids, cache)]
    tokens: list[int] = []
    log_probs: list[float] = []
    watch = Stopwatch(target.device)
    while True:
        with watch:
            done = _extend(target, cache, rows, tokens, max_new_tokens, stop_ids, chooser)
        scored = rows if done else rows[:-1]
        log_probs += _log_probs(scored, tokens[len(log_probs) :])
        del rows[: len(scored)]
        if done:
            return PlainDecoding(tokens=tokens, log_probs=log_probs, seconds=watch.seconds)


def _extend(
    target: PreTrainedModel,
    cache: DynamicCache,
    rows: list[Tensor],
    tokens: list[int],
    max_new_tokens: int,
    stop_ids: Collection[int],
    chooser: Chooser,
) -> bool:
    """Decode until the answer ends (True) or enough rows of logits [1, V] wait to be scored; the last one is open."""
    while len(rows) <= ROWS_SCORED_AT_ONCE:
        chosen = chooser.choose(rows[-1])[:, None]
        tokens.append(int(chosen.item()))
        if len(tokens) == max_new_tokens or tokens[-1] in stop_ids:
            return True
        rows.append(target(chosen, past_key_values=cache, use_cache=True).logits[:, -1])
    return False


def _log_probs(rows: list[Tensor], tokens: list[int]) -> list[float]:
    logits = torch.cat(rows).float()
    chosen = torch.tensor(tokens, device=logits.device).unsqueeze(1)
    return logits.log_softmax(dim=-1).gather(1, chosen).squeeze(1).tolist()


@torch.inference_mode()
def speculative_decode(
    target: PreTrainedModel,
    draft: DraftModel,
    prompt_ids: Sequence[int],
    max_new_tokens: int,
    stop_ids: Collection[int],
    chooser: Chooser | None = None,
    *,
    keep_blocks: bool = False,
    confidence_threshold: float | None = None,
) -> SpeculativeDecoding:
    """Return the target's answer, decoded in rounds that each verify a block of the draft; greedy without a `chooser`.

    A round drafts a block of tokens after the newest one, has the target read them all in one call, and keeps the
    tokens the target agrees with and the target's own next one. The last block is only as long as the answer may
    still become. `keep_blocks` keeps what was proposed, at the price of one more transfer a round. With a
    `confidence_threshold` a block ends before the first token whose foretold acceptance is below it.
    """
    chooser = chooser or Greedy()
    cache, stops = DynamicCache(config=target.config), frozenset(stop_ids)
    # Lets layers that keep only a window, or only a state, be taken back to before a rejected token.
    cache.activate_past_recording()
    produced: list[int] = []
    proposed: list[int] = []
    kept: list[int] = []
    kept_blocks: list[list[int]] = []
    watch = Stopwatch(target.device)
    with capture_layers(target, draft.config.target_layer_ids) as features:
        tokens = [int(chooser.choose(_read_prompt(target, prompt_ids, cache)))]
        cache.crop(0)
        start, fresh = len(prompt_ids), len(prompt_ids)
        with watch:
            drafting = _BlockDraft(target, draft, start + max_new_tokens, chooser, confidence_threshold)
            while (room := max_new_tokens - len(tokens)) > 0 and tokens[-1] not in stops:
                context = torch.cat([layer[:, :fresh] for layer in features], dim=-1)
                block = drafting.propose(tokens[-1], start, min(draft.config.num_draft_tokens, room), context)
                size = block.shape[1]
                logits = target(block, past_key_values=cache, use_cache=True).logits
                agreed, answer = chooser.verify(block, logits)
                answer = _until_stop(answer[:room], stops)
                fresh = len(answer)
                cache.crop(fresh - size)
                tokens += answer
                produced.append(fresh)
                proposed.append(size - 1)
                kept.append(min(agreed, fresh))
                if keep_blocks:
                    kept_blocks.append(block[0, 1:].tolist())
                start += fresh
    return SpeculativeDecoding(
        tokens=tokens,
        produced=produced,
        proposed=proposed,
        kept=kept,
        seconds=watch.seconds,
        blocks=kept_blocks if keep_blocks else None,
    )


def _until_stop(tokens: list[int], stop_ids: Collection[int]) -> list[int]:
    for i, token in enumerate(tokens):
        if token in stop_ids:
            return tokens[: i + 1]
    return tokens


def prompt_lookup_decode(
    target: PreTrainedModel,
    prompt_ids: Sequence[int],
    max_new_tokens: int,
    stop_ids: Collection[int],
    num_lookup_tokens: int,
) -> LookupDecoding:
    """Return the answer of transformers' own prompt-lookup decoding and the target's calls it took.

    Each call verifies up to `num_lookup_tokens` tokens that followed the latest n-gram earlier in the text.
    """
    ids = torch.tensor([list(prompt_ids)], device=target.device)
    settings = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(stop_ids) or None,
        pad_token_id=min(stop_ids, default=0),
        prompt_lookup_num_tokens=num_lookup_tokens,
    )
    calls = 0

    def count(module: nn.Module, args: object) -> None:
        nonlocal calls
        calls += 1

    # `generate` fills what is left open from the model's own settings, which may hold a repetition penalty.
    own, target.generation_config = target.generation_config, settings
    handle = target.register_forward_pre_hook(count)
    try:
        output = target.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
    finally:
        handle.remove()
        target.generation_config = own
    return LookupDecoding(tokens=output[0, ids.shape[1] :].tolist(), target_calls=calls)


def _read_prompt(target: PreTrainedModel, prompt_ids: Sequence[int], cache: DynamicCache) -> Tensor:
    """Fill the cache with the prompt and return the logits [1, V] of the first token of the answer."""
    ids = torch.tensor([list(prompt_ids)], device=target.device)
    return target(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
