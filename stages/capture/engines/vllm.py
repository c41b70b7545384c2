"""The target run by vLLM: an engine in this process, whose workers put each sample's states in shared memory.

vLLM batches as it likes, so that two runs are equal in value and not in the last bits.

Axes: N real tokens of a batch, T tokens, L captured layers, H hidden size.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dflash_offline.schemas.errors import DflashError
from dflash_offline.schemas.manifest import Layout, is_by_length
from dflash_offline.schemas.samples import SampleTable
from dflash_offline.schemas.settings.extract import ExtractConfig
from dflash_offline.stages.capture.encode import FeatureEncoder
from dflash_offline.stages.capture.engines.installed import vllm_version
from dflash_offline.stages.capture.engines.loop import LESS_MEMORY, EngineLoop, Request
from dflash_offline.stages.capture.engines.shared_memory import SharedMemory
from dflash_offline.stages.capture.engines.start import common_arguments, started
from dflash_offline.stages.capture.engines.trial import Reference, reference_states, refuse_untrue_states
from dflash_offline.stages.capture.inputs import ChosenTarget
from dflash_offline.stages.capture.runner import encode_states, free_dropped_memory, load_unchanged, micro_batches
from dflash_offline.stages.capture.shard import QueuedShard, ShardBuffer, Wanted
from dflash_offline.stages.cores import usable_memory_bytes
from dflash_offline.stages.progress import Progress, readable_bytes
from dflash_offline.stages.target.model import embedding_tensors

_CONNECTOR = "dflash_offline.stages.capture.engines.connector"
_MOST_SEQUENCES = 256
_BESIDE_WEIGHTS = 1.1
"""Memory of a target whose layers run a short sample, over that of its weights."""


@dataclass
class _Room:
    """A part of the shared memory that holds the raw states of a shard, or of a batch."""

    begin: int
    states: Tensor
    """[T, L, H] in the target's dtype."""

    def place(self, token: int) -> int:
        """Return where a token's states begin, in bytes of the shared memory."""
        return self.begin + token * self.states[0].nbytes


class _Copies:
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


class VllmExtractor:
    """Runs the target by vLLM; `start` brings the engine up, after transformers has run some samples."""

    num_buffers = 2

    def __init__(self, config: ExtractConfig, target: ChosenTarget, model: Any, *, by_length: bool) -> None:
        """`model` is the target as transformers runs it."""
        self.layer_ids = list(target.layer_ids)
        self.device = target.device
        self.config, self.target = config, target
        self._by_length = by_length
        self._embeddings = {name: tensor.cpu().clone() for name, tensor in embedding_tensors(model).items()}
        self._model: Any = model
        self._memory = SharedMemory()
        self._rooms: dict[int, _Room] = {}
        self._loop: EngineLoop | None = None
        self._encoding = ThreadPoolExecutor(1, thread_name_prefix="encode")

    def embeddings(self) -> dict[str, Tensor]:
        """Return the target's embedding table, and its head unless it is the same."""
        return self._embeddings

    def start(self, samples: SampleTable, progress: Progress) -> None:
        """Start the engine and prove it on some of the plan's samples, which transformers runs first.

        Raises `DflashError` where vLLM cannot run the target, or gives states other than transformers'.
        """
        progress.say("Running some samples by transformers, to compare vLLM's states with.")
        reference = reference_states(self._model, self.target.files.num_layers, self.layer_ids, samples)
        self._model = None
        free_dropped_memory(self.device)
        proof_tokens = sum(map(len, reference.ids))
        self._batch_room = self._room(max(self.config.batch_tokens, self.config.max_length, proof_tokens))
        shards = self.num_buffers * (self.config.shard_mib << 20) * self.target.dtype.itemsize // 2
        progress.say(
            f"Starting vLLM {vllm_version()}; states take up to {readable_bytes(self._memory.num_bytes + shards)} of "
            f"memory on their way."
        )
        self._loop = start_engine(self.config, self.target, self._memory.path)
        self._prove(reference, progress)

    def _prove(self, reference: Reference, progress: Progress) -> None:
        """Refuse states that are not the reference's: of all its samples at once, twice, and of one at a time."""
        assert self._loop is not None
        together = [self.states(reference.ids) for _ in range(2)]  # the second time from cached prefixes
        self._loop.forget_prefixes()
        alone = [state for ids in reference.ids for state in self.states([ids])]
        runs = {"in a batch": together[0], "in a batch again": together[1], "one at a time": alone}
        progress.say(refuse_untrue_states(self.config, self.target, reference, runs))

    def states(self, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
        """Return the states of sequences, [T, L, H] each in float32, run at once."""
        begins = np.cumsum([0, *map(len, sequences)]).tolist()
        copies = _Copies(len(sequences))
        room = self._batch_room
        requests = [
            Request(list(ids), room.place(begin), copies.one) for ids, begin in zip(sequences, begins, strict=False)
        ]
        self._submit(requests)
        copies.synchronize()
        places = [slice(begin, begin + len(ids)) for ids, begin in zip(sequences, begins, strict=False)]
        return [room.states[place].to(torch.float32, copy=True) for place in places]  # the room is used again

    def _submit(self, requests: Sequence[Request]) -> None:
        assert self._loop is not None, "the engine is started before it runs samples"
        self._loop.submit(requests)

    def _room(self, num_tokens: int) -> _Room:
        """Return new room for the states of so many tokens."""
        shape = (num_tokens, len(self.layer_ids), int(self.target.files.text_config.hidden_size))
        begin = self._memory.grow(int(np.prod(shape)) * self.target.dtype.itemsize)
        return _Room(begin, self._memory.view(begin, shape, self.target.dtype))

    def batches(self, samples: SampleTable, members: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """Return groups of samples that fit the room of a batch."""
        return micro_batches(samples, members, self.config.batch_tokens, least=self._by_length)

    def buffer(self, layout: Layout, fill: int) -> ShardBuffer:
        """Return a new shard buffer, with room for its raw states beside it."""
        buffer = ShardBuffer.empty(layout, fill, pinned=False)
        self._rooms[buffer.codes.data_ptr()] = self._room(layout.shard_tokens)
        return buffer

    def run_batch(
        self, samples: SampleTable, batch: NDArray[np.int64], encoders: Mapping[str, FeatureEncoder]
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Return codes, int16 [N, L, H], and `TOKEN_STATISTICS`, float32 [N, L, 7], of the samples' tokens in order."""
        ((array, encoder),) = encoders.items()  # the settings refuse final states of vllm
        states = self.states([samples.input_ids(sample).tolist() for sample in batch.tolist()])
        encoded = [_encode(state, encoder) for state in states]
        return {array: (torch.cat([codes for codes, _ in encoded]), torch.cat([found for _, found in encoded]))}

    def run_shard(
        self,
        samples: SampleTable,
        members: NDArray[np.int64],
        wanted: Sequence[Wanted],
        progress: Callable[[int], None],
    ) -> list[QueuedShard]:
        """Queue a shard's samples in the engine, and return; each is encoded as its states come."""
        (hidden,) = wanted
        encoder, buffer = hidden.encoder, hidden.buffer
        copies, batches = _Copies(len(members)), list[tuple[NDArray[np.int64], Tensor]]()
        room = self._rooms[buffer.codes.data_ptr()]

        def encode(sample: int, slots: slice) -> None:
            try:
                codes, statistics = _encode(room.states[slots], encoder)
                buffer.codes[slots] = codes
                batches.append((np.array([sample]), statistics))
                progress(len(codes))
                copies.one(None)
            except BaseException as error:
                copies.one(error)

        def request(sample: int) -> Request:
            begin, ids = int(samples.start[sample]) % len(buffer.codes), samples.input_ids(sample).tolist()
            slots = slice(begin, begin + len(ids))

            def done(fault: BaseException | None) -> None:
                copies.one(fault) if fault else self._encoding.submit(encode, sample, slots)

            return Request(ids, room.place(begin), done)

        self._submit([request(sample) for sample in members.tolist()])
        return [QueuedShard(buffer, samples, self.layer_ids, batches, copies)]

    def close(self) -> None:
        """End the engine."""
        self._model = None
        self._encoding.shutdown(wait=False, cancel_futures=True)
        if self._loop is not None:
            self._loop.close()
            self._loop = None
        self._memory.close()
        with suppress(RuntimeError):  # of a GPU that a dead engine left in a fault
            free_dropped_memory(self.device)


def _encode(states: Tensor, encoder: FeatureEncoder) -> tuple[Tensor, Tensor]:
    """Return codes, int16, and statistics, float32, of states [T, L, H]."""
    return encode_states(states[None].unbind(2), torch.arange(len(states)), encoder, states.device)


def load_vllm(
    config: ExtractConfig, target: ChosenTarget, identity: dict[str, Any], progress: Progress
) -> VllmExtractor:
    """Return the target for vLLM, loaded by transformers for now and checked to be one that a draft can be served with.

    Raises `MismatchError` if its files are no longer those of the cache's `identity`, which were hashed before.
    """
    device = room_for_transformers(target)
    if device != target.device:
        progress.say(f"{target.files.folder} does not fit {target.device} whole: transformers runs it in host memory.")
    model = load_unchanged(config, target, identity, device, progress)
    return VllmExtractor(config, target, model, by_length=is_by_length(identity))


def room_for_transformers(target: ChosenTarget) -> torch.device:
    """Return where the whole target fits as transformers loads it, for the samples that vLLM's states are held against.

    That is its own device, or the host. Raises `DflashError` if it fits neither.
    """
    weights = sum(path.stat().st_size for path in target.files.folder.glob("*.safetensors"))
    needed = int(_BESIDE_WEIGHTS * weights * max(1, target.dtype.itemsize / 2))
    if target.device.type == "cuda" and torch.cuda.mem_get_info(target.device)[0] >= needed:
        return target.device
    if (most := usable_memory_bytes()) < needed:
        raise DflashError(
            f"vLLM's states are proved against transformers' before a shard is written, and {target.files.folder} "
            f"fits neither one GPU nor the host as transformers loads it: it needs about {readable_bytes(needed)}, "
            f"and the host has {readable_bytes(most)}. Run this on a machine with more memory."
        )
    return torch.device("cpu")


def start_engine(config: ExtractConfig, target: ChosenTarget, shared_memory: str) -> EngineLoop:
    """Return vLLM's engine, started; `DflashError` says what keeps it from starting, and what to change."""

    def build() -> EngineLoop:
        from vllm import EngineArgs, SamplingParams
        from vllm.config import KVTransferConfig
        from vllm.v1.engine.llm_engine import LLMEngine

        transfer = KVTransferConfig(
            kv_connector="StateConnector",
            kv_role="kv_producer",
            kv_connector_module_path=_CONNECTOR,
            kv_connector_extra_config={"shared_memory": shared_memory},
        )
        arguments = engine_arguments(config, target)
        engine = LLMEngine.from_engine_args(EngineArgs(**arguments, kv_transfer_config=transfer))
        from dflash_offline.stages.capture.engines.connector import DELIVERED

        def parameters(begin: int) -> Any:
            extra = {"kv_transfer_params": {"begin": begin}}
            return SamplingParams(temperature=0, max_tokens=1, detokenize=False, extra_args=extra)

        return EngineLoop(engine, DELIVERED, parameters)

    loop: EngineLoop = started(target.files.folder, LESS_MEMORY, build)
    return loop


def engine_arguments(config: ExtractConfig, target: ChosenTarget) -> dict[str, Any]:
    """Return the arguments of vLLM's engine. Its layer k is `hidden_states[k]`, which our layer k - 1 puts out."""
    layers = {"eagle_aux_hidden_state_layer_ids": [layer + 1 for layer in target.layer_ids]}
    most = min(_MOST_SEQUENCES, config.batch_tokens)
    return {
        **common_arguments(config, target.files.folder, target.device, target.dtype, max_num_seqs=most),
        "max_model_len": config.max_length + 1,
        "max_num_batched_tokens": config.batch_tokens,
        "speculative_config": {
            "method": "extract_hidden_states",
            "num_speculative_tokens": 1,
            "draft_model_config": {"hf_config": layers},
        },
    }
