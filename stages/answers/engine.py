"""Answers from vLLM in this process: prompts go in as token ids, and answers come out as token ids."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from typing import Any

from dflash_offline.schemas.settings.regenerate import RegenerateConfig
from dflash_offline.stages.answers.chat_completions import sampling_fields
from dflash_offline.stages.answers.dialogues import Answer, Dialogue, own_seed
from dflash_offline.stages.answers.readings import Asked
from dflash_offline.stages.answers.turns import TargetTurns
from dflash_offline.stages.capture.engines.generation import MOST_SEQUENCES, Generator, start_generator
from dflash_offline.stages.capture.engines.installed import engine_identity, vllm_version
from dflash_offline.stages.progress import Progress


class EngineAnswerer:
    """Answers dialogues with the target as vLLM runs it.

    vLLM batches as it likes, so that a near tie may be decided otherwise when a dialogue is answered again.
    """

    def __init__(self, config: RegenerateConfig, progress: Progress) -> None:
        vllm_version()  # refuses before any work
        self.config = config
        self.progress = progress
        self._turns = TargetTurns(config, most_positions=config.engine_args.get("max_model_len"))
        self._most_at_once = int(config.engine_args.get("max_num_seqs", MOST_SEQUENCES))

    def identity(self) -> dict[str, Any]:
        """Return what decides the answers."""
        turns = self._turns
        return {"target": turns.identity(), "device": turns.device.type, **engine_identity(self.config)}

    def origin(self) -> dict[str, Any]:
        """Return what is recorded of the target and never compared."""
        return self._turns.origin()

    def answer(self, dialogues: Iterable[Dialogue], note: Callable[..., None], num_open: int) -> None:
        """Answer every open turn of the dialogues, and note each answer as it comes."""
        if not num_open:
            return
        turns = self._turns
        self.progress.say(f"Starting vLLM {vllm_version()} with {turns.files.folder} ({turns.dtype}).")
        generator = start_generator(self.config, turns.files.folder, turns.device, turns.dtype, turns.positions)
        with closing(generator):
            self._answer_all((dialogue for dialogue in dialogues if dialogue.is_open), note, generator)

    def _answer_all(self, waiting: Iterator[Dialogue], note: Callable[..., None], generator: Generator) -> None:
        under_way: dict[str, tuple[Dialogue, Asked]] = {}

        def keep(dialogue: Dialogue, answer: Answer) -> None:
            dialogue.add(answer)
            unfinished = [other.index for other, _ in under_way.values()] + [dialogue.index] * dialogue.is_open
            note([(dialogue, answer)], min(unfinished, default=None))

        def begin(dialogue: Dialogue) -> None:
            turn = len(dialogue.answers)
            asked = self._turns.ask(dialogue, turn)
            if isinstance(asked, Answer):
                keep(dialogue, asked)
            else:
                name = f"{dialogue.index}.{turn}"
                under_way[name] = dialogue, asked
                generator.add(name, asked.ids, **self._fields(dialogue, asked))

        while True:
            while len(under_way) < self._most_at_once and (dialogue := next(waiting, None)) is not None:
                begin(dialogue)
            if not under_way:
                return
            for name, ids in generator.step():
                dialogue, asked = under_way.pop(name)
                keep(dialogue, self._turns.read(dialogue, asked, ids, len(dialogue.answers)))
                if dialogue.is_open:  # at once, while vLLM still has what stands before
                    begin(dialogue)

    def _fields(self, dialogue: Dialogue, asked: Asked) -> dict[str, Any]:
        """Return the fields of vLLM's sampling parameters: those that a server is sent, and the target's end tokens."""
        config = self.config
        fields = {
            **sampling_fields(config),
            "temperature": config.temperature,
            "max_tokens": self._turns.room(asked),
            "stop_token_ids": self._turns.end_ids,
            "detokenize": False,
        }
        if config.temperature:
            fields["seed"] = own_seed(config.seed, dialogue.index, len(dialogue.answers))
        return fields
