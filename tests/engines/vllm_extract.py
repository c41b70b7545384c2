"""Run the target by vLLM inside this process, perhaps with a fault planted in vLLM, and write what came of it as JSON.

Runs in a process of its own; vLLM is found through PYTHONPATH.

    python vllm_extract.py JOB RESULT

JOB is JSON: config, the settings of `dflash extract --engine vllm`; plant, the name of a fault or None; and too_large,
whether the target is to be taken for one that transformers cannot hold. RESULT becomes JSON: with either, refused, what
extraction was refused with, or None. Without them, for a config with final states: largest, the largest difference of a
raw value from transformers', which runs each sample by itself, over the largest value of its token and layer, the final
state being one more: of the samples run at once, twice, so that prefixes are cached the second time; cached, the tokens
that vLLM took from cached prefixes; and samples, how many they were.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dflash_offline.schemas.errors import DflashError
from dflash_offline.schemas.settings.extract import ExtractConfig
from dflash_offline.stages.capture.engines import loop, second_layout, states, vllm
from dflash_offline.stages.capture.engines.start import set_environment
from dflash_offline.stages.capture.engines.vllm import VllmExtractor, load_vllm
from dflash_offline.stages.capture.inputs import open_inputs
from dflash_offline.stages.extract import extract
from dflash_offline.stages.progress import Silent
from dflash_offline.stages.store.cache import Cache
from dflash_offline.stages.target.model import layer_and_final_states, load_model


def plant_shift(by: int = 1) -> None:
    """Have vLLM put out each layer after the one that is asked for, or before it."""
    right = states.engine_arguments

    def shifted(*arguments: Any) -> dict[str, Any]:
        found = right(*arguments)
        layers = found["speculative_config"]["draft_model_config"]["hf_config"]
        layers["eagle_aux_hidden_state_layer_ids"] = [k + by for k in layers["eagle_aux_hidden_state_layer_ids"]]
        whole = {"hf_overrides", "load_format", "worker_extension_cls"}  # it has the layer behind the last one then
        return {name: value for name, value in found.items() if name not in whole}

    states.engine_arguments = shifted


def plant_in_states(change: Callable[[Tensor, Any], Tensor]) -> None:
    """Have the connector read changed states, [T, L, H], of each request."""
    from dflash_offline.stages.capture.engines.connector import StateConnector

    right = StateConnector._states
    StateConnector._states = lambda self, finished, size: change(right(self, finished, size), self)


def plant_swapped() -> None:
    """Have each request of a batch read the states of the one before it."""
    last: list[Tensor] = []

    def swap(states: Tensor, connector: Any) -> Tensor:
        other = last[-1] if last else states
        last[:] = [states.clone()]
        states = states.clone()
        states[: len(other)] = other[: len(states)]
        return states

    plant_in_states(swap)


def plant_padded() -> None:
    """Have states read one place late, as where padding on the left is not taken off."""
    plant_in_states(lambda states, connector: states.roll(1, 0))


def plant_shared() -> None:
    """Have states read one place late in both layouts: the second one in this process too, where that is planted."""
    second_layout._OTHERWISE["distributed_executor_backend"] = "uni"
    plant_padded()


def plant_cached() -> None:
    """Have the states of the first block be another's, as where a cached prefix kept none."""
    plant_in_states(
        lambda states, connector: torch.cat([connector._cache[0].transpose(0, 1)[:16], states[16:]])[: len(states)]
    )


def plant_norm() -> None:
    """Have the final norm read with its channels in another order."""
    right = vllm.final_norm
    vllm.final_norm = lambda target: replace(right(target), weight=right(target).weight.flip(0))


PLANTS = {"shift": plant_shift, "swapped": plant_swapped, "padded": plant_padded, "cached": plant_cached}
PLANTS |= {"shared": plant_shared, "early": lambda: plant_shift(-1), "norm": plant_norm}


def refused(config: ExtractConfig, plant: str | None, *, too_large: bool) -> str | None:
    """Return what an extraction is refused with, perhaps with a planted fault."""
    set_environment()
    if plant is not None:
        PLANTS[plant]()
    if too_large:
        vllm.usable_memory_bytes = lambda: 1000
    try:
        extract(config, Silent())
    except DflashError as error:
        return str(error)
    return None


def compare(config: ExtractConfig) -> dict[str, Any]:
    """Return how raw states compare, for the samples of a cache that is there."""
    samples = Cache(config.out).samples
    inputs = open_inputs(config, Silent())
    extractor: VllmExtractor = load_vllm(inputs.config, inputs.target, inputs.identity, Silent())
    model = load_model(inputs.target.files, dtype=torch.float32, device=torch.device("cpu"))
    extractor.start(samples, Silent())
    largest, cached = 0.0, 0
    right = loop.EngineLoop._take

    def count(self: Any, output: Any) -> None:
        nonlocal cached
        cached += output.num_cached_tokens or 0
        right(self, output)

    loop.EngineLoop._take = count
    for members in extractor.batches(samples, torch.arange(len(samples)).numpy()):
        ids = [samples.input_ids(sample).tolist() for sample in members.tolist()]
        own = []
        for one in ids:
            layers, final = layer_and_final_states(model, torch.tensor([one]), extractor.target.layer_ids)
            own.append(torch.stack([*layers, final], 2)[0])
        for _ in range(2):
            found = [torch.cat([one, extractor._norm(one[:, -1:])], 1) for one in extractor._engine.states(ids)]
            off = [(a - b).abs().amax(-1) / b.abs().amax(-1) for a, b in zip(found, own, strict=True)]
            largest = max(largest, *(float(one.max()) for one in off))
    extractor.close()
    return {"largest": largest, "cached": cached, "samples": len(samples)}


if __name__ == "__main__":
    job = json.loads(Path(sys.argv[1]).read_text())
    job["config"] |= {"data": tuple(map(Path, job["config"]["data"])), "out": Path(job["config"]["out"])}
    config = ExtractConfig(**job["config"], engine="vllm")
    plant, too_large = job["plant"], job["too_large"]
    result = {"refused": refused(config, plant, too_large=too_large)} if plant or too_large else compare(config)
    Path(sys.argv[2]).write_text(json.dumps(result))
