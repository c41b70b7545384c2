"""Load a draft in the speculators format with that package and write what it holds as JSON.

Runs in a process of its own and imports nothing of this project; speculators is found through PYTHONPATH.

    python speculators_load.py DRAFT RESULT

RESULT becomes JSON: the class, the layer ids, block size, mask token and speculative tokens it read; which tensors of
the file differ from the loaded ones; which loaded ones are not finite; and the versions of both packages.
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from speculators import SpeculatorModel


def read(folder: Path) -> dict[str, Any]:
    """Return what the package makes of a folder."""
    model = SpeculatorModel.from_pretrained(str(folder))
    loaded, stored = model.state_dict(), load_file(folder / "model.safetensors")
    config = model.config
    return {
        "class": type(model).__name__,
        "layer_ids": list(model.target_layer_ids),
        "block_size": config.block_size,
        "mask_token_id": config.mask_token_id,
        "speculative_tokens": config.speculators_config.proposal_methods[0].speculative_tokens,
        "verifier": config.speculators_config.verifier.name_or_path,
        "rope_theta": config.transformer_layer_config.rope_parameters["rope_theta"],
        "unknown": sorted(set(stored) - set(loaded)),
        "different": [n for n, w in stored.items() if n in loaded and not torch.equal(loaded[n].float(), w.float())],
        "from_the_target": sorted(set(loaded) - set(stored)),
        "not_finite": [name for name, tensor in loaded.items() if not torch.isfinite(tensor).all()],
        "versions": {name: version(name) for name in ("speculators", "transformers")},
    }


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(read(Path(sys.argv[1]))))
