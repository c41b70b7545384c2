"""Run the z-lab reference draft forward at every anchor of one row, with and without its cache.

Usage: PYTHONPATH=<folder with the package dflash> python zlab_forward.py DRAFT INPUTS OUTPUTS

Standalone: it runs in a process of its own and imports nothing of this project. DRAFT is a folder with config.json
and model.safetensors. INPUTS holds `target_hidden` [S, L*H], `token_embedding` [S, H], `mask_embedding` [H] and
`anchors` int64 [A], ascending; and, if wanted, a training call's own arguments, as `packed.` and the argument's name.
OUTPUTS gets `step` and `cached`, float32 [A, K, H], and `packed`, [B, N*K, H].
"""

import sys

import torch
from dflash.model import DFlashDraftModel, _crop_to, _make_cache
from safetensors.torch import load_file, save_file


@torch.inference_mode()
def main(folder: str, inputs_path: str, outputs_path: str) -> None:
    draft = DFlashDraftModel.from_pretrained(folder, dtype=torch.float32).eval()
    inputs = load_file(inputs_path)
    cache = _make_cache(draft.config)
    step, cached, fed = [], [], 0
    for a in inputs["anchors"].tolist():
        masks = inputs["mask_embedding"].expand(draft.block_size - 1, -1)
        block = torch.cat((inputs["token_embedding"][a : a + 1], masks))[None]
        positions = torch.arange(a + draft.block_size)[None]
        context = inputs["target_hidden"][None, :a]
        step.append(draft(position_ids=positions, noise_embedding=block, target_hidden=context)[0])
        cached.append(
            draft(
                position_ids=positions[:, fed:],
                noise_embedding=block,
                target_hidden=context[:, fed:],
                past_key_values=cache,
                use_cache=True,
            )[0]
        )
        _crop_to(cache, a)
        fed = a
    outputs = {"step": torch.stack(step), "cached": torch.stack(cached)}
    packed = {name.removeprefix("packed."): x for name, x in inputs.items() if name.startswith("packed.")}
    if packed:
        outputs["packed"] = draft(**packed)
    save_file(outputs, outputs_path)


if __name__ == "__main__":
    main(*sys.argv[1:])
