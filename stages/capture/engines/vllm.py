"""The target run by vLLM in the place of transformers: its states are proved, encoded as they come, and put in shards.

vLLM batches as it likes, so that two runs are equal in value and not in the last bits.

Axes: N real tokens of a batch, T tokens, L captured layers, H hidden size.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dflash_offline.schemas.errors import DflashError
from dflash_offline.schemas.manifest import HIDDEN, Layout, is_by_length
from dflash_offline.schemas.samples import SampleTable
from dflash_offline.schemas.settings.extract import ExtractConfig
from dflash_offline.stages.capture.encode import FeatureEncoder
from dflash_offline.stages.capture.engines.installed import vllm_version
from dflash_offline.stages.capture.engines.loop import Request
from dflash_offline.stages.capture.engines.second_layout import SecondLayout
from dflash_offline.stages.capture.engines.states import Copies, Room, StateEngine
from dflash_offline.stages.capture.engines.trial import Reference, TransformersReference, refuse_untrue_states
from dflash_offline.stages.capture.inputs import ChosenTarget
from dflash_offline.stages.capture.runner import (
    encode_states,
    free_dropped_memory,
    load_unchanged,
    micro_batches,
    refuse_changed_target,
)
from dflash_offline.stages.capture.shard import QueuedShard, ShardBuffer, Wanted, stored_spans
from dflash_offline.stages.cores import usable_memory_bytes
from dflash_offline.stages.progress import Progress, readable_bytes
from dflash_offline.stages.target.borrowed import FinalNorm, read_borrowed
from dflash_offline.stages.target.checkpoint import UnreadableCheckpointError, refuse_unreadable_checkpoint
from dflash_offline.stages.target.model import TargetLoadError

Proof = TransformersReference | SecondLayout
_BESIDE_WEIGHTS = 1.1
"""Memory of a target whose layers run a short sample, over that of its weights."""


class VllmExtractor:
    """Runs the target by vLLM; `start` brings the engine up, after what its states are held against has run."""

    num_buffers = 2

    def __init__(
        self,
        config: ExtractConfig,
        target: ChosenTarget,
        proof: TransformersReference | SecondLayout,
        norm: FinalNorm | None,
        *,
        by_length: bool,
    ) -> None:
        """`proof` gives the states of some samples; with the target's final `norm` there are final states."""
        self.layer_ids = list(target.layer_ids)
        self.device = target.device
        self.config, self.target = config, with_last_layer(config, target)
        self._norm = norm
        self._columns = [self.target.layer_ids.index(layer) for layer in self.layer_ids]
        self._by_length = by_length
        self._proof = proof
        self._embeddings: Mapping[str, Tensor] = proof.embeddings()
        self._engine = StateEngine(config, self.target)
        self._rooms: dict[int, Room] = {}
        self._encoding = ThreadPoolExecutor(1, thread_name_prefix="encode")

    def embeddings(self) -> dict[str, Tensor]:
        """Return the target's embedding table, and its head unless it is the same."""
        return dict(self._embeddings)

    def start(self, samples: SampleTable, progress: Progress) -> None:
        """Start the engine and prove it on some of the plan's samples.

        Raises `DflashError` where vLLM cannot run the target, or gives states other than those it is held against.
        """
        reference = self._proof.states(samples, progress)
        self._proof.close()
        num_tokens = max(self.config.batch_tokens, self.config.max_length, sum(map(len, reference.ids)))
        share = len(self.target.layer_ids) / len(self.layer_ids) * self.target.dtype.itemsize / 2
        shards = int(self.num_buffers * (self.config.shard_mib << 20) * share)
        progress.say(
            f"Starting vLLM {vllm_version()}; states take up to "
            f"{readable_bytes(self._engine.num_bytes(num_tokens) + shards)} of memory on their way."
        )
        self._engine.start(num_tokens)
        self._prove(reference, progress)

    def _prove(self, reference: Reference, progress: Progress) -> None:
        """Refuse states that are not the reference's: of all its samples at once, twice, and of one at a time."""
        engine = self._engine
        together = [engine.states(reference.ids) for _ in range(2)]  # the second time from cached prefixes
        engine.forget_prefixes()
        alone = [state for ids in reference.ids for state in engine.states([ids])]
        runs = {"in a batch": together[0], "in a batch again": together[1], "one at a time": alone}
        progress.say(refuse_untrue_states(self.config, self.target, reference, runs, self._norm))

    def batches(self, samples: SampleTable, members: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """Return groups of samples that fit the room of a batch."""
        return micro_batches(samples, members, self.config.batch_tokens, least=self._by_length)

    def buffer(self, layout: Layout, fill: int) -> ShardBuffer:
        """Return a new shard buffer."""
        return ShardBuffer.empty(layout, fill, pinned=False)

    def run_batch(
        self, samples: SampleTable, batch: NDArray[np.int64], encoders: Mapping[str, FeatureEncoder]
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Return codes, int16 [N, L, H], and `TOKEN_STATISTICS`, float32 [N, L, 7], of each array that has an encoder.

        They are of the positions of the samples that the array keeps, in order.
        """
        states = self._engine.states([samples.input_ids(sample).tolist() for sample in batch.tolist()])
        begins = np.cumsum([0, *map(len, states)]).tolist()
        group, together = list(zip(batch.tolist(), begins, strict=False)), torch.cat(states)
        return {
            array: self._encode(together, _places(samples, group, array), array, encoder)
            for array, encoder in encoders.items()
        }

    def run_shard(
        self,
        samples: SampleTable,
        members: NDArray[np.int64],
        wanted: Sequence[Wanted],
        progress: Callable[[int], None],
    ) -> list[QueuedShard]:
        """Queue a shard's samples in the engine, and return; those that have come are encoded together."""
        copies, room = Copies(len(members)), self._room(wanted[0].buffer)
        batches: dict[str, list[tuple[NDArray[np.int64], Tensor]]] = {one.array: [] for one in wanted}
        arrived = deque[tuple[int, int]]()

        def encode() -> None:
            group = [arrived.popleft() for _ in range(len(arrived))]
            if not group:  # they were encoded with one before
                return
            fault: BaseException | None = None
            batch = np.array([sample for sample, _ in group])
            try:
                for one in wanted:
                    places = _places(samples, group, one.array)
                    one.buffer.codes[places], statistics = self._encode(room.states, places, one.array, one.encoder)
                    batches[one.array].append((batch, statistics))
                progress(int(samples.num_tokens[batch].sum()))
            except BaseException as error:
                fault = error
            for _ in group:
                copies.one(fault)

        def request(sample: int) -> Request:
            begin = int(samples.start[sample]) % len(room.states)

            def done(fault: BaseException | None) -> None:
                if fault is not None:
                    copies.one(fault)
                    return
                arrived.append((sample, begin))
                self._encoding.submit(encode)

            return Request(samples.input_ids(sample).tolist(), room.place(begin), done)

        self._engine.submit([request(sample) for sample in members.tolist()])
        last = [self.target.files.num_layers - 1]
        return [
            QueuedShard(
                one.buffer,
                samples,
                self.layer_ids if one.array == HIDDEN else last,
                batches[one.array],
                copies,
                one.array,
            )
            for one in wanted
        ]

    def _room(self, buffer: ShardBuffer) -> Room:
        """Return the room for the raw states of a shard, which nobody else has for as long as its buffer."""
        place = buffer.codes.data_ptr()
        if place not in self._rooms:
            self._rooms[place] = self._engine.room(len(buffer.codes))
        return self._rooms[place]

    def _encode(self, states: Tensor, places: Tensor, array: str, encoder: FeatureEncoder) -> tuple[Tensor, Tensor]:
        """Return codes, int16 [N, L, H], and statistics, float32 [N, L, 7], of some places of states [T, L, H].

        The states are those of all layers that the engine gives.
        """
        if array == HIDDEN:
            return encode_states([states[None, :, column] for column in self._columns], places, encoder, states.device)
        assert self._norm is not None, "it is there where final states are asked for"
        final = self._norm(states[places, -1])
        return encode_states([final[None]], torch.arange(len(final)), encoder, states.device)

    def close(self) -> None:
        """End the engine."""
        self._proof.close()
        self._encoding.shutdown(wait=False, cancel_futures=True)
        self._engine.close()
        with suppress(RuntimeError):  # of a GPU that a dead engine left in a fault
            free_dropped_memory(self.device)


def _places(samples: SampleTable, group: Sequence[tuple[int, int]], array: str) -> Tensor:
    """Return where the positions lie that an array holds, of samples that each begin somewhere, in order."""
    spans = [(begin, span) for sample, begin in group for span in stored_spans(samples, sample, array)]
    return torch.cat(
        [torch.arange(begin + first, begin + after) for begin, (first, after) in spans] or [torch.arange(0)]
    )


def with_last_layer(config: ExtractConfig, target: ChosenTarget) -> ChosenTarget:
    """Return the target whose layers are those that vLLM is to give: for final states its last one too."""
    last = (target.files.num_layers - 1,) if config.final else ()
    return replace(target, layer_ids=tuple(sorted({*target.layer_ids, *last})))


def load_vllm(
    config: ExtractConfig, target: ChosenTarget, identity: dict[str, Any], progress: Progress
) -> VllmExtractor:
    """Return the target for vLLM, and with it what its states will be held against.

    That is transformers, which loads the target for now and checks that a draft can be served with it, or where
    transformers cannot hold it a second layout of vLLM. Raises `MismatchError` if its files are no longer those of the
    cache's `identity`, which were hashed before.
    """
    by_length = is_by_length(identity)
    norm = final_norm(target) if config.final else None
    proof: Proof
    try:
        refuse_unreadable_checkpoint(target.files.folder, target.files.config)
        device = room_for_transformers(target)
        if device != target.device:
            progress.say(f"{target.files.folder} does not fit {target.device} whole: transformers runs it on the host.")
        model = load_unchanged(config, target, identity, device, progress)
        proof = TransformersReference(with_last_layer(config, target), model)
    except (UnreadableCheckpointError, TargetLoadError) as error:
        proof = SecondLayout(config, with_last_layer(config, target), str(error))
        refuse_changed_target(config, target, identity)
    return VllmExtractor(config, target, proof, norm, by_length=by_length)


def final_norm(target: ChosenTarget) -> FinalNorm:
    """Return the norm behind the last layer; `DflashError` if it cannot be read of the target's files."""
    try:
        return read_borrowed(target.files, target.dtype).norm
    except DflashError as error:
        raise DflashError(
            f"vLLM gives the last layer's output; the final norm behind it is read from the target's files. {error} "
            f"Leave --engine out, or --final."
        ) from error


def room_for_transformers(target: ChosenTarget) -> torch.device:
    """Return where the whole target fits as transformers loads it, for the samples that vLLM's states are held against.

    That is its own device, or the host. Raises `TargetLoadError` if it fits neither.
    """
    weights = sum(path.stat().st_size for path in target.files.folder.glob("*.safetensors"))
    needed = int(_BESIDE_WEIGHTS * weights * max(1, target.dtype.itemsize / 2))
    if target.device.type == "cuda" and torch.cuda.mem_get_info(target.device)[0] >= needed:
        return target.device
    if (most := usable_memory_bytes()) < needed:
        raise TargetLoadError(
            f"it fits neither one GPU nor the host as transformers loads it: it needs about {readable_bytes(needed)}, "
            f"and the host has {readable_bytes(most)}"
        )
    return torch.device("cpu")
