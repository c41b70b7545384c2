"""Answers from a target that is loaded here, many conversations in one batch.

Axes: B rows, S positions, V vocabulary.
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList

from dflash_offline.schemas.errors import DflashError
from dflash_offline.schemas.settings.regenerate import RegenerateConfig
from dflash_offline.stages.answers.dialogues import Answer, Dialogue, own_seed
from dflash_offline.stages.answers.readings import Asked
from dflash_offline.stages.answers.turns import TargetTurns
from dflash_offline.stages.draft.sampling import SamplingRule
from dflash_offline.stages.progress import Progress
from dflash_offline.stages.target.model import load_as_configured

WINDOW_BATCHES = 8
"""Batches' worth of rows that are answered turn by turn together, those of about one length in one batch."""

Note = Callable[[list[tuple[Dialogue, Answer]]], None]


class LocalAnswerer:
    """Answers dialogues with the target itself.

    Which rows share a batch follows from the data and the settings alone, never from what was answered before a
    restart: a batch that was cut off is done again as it was, so that greedy answers do not depend on interruptions.
    """

    def __init__(self, config: RegenerateConfig, progress: Progress) -> None:
        self.config = config
        self.progress = progress
        self._turns = TargetTurns(config)
        self.device = self._turns.device

    def identity(self) -> dict[str, Any]:
        """Return what decides the answers."""
        config = self.config
        return {
            "target": self._turns.identity(
                attn_implementation=config.attn_implementation, device_map=config.device_map
            ),
            "device": self._turns.device.type,
            "batch_rows": config.batch_rows,
        }

    def origin(self) -> dict[str, Any]:
        """Return what is recorded of the target and never compared."""
        return self._turns.origin()

    def answer(self, dialogues: Iterable[Dialogue], note: Note, num_open: int) -> None:
        """Answer every open turn of the dialogues, and note the answers batch by batch."""
        if not num_open:
            return
        self.load()
        rows = iter(dialogues)
        while window := list(islice(rows, window_rows(self.config))):
            if any(dialogue.is_open for dialogue in window):
                self.answer_window(window, note)

    def load(self) -> None:
        """Load the target, which windows are answered with."""
        # Checked as for extraction: answers of a target that no draft can serve would train none.
        turns = self._turns
        self.model = load_as_configured(turns.files, self.config, turns.dtype, turns.device, self.progress)
        # A checkpoint's own sampling habits (top_k, repetition_penalty) would otherwise join in.
        pad = turns.files.tokenizer.pad_token_id
        self.model.generation_config = GenerationConfig(
            do_sample=False, eos_token_id=turns.end_ids, pad_token_id=turns.end_ids[0] if pad is None else pad
        )

    def answer_window(self, window: list[Dialogue], note: Note) -> None:
        """Answer every open turn of dialogues that make up one window, by the target that is loaded."""
        for turn in range(max(len(dialogue.questions) for dialogue in window)):
            prompts: list[tuple[Dialogue, Asked]] = []
            for dialogue in window:
                if dialogue.reaches(turn):
                    asked = self._turns.ask(dialogue, turn)
                    if isinstance(asked, Asked):
                        prompts.append((dialogue, asked))
                    elif len(dialogue.answers) == turn:
                        dialogue.add(asked)
                        note([(dialogue, asked)])
            prompts.sort(key=lambda prompt: (len(prompt[1].ids), prompt[0].index))
            for begin in range(0, len(prompts), self.config.batch_rows):
                batch = prompts[begin : begin + self.config.batch_rows]
                if any(len(dialogue.answers) == turn for dialogue, _ in batch):
                    note(list(self._answer_batch(batch, turn)))

    def _answer_batch(self, batch: list[tuple[Dialogue, Asked]], turn: int) -> Iterator[tuple[Dialogue, Answer]]:
        for (dialogue, asked), ids in zip(batch, self._generate(batch, turn), strict=True):
            if len(dialogue.answers) == turn:
                answer = self._turns.read(dialogue, asked, ids, turn)
                dialogue.add(answer)
                yield dialogue, answer

    @torch.inference_mode()
    def _generate(self, batch: list[tuple[Dialogue, Asked]], turn: int) -> list[list[int]]:
        """Return the new tokens of each row, whatever follows an end token included."""
        config, width = self.config, max(len(asked.ids) for _, asked in batch)
        ids_BS = torch.full((len(batch), width), self.model.generation_config.pad_token_id)
        real_BS = torch.zeros_like(ids_BS)
        for row, (_, asked) in enumerate(batch):
            ids_BS[row, width - len(asked.ids) :] = torch.tensor(asked.ids)
            real_BS[row, width - len(asked.ids) :] = 1
        most = max(self._turns.room(asked) for _, asked in batch)
        processors = LogitsProcessorList()
        if config.temperature:
            seeds = [own_seed(config.seed, dialogue.index, turn) for dialogue, _ in batch]
            rule = SamplingRule(
                temperature=config.temperature, top_p=config.top_p, top_k=config.top_k, min_p=config.min_p
            )
            processors.append(OwnDraws(rule, seeds))
        try:
            generated = self.model.generate(
                input_ids=ids_BS.to(self.model.device),
                attention_mask=real_BS.to(self.model.device),
                max_new_tokens=most,
                logits_processor=processors,
            )
        except torch.OutOfMemoryError as error:
            raise DflashError(
                f"{len(batch)} rows of up to {width + most} tokens do not fit the device's memory. Start anew with a "
                f"smaller --batch-rows or --max-new-tokens, into another --out."
            ) from error
        new: list[list[int]] = generated[:, width:].tolist()
        return new


def window_rows(config: RegenerateConfig) -> int:
    """Return how many rows are answered turn by turn together: whole windows, from the first row of the data."""
    return WINDOW_BATCHES * config.batch_rows


class OwnDraws:
    """Leaves each row one token, drawn by a random generator of the row's own, whichever rows are beside it."""

    def __init__(self, rule: SamplingRule, seeds: list[int]) -> None:
        self._rule = rule
        self._generators = [np.random.default_rng(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores [B, V] of which the drawn token's alone is finite."""
        cumulative = self._rule.probabilities(scores).double().cumsum(dim=-1)
        shares = torch.tensor([[generator.random()] for generator in self._generators], dtype=torch.float64)
        drawn = torch.searchsorted(cumulative, shares.to(scores.device) * cumulative[:, -1:], right=True)
        drawn.clamp_(max=scores.shape[-1] - 1)
        return torch.full_like(scores, -torch.inf).scatter(1, drawn, 0.0)
