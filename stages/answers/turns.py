"""A turn that the target answers here: what it is asked, as token ids, and what its own token ids say."""

from typing import Any

from dflash_offline.schemas.errors import DflashError
from dflash_offline.schemas.files import sha256_bytes
from dflash_offline.schemas.sealed import canonical_json
from dflash_offline.schemas.settings.engine import TRANSFORMERS
from dflash_offline.schemas.settings.regenerate import RegenerateConfig
from dflash_offline.stages.answers.dialogues import (
    PROMPT_TOO_LONG,
    REFUSED_BY_TEMPLATE,
    TRUNCATED,
    Answer,
    Dialogue,
)
from dflash_offline.stages.answers.readings import AnswerReader, Asked
from dflash_offline.stages.bounds import bounded
from dflash_offline.stages.conversations.rendering import ROW_ERRORS
from dflash_offline.stages.target.files import TargetFiles, open_target
from dflash_offline.stages.target.model import choose_device, quiet_libraries, resolve_dtype


class TargetTurns:
    """The target's files, by which its turns are asked and read, whatever runs it."""

    def __init__(self, config: RegenerateConfig, most_positions: int | None = None) -> None:
        """`most_positions` is the length of prompt and answer that what runs the target has room for."""
        quiet_libraries()
        assert config.target is not None
        self.config = config
        self.files: TargetFiles = open_target(
            config.target,
            revision=config.revision,
            trust_remote_code=config.trust_remote_code,
            by_transformers=config.engine == TRANSFORMERS,
        )
        self.device = choose_device(config.device)
        self.dtype = resolve_dtype(config.dtype, self.device, self.files.config)
        self.end_ids = sorted(self.files.end_ids())
        if not self.end_ids:
            raise DflashError(
                f"{self.files.folder} names no token at which an answer ends. Put eos_token_id into its "
                f"generation_config.json."
            )
        self.positions = min(self.files.num_positions, most_positions or self.files.num_positions)
        # Where a longer row changes the rotary table of all rows beside it, every row must end before.
        self._prompt_positions = self.positions - (config.max_new_tokens if self.files.table_changes else 0)
        if self._prompt_positions < 1:
            raise DflashError(
                f"{self.files.folder} turns all rows of a batch by another rotary table (longrope) once one is longer "
                f"than {self.positions} tokens, so that answers would depend on the rows beside them. "
                f"--max-new-tokens is {config.max_new_tokens}; expected less than {self.positions}, with room for the "
                f"prompts."
            )
        self._reader = AnswerReader(self.files, config.chat_template_kwargs, keep_rewritten=config.keep_rewritten)

    def identity(self, **run_by: Any) -> dict[str, Any]:
        """Return what decides the target's answers: its files, and how it is run."""
        template = self._reader.response_template
        read = {} if template is None else {"response_template_sha256": sha256_bytes(canonical_json(template))}
        return {**self.files.identity(), "dtype": str(self.dtype).removeprefix("torch."), **run_by, **read}

    def origin(self) -> dict[str, Any]:
        """Return what is recorded of the target and never compared."""
        return {"target": self.files.name, "revision": self.config.revision}

    def ask(self, dialogue: Dialogue, turn: int) -> Asked | Answer:
        """Return what is given to the target, up to where the answer begins, or why there can be no answer."""
        with bounded(self._reader.template_origin, f"{dialogue.source}:{dialogue.line}, turn {turn}"):
            try:
                asked = self._reader.ask(dialogue.prompt(turn), dialogue.tools, dialogue.recorded[turn])
            except ROW_ERRORS as error:
                return Answer(fault=REFUSED_BY_TEMPLATE, detail=f"turn {turn}: {str(error)[:200]}")
        if not 0 < len(asked.ids) < self._prompt_positions:
            beside = f", {self.config.max_new_tokens:,} of them for the answer" if self.files.table_changes else ""
            found = f"{len(asked.ids):,} tokens" if asked.ids else f"{len(asked.text):,} characters"
            detail = f"turn {turn}: {found}; the target has {self.positions:,} positions{beside}"
            return Answer(fault=PROMPT_TOO_LONG, detail=detail)
        return asked

    def room(self, asked: Asked) -> int:
        """Return how many tokens an answer may have."""
        return min(self.config.max_new_tokens, self.positions - len(asked.ids))

    def read(self, dialogue: Dialogue, asked: Asked, ids: list[int], turn: int) -> Answer:
        """Return what new tokens say up to the end token, or why that is no answer; what follows is left out."""
        ids = ids[: self.positions - len(asked.ids)]
        end = next((place for place, token in enumerate(ids) if token in self.end_ids), None)
        if end is None:
            return Answer(fault=TRUNCATED, detail=f"turn {turn}: no end within {len(ids)} tokens")
        with bounded(self._reader.template_origin, f"{dialogue.source}:{dialogue.line}, turn {turn}"):
            return self._reader.read(asked, ids[: end + 1], turn)
