"""What vLLM loads to run a target's first layers alone. Imported by vLLM's processes alone."""

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import Tensor
from vllm.config.load import LoadConfig
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from dflash_offline.stages.capture.engines.states import FIRST_LAYERS

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


@register_model_loader(FIRST_LAYERS)
class FirstLayersLoader(DefaultModelLoader):
    """Loads a checkpoint as vLLM does by default, without the layers that the model does not have."""

    def __init__(self, load_config: LoadConfig) -> None:
        super().__init__(replace(load_config, load_format="auto"))

    def get_all_weights(self, model_config: Any, model: Any) -> Iterator[tuple[str, Tensor]]:
        num_layers = model_config.hf_text_config.num_hidden_layers
        for name, weight in super().get_all_weights(model_config, model):
            layer = _LAYER.search(name)
            if layer is None or int(layer[1]) < num_layers:
                yield name, weight


class FirstLayers:
    """What vLLM mixes into its workers, so that each of them imports this file before it loads the target."""
