"""What vLLM loads to hand over hidden states: a connector that copies each finished request's into shared memory.

vLLM makes one for its scheduler, which says where a request's states lie and learns that they were copied, and one for
each worker, of which the first copies. Imported by vLLM alone.

Axes: B blocks, T tokens, L captured layers, H hidden size.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    SupportsHMA,
)
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank
from vllm.model_executor.models.extract_hidden_states import CacheOnlyAttentionLayer
from vllm.v1.kv_cache_interface import HiddenStateCacheSpec

from dflash_offline.stages.capture.engines.shared_memory import SharedMemory

DELIVERED: "SimpleQueue[int]" = SimpleQueue()
"""Where the states begin, in bytes of the shared memory, of each request whose states have been copied there: filled
in the process that steps the engine."""


@dataclass(frozen=True)
class Finished:
    """A request whose states are to be copied."""

    request: str
    begin: int
    num_tokens: int
    blocks: list[int]


class FinishedRequests(KVConnectorMetadata):
    """What the scheduler's side tells the workers' in a step."""

    def __init__(self, requests: list[Finished]) -> None:
        self.requests = requests


class StateConnector(KVConnectorBase_V1, SupportsHMA):
    """Copies states out of the cache of the layer that keeps them; loads nothing."""

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        groups = kv_cache_config.kv_cache_groups
        kept = [i for i, group in enumerate(groups) if isinstance(group.kv_cache_spec, HiddenStateCacheSpec)]
        if len(kept) != 1 and len(groups) != 1:
            raise ValueError(f"{len(kept)} of {len(groups)} groups of vLLM's cache hold hidden states; expected one.")
        self._group = kept[0] if kept else 0
        self._finished: list[Finished] = []
        self._begins: dict[str, int] = {}
        self._copying: dict[str, torch.cuda.Event | None] = {}
        self._path = str(self._kv_transfer_config.get_from_extra_config("shared_memory", ""))
        self._cache: Tensor | None = None

    # What the scheduler's side does.

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        return 0, False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        pass

    def request_finished_all_groups(self, request: Any, block_ids: Any) -> tuple[bool, dict[str, Any] | None]:
        return self.request_finished(request, block_ids[self._group] if block_ids else [])

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """Return whether the request's blocks are to be kept until its states are copied."""
        if not block_ids or not request.kv_transfer_params:
            return False, None
        begin = int(request.kv_transfer_params["begin"])
        self._begins[request.request_id] = begin
        self._finished.append(Finished(request.request_id, begin, request.num_prompt_tokens, list(block_ids)))
        return True, None

    def build_connector_meta(self, scheduler_output: Any) -> FinishedRequests:
        told, self._finished = self._finished, []
        return FinishedRequests(told)

    def update_connector_output(self, connector_output: Any) -> None:
        for request in connector_output.finished_sending or ():
            DELIVERED.put(self._begins.pop(request))

    def get_finished_count(self) -> int:
        """Return how many workers say that a request's states are copied."""
        return 1

    # What a worker's side does.

    def register_kv_caches(self, kv_caches: dict[str, Tensor]) -> None:
        layers = get_layers_from_vllm_config(self._vllm_config, CacheOnlyAttentionLayer, list(kv_caches))
        (name,) = layers
        self._cache = kv_caches[name]  # [blocks, L, tokens of a block, H]
        if get_tensor_model_parallel_rank() == 0:
            self._memory = SharedMemory(self._path)
            if self._cache.is_cuda:
                self._memory.pin()
                self._stream = torch.cuda.Stream(self._cache.device)
            # What the workers of a CPU share has a name, which vLLM leaves behind; by now each has it mapped.
            for path in Path("/dev/shm").glob(f"{os.environ.get('VLLM_DIST_IDENT', '-')}-*"):
                path.unlink(missing_ok=True)

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """Copy what the scheduler's side told of; returns the requests that are copied by now."""
        if get_tensor_model_parallel_rank() != 0 or not self.has_connector_metadata():
            return None, None
        for finished in self._get_connector_metadata().requests:
            self._copying[finished.request] = self._copy(finished)
        done = {request for request, event in self._copying.items() if event is None or event.query()}
        for request in done:
            del self._copying[request]
        return done or None, None

    def _copy(self, finished: Finished) -> torch.cuda.Event | None:
        assert self._cache is not None
        _, layers, per_block, hidden = self._cache.shape
        room = self._memory.view(finished.begin, (finished.num_tokens, layers, hidden), self._cache.dtype)
        if not self._cache.is_cuda:
            room.copy_(self._states(finished, per_block))
            return None
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            room.copy_(self._states(finished, per_block), non_blocking=True)
        return self._stream.record_event()

    def _states(self, finished: Finished, per_block: int) -> Tensor:
        """Return a request's states, [T, L, H]."""
        assert self._cache is not None
        blocks = torch.tensor(finished.blocks[: -(-finished.num_tokens // per_block)], device=self._cache.device)
        return self._cache.index_select(0, blocks).transpose(1, 2).flatten(0, 1)[: finished.num_tokens]

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        pass

    def wait_for_layer_load(self, layer_name: str) -> None:
        pass

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        pass

    def wait_for_save(self) -> None:
        pass

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: VllmConfig) -> str | None:
        """Return the layout that keeps all layers of a token together."""
        return "LBNHC"
