"""vLLM as it continues token ids, stepped in the caller's thread."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from dflash_offline.schemas.errors import DflashError
from dflash_offline.stages.capture.engines.installed import EngineConfig
from dflash_offline.stages.capture.engines.start import common_arguments, engine_fault, started

MOST_SEQUENCES = 256
"""Sequences that are continued at once, where the user says nothing else."""
_LESS_MEMORY = "lower max_num_seqs or max_model_len in --engine-args with a new --out"


class Generator:
    """Continues sequences of token ids, many at once; a new one may join at every step."""

    def __init__(self, engine: Any, parameters: Callable[..., Any]) -> None:
        """`parameters` makes vLLM's sampling parameters from their fields."""
        self._engine = engine
        self._parameters = parameters
        self._open: dict[str, list[int]] = {}

    def add(self, name: str, ids: list[int], **fields: Any) -> None:
        """Queue token ids under a name that no other sequence has had; `fields` are of vLLM's sampling parameters."""
        self._open[name] = ids
        self._guarded(lambda: self._engine.add_request(name, {"prompt_token_ids": ids}, self._parameters(**fields)))

    def step(self) -> list[tuple[str, list[int]]]:
        """Run one step; returns the sequences that ended in it, each with its new token ids, an end token included.

        Raises `DflashError` where the engine stops, or ran other token ids than it was given.
        """
        ended = []
        for output in self._guarded(self._engine.step):
            if not output.finished:
                continue
            if list(output.prompt_token_ids) != self._open.pop(output.request_id):
                raise DflashError("vLLM ran other token ids than it was given, so its answers are to another text.")
            (answer,) = output.outputs
            if answer.finish_reason not in ("stop", "length"):
                raise DflashError(
                    f"vLLM ended an answer by {answer.finish_reason!r}, neither at an end token nor at its length. "
                    f"The answers so far are kept: repeat the command to go on."
                )
            ended.append((output.request_id, list(answer.token_ids)))
        return ended

    def _guarded(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except Exception as error:
            raise engine_fault(error, "The answers so far are kept", _LESS_MEMORY) from error

    def close(self) -> None:
        """End the engine."""
        with suppress(Exception):  # of an engine that is dead already
            self._engine.engine_core.shutdown()


def start_generator(
    config: EngineConfig, folder: Path, device: torch.device, dtype: torch.dtype, positions: int
) -> Generator:
    """Return vLLM's engine for sequences of up to so many positions; `DflashError` says why it does not start."""

    def build() -> Generator:
        from vllm import EngineArgs, SamplingParams
        from vllm.v1.engine.llm_engine import LLMEngine

        # Without its own values, as of repetition_penalty: the draws are to be the target's.
        defaults = {"max_num_seqs": MOST_SEQUENCES, "max_model_len": positions, "generation_config": "vllm"}
        arguments = common_arguments(config, folder, device, dtype, **defaults)
        return Generator(LLMEngine.from_engine_args(EngineArgs(**arguments)), SamplingParams)

    generator: Generator = started(folder, _LESS_MEMORY, build)
    return generator
