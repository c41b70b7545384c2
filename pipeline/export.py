"""`dflash export`: a checkpoint as the folder that z-lab's reference client, vLLM and SGLang load unchanged."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from dflash_offline.schemas.draft import DraftConfig
from dflash_offline.schemas.errors import DflashError
from dflash_offline.schemas.files import building_folder, output_folder, sha256_file, sync_folder
from dflash_offline.schemas.run import RunRecord
from dflash_offline.stages.checkpoint import TrainState, checkpoint_folder, list_checkpoints, read_state
from dflash_offline.stages.drafter import check_draft_weights

_CARD = """# DFlash draft for {target}

Trained by `dflash-offline` from cached features of the target: step {step} of the run, {layers} draft layers, target
layers {ids}, block size {block_size}, mask token {mask_token_id}. {measured}

Cache: manifest {cache}. Target: config sha256 {config_sha256}.

## Serving
A block holds one anchor and {num_drafted} drafted tokens; vLLM counts the drafted ones, SGLang the whole block.

    vllm serve TARGET --speculative-config \\
      '{{"method": "dflash", "model": "THIS_FOLDER", "num_speculative_tokens": {num_drafted}}}'

    python -m sglang.launch_server --model-path TARGET --speculative-algorithm DFLASH \\
      --speculative-draft-model-path THIS_FOLDER --speculative-num-draft-tokens {block_size}
"""


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What `export` left."""

    draft: Path
    step: int
    num_parameters: int
    num_bytes: int


def choose_checkpoint(run: Path, which: str) -> Path:
    """Return the run's best or last checkpoint; best is by the serving walk, and the last where none was measured."""
    saved = list_checkpoints(run)
    if not saved:
        raise DflashError(f"{run} has no checkpoint yet. Let `dflash train` reach its first one.")
    best = checkpoint_folder(run, read_state(saved[-1]).best_step)
    return best if which == "best" and best.is_dir() else saved[-1]


def export(run: Path, out: Path, which: str = "best") -> Exported:
    """Write the draft folder whole: config.json, model.safetensors in bfloat16, and a model card.

    The same checkpoint exported again to the same folder changes nothing; a folder that holds anything else is
    refused.
    """
    out = output_folder(out, marker="config.json", kind="draft", renamed=True)
    record = RunRecord.read(run)
    checkpoint = choose_checkpoint(run, which)
    state = read_state(checkpoint)
    config = DraftConfig.read(checkpoint)
    weights = load_file(checkpoint / "model.safetensors")
    check_draft_weights(weights, config, str(checkpoint))
    broken = [name for name, tensor in weights.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise DflashError(f"{checkpoint} holds values that are not finite in {', '.join(broken)}. Train again.")
    with building_folder(out) as temporary:
        halved = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in weights.items()}
        save_file(halved, temporary / "model.safetensors", metadata={"format": "pt"})
        (temporary / "config.json").write_text(json.dumps(config.to_json(), indent=2) + "\n")
        (temporary / "README.md").write_text(_card(record, config, state))
        _publish(temporary, out)
    return Exported(
        draft=out,
        step=state.step,
        num_parameters=sum(tensor.numel() for tensor in weights.values()),
        num_bytes=(out / "model.safetensors").stat().st_size,
    )


def _publish(temporary: Path, out: Path) -> None:
    names = sorted(path.name for path in temporary.iterdir())
    if (out / "config.json").is_file():
        same = all(
            (out / name).is_file() and sha256_file(out / name) == sha256_file(temporary / name) for name in names
        )
        if not same:
            raise DflashError(f"{out} exists and holds something else than this draft. Name a new --out.")
        return
    for name in names:
        with (temporary / name).open("rb") as file:
            os.fsync(file.fileno())
    sync_folder(temporary)
    temporary.rename(out)
    sync_folder(out.parent)


def _card(record: RunRecord, config: DraftConfig, state: TrainState) -> str:
    measured = (
        f"Best acceptance length in the serving walk over held-out samples: {state.best_walk:.2f} (step "
        f"{state.best_step})."
        if state.best_step
        else "Its acceptance length was not measured in training."
    )
    return _CARD.format(
        target=record.origin["target"],
        step=state.step,
        layers=config.num_hidden_layers,
        ids=", ".join(map(str, config.target_layer_ids)),
        block_size=config.block_size,
        num_drafted=config.block_size - 1,
        mask_token_id=config.mask_token_id,
        measured=measured,
        cache=record.identity["cache"],
        config_sha256=record.origin["target_identity"]["config_sha256"],
    )
