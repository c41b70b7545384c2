"""Run z-lab's DFlash 2 draft at every anchor of some rows: states, selector scores under true predecessors, its walk.

    PYTHONPATH=<folder with the package dflash>:<tests/clients> python zlab_selector.py DRAFT INPUTS OUTPUTS

Standalone: it runs in a process of its own and imports nothing of this project. DRAFT is a folder with config.json
and model.safetensors. INPUTS holds `head` [V, H], `mask_embedding` [H] and for every row i `tokens.i` int64 [S],
`target_hidden.i` [S, L*H], `token_embedding.i` [S, H] and `anchors.i` int64 [A]; OUTPUTS gets, float32, `step.i` and
`cached.i` [A, K, H], and of slots 1.. `candidates.i` and `scores.i` [A, K-1, top k] and `walk.i` [A, K-1].
"""

import sys

import torch
from dflash import model as client
from safetensors.torch import load_file, save_file
from zlab_forward import run_row


def scored(draft, hidden, logits, before):
    """Return the candidates and scores [top k] of one slot, as the client itself computes them."""
    seen, own = [], client._sampling_probs
    client._sampling_probs = lambda scores, temperature: seen.append(scores[0, 0]) or own(scores, temperature)
    _, candidates, _ = draft.candidate_selector.select(hidden[None, None], logits[None, None], before[None], 1.0)
    client._sampling_probs = own
    return candidates[0, 0], seen[0]


def row_outputs(draft, head, masks, row):
    """Return a row's outputs by name."""
    step, cached = run_row(draft, masks, row["target_hidden"], row["token_embedding"], row["anchors"])
    tokens = torch.cat((row["tokens"], row["tokens"].new_zeros(draft.block_size)))
    candidates, scores, walks = [], [], []
    for a, hidden in zip(row["anchors"].tolist(), step, strict=True):
        logits = draft.compute_logits(hidden, head)
        slots = range(1, draft.block_size)
        found = [scored(draft, hidden[k], logits[k], tokens[a + k - 1]) for k in slots]
        candidates.append(torch.stack([one[0] for one in found]))
        scores.append(torch.stack([one[1] for one in found]))
        walks.append(draft.propose(hidden[None, 1:], tokens[a : a + 1], head, 0.0)[0][0])
    stacked = {"candidates": candidates, "scores": scores, "walk": walks}
    return {"step": step, "cached": cached, **{name: torch.stack(parts) for name, parts in stacked.items()}}


@torch.inference_mode()
def main(folder: str, inputs_path: str, outputs_path: str) -> None:
    draft, info = client.DFlash2DraftModel.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    draft.eval()
    wrong = {kind: sorted(map(str, keys)) for kind, keys in info.items() if keys}
    assert not wrong, wrong
    inputs = load_file(inputs_path)
    head = torch.nn.Linear(*inputs["head"].shape[::-1], bias=False)
    head.weight.copy_(inputs["head"])
    masks = inputs["mask_embedding"].expand(draft.block_size - 1, -1)
    outputs = {}
    for i in range(sum(name.startswith("anchors.") for name in inputs)):
        row = {name.removesuffix(f".{i}"): tensor for name, tensor in inputs.items() if name.endswith(f".{i}")}
        outputs |= {f"{name}.{i}": tensor for name, tensor in row_outputs(draft, head, masks, row).items()}
    save_file(outputs, outputs_path)


if __name__ == "__main__":
    main(*sys.argv[1:])
