"""vLLM as it gives states: an engine in this process, whose workers put each sequence's states in shared memory.

Axes: T tokens, L captured layers, H hidden size.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dflash_offline.schemas.settings.extract import ExtractConfig
from dflash_offline.stages.capture.engines.loop import LESS_MEMORY, EngineLoop, Request
from dflash_offline.stages.capture.engines.shared_memory import SharedMemory
from dflash_offline.stages.capture.engines.start import common_arguments, started
from dflash_offline.stages.capture.inputs import ChosenTarget

_CONNECTOR = "dflash_offline.stages.capture.engines.connector"
_FIRST_LAYERS = "dflash_offline.stages.capture.engines.first_layers"
_MOST_SEQUENCES = 256
FIRST_LAYERS = "dflash_first_layers"
"""vLLM's load format that leaves out layers behind those of the model's config."""


@dataclass
class Room:
    """A part of the shared memory that holds the raw states of a shard, or of a batch."""

    begin: int
    states: Tensor
    """[T, L, H] in the target's dtype."""

    def place(self, token: int) -> int:
        """Return where a token's states begin, in bytes of the shared memory."""
        return self.begin + token * self.states[0].nbytes


class Copies:
    """Counts the samples of a shard whose codes are in its buffer."""

    def __init__(self, count: int) -> None:
        self._left = count
        self._fault: BaseException | None = None
        self._changed = threading.Condition()

    def one(self, fault: BaseException | None) -> None:
        """Count a sample, or note what went wrong."""
        with self._changed:
            self._left -= 1
            self._fault = self._fault or fault
            self._changed.notify_all()

    def synchronize(self) -> None:
        """Wait for all of them; raises what went wrong."""
        with self._changed:
            self._changed.wait_for(lambda: self._fault is not None or self._left <= 0)
        if self._fault is not None:
            raise self._fault


class StateEngine:
    """Gives the states of a target's layers, [T, L, H], for token ids."""

    def __init__(self, config: ExtractConfig, target: ChosenTarget) -> None:
        self.config, self.target = config, target
        self.memory = SharedMemory()
        self._loop: EngineLoop | None = None

    def start(self, num_tokens: int) -> None:
        """Start the engine, with room for so many tokens that `states` runs at once.

        Raises `DflashError` where vLLM cannot run the target.
        """
        self._batch_room = self.room(num_tokens)
        self._loop = start_engine(self.config, self.target, self.memory.path)

    def num_bytes(self, num_tokens: int) -> int:
        """Return the bytes of so many tokens' states."""
        return prod(self._shape(num_tokens)) * self.target.dtype.itemsize

    def _shape(self, num_tokens: int) -> tuple[int, int, int]:
        return num_tokens, len(self.target.layer_ids), int(self.target.files.text_config.hidden_size)

    def room(self, num_tokens: int) -> Room:
        """Return new room for the states of so many tokens."""
        begin = self.memory.grow(self.num_bytes(num_tokens))
        return Room(begin, self.memory.view(begin, self._shape(num_tokens), self.target.dtype))

    def submit(self, requests: Sequence[Request]) -> None:
        """Queue requests, which the engine batches as it likes."""
        assert self._loop is not None, "the engine is started before it runs samples"
        self._loop.submit(requests)

    def states(
        self, sequences: Sequence[Sequence[int]], drawn: dict[int, tuple[int, float]] | None = None
    ) -> list[Tensor]:
        """Return the states of sequences, [T, L, H] each in float32, run at once.

        `drawn` becomes the likeliest token after each and its log-probability, by the sequence's number.
        """
        begins = np.cumsum([0, *map(len, sequences)]).tolist()
        copies = Copies(len(sequences))
        room = self._batch_room
        self.submit(
            [
                Request(
                    list(ids),
                    room.place(begin),
                    copies.one,
                    None if drawn is None else partial(drawn.__setitem__, number),
                )
                for number, (ids, begin) in enumerate(zip(sequences, begins, strict=False))
            ]
        )
        copies.synchronize()
        places = [slice(begin, begin + len(ids)) for ids, begin in zip(sequences, begins, strict=False)]
        return [room.states[place].to(torch.float32, copy=True) for place in places]  # the room is used again

    def forget_prefixes(self) -> None:
        """Have the engine compute all of the next sequences; to be called where none is under way."""
        assert self._loop is not None
        self._loop.forget_prefixes()

    def close(self) -> None:
        """End the engine, and give back its memory."""
        if self._loop is not None:
            self._loop.close()
            self._loop = None
        self.memory.close()


def start_engine(config: ExtractConfig, target: ChosenTarget, shared_memory: str) -> EngineLoop:
    """Return vLLM's engine, started; `DflashError` says what keeps it from starting, and what to change."""

    def build() -> EngineLoop:
        from vllm import EngineArgs, SamplingParams
        from vllm.config import KVTransferConfig
        from vllm.v1.engine.llm_engine import LLMEngine

        import_module(_FIRST_LAYERS)  # names the load format
        transfer = KVTransferConfig(
            kv_connector="StateConnector",
            kv_role="kv_producer",
            kv_connector_module_path=_CONNECTOR,
            kv_connector_extra_config={"shared_memory": shared_memory},
        )
        arguments = engine_arguments(config, target)
        engine = LLMEngine.from_engine_args(EngineArgs(**arguments, kv_transfer_config=transfer))
        from dflash_offline.stages.capture.engines.connector import DELIVERED

        def parameters(begin: int, is_told: bool) -> Any:
            extra = {"kv_transfer_params": {"begin": begin}}
            told = 0 if is_told else None  # log-probabilities beside that of what is drawn
            return SamplingParams(temperature=0, max_tokens=1, detokenize=False, logprobs=told, extra_args=extra)

        return EngineLoop(engine, DELIVERED, parameters)

    loop: EngineLoop = started(target.files.folder, LESS_MEMORY, build)
    return loop


def engine_arguments(config: ExtractConfig, target: ChosenTarget) -> dict[str, Any]:
    """Return the arguments of vLLM's engine. Its layer k is `hidden_states[k]`, which our layer k - 1 puts out."""
    layers = {"eagle_aux_hidden_state_layer_ids": [layer + 1 for layer in target.layer_ids]}
    most = min(_MOST_SEQUENCES, config.batch_tokens)
    return {
        **common_arguments(config, target.files.folder, target.device, target.dtype, max_num_seqs=most),
        **_without_last_layers(config, target),
        "max_model_len": config.max_length + 1,
        "max_num_batched_tokens": config.batch_tokens,
        "speculative_config": {
            "method": "extract_hidden_states",
            "num_speculative_tokens": 1,
            "draft_model_config": {"hf_config": layers},
        },
    }


def _without_last_layers(config: ExtractConfig, target: ChosenTarget) -> dict[str, Any]:
    """Return the arguments by which vLLM runs no layer behind the last captured one, as transformers runs none.

    There are none where it is not clear what else would have to change: the decoder is a part of another model, or the
    user's own arguments say how the target is loaded.
    """
    num_layers, files = max(target.layer_ids) + 1, target.files
    is_part = files.config is not files.text_config
    if num_layers == files.num_layers or is_part or {"hf_overrides", "load_format"} & config.engine_args.keys():
        return {}
    listed = {
        name: value[:num_layers]
        for name, value in files.config.to_dict().items()
        if isinstance(value, list) and len(value) == files.num_layers
    }
    return {
        "hf_overrides": {**listed, "num_hidden_layers": num_layers},
        "load_format": FIRST_LAYERS,
        "worker_extension_cls": f"{_FIRST_LAYERS}.FirstLayers",
    }
