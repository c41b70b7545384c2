"""Run the z-lab reference draft forward at every anchor of some rows, with and without its cache.

Usage: PYTHONPATH=<folder with the package dflash> python zlab_forward.py DRAFT INPUTS OUTPUTS

Standalone: it runs in a process of its own and imports nothing of this project. DRAFT is a folder with config.json
and model.safetensors. INPUTS holds `mask_embedding` [H] and for every row i `target_hidden.i` [S, L*H],
`token_embedding.i` [S, H] and `anchors.i` int64 [A], ascending; OUTPUTS gets `step.i` and `cached.i`, float32
[A, K, H]. Or INPUTS holds a call's own arguments, as `call.` and the argument's name; OUTPUTS gets `call`.
"""

import sys

import torch
from dflash.model import DFlashDraftModel, _crop_to, _make_cache
from safetensors.torch import load_file, save_file


def run_row(draft, masks, target_hidden, token_embedding, anchors):
    cache, fed, step, cached = _make_cache(draft.config), 0, [], []
    for a in anchors.tolist():
        block = torch.cat((token_embedding[a : a + 1], masks))[None]
        positions = torch.arange(a + draft.block_size)[None]
        context = target_hidden[None, :a]
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
    return torch.stack(step), torch.stack(cached)


@torch.inference_mode()
def main(folder: str, inputs_path: str, outputs_path: str) -> None:
    draft = DFlashDraftModel.from_pretrained(folder, dtype=torch.float32).eval()
    inputs, outputs = load_file(inputs_path), {}
    call = {name.removeprefix("call."): x for name, x in inputs.items() if name.startswith("call.")}
    if call:
        outputs["call"] = draft(**call)
    else:
        masks = inputs["mask_embedding"].expand(draft.block_size - 1, -1)
        for i in range(sum(name.startswith("anchors.") for name in inputs)):
            row = [inputs[f"{name}.{i}"] for name in ("target_hidden", "token_embedding", "anchors")]
            outputs[f"step.{i}"], outputs[f"cached.{i}"] = run_row(draft, masks, *row)
    save_file(outputs, outputs_path)


if __name__ == "__main__":
    main(*sys.argv[1:])
