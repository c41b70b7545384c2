"""Run the DFlash 2 model of speculators over one row, anchors at every supervised place, as its training does.

    PYTHONPATH=<folder with the package speculators> python speculators_selector.py DRAFT INPUTS OUTPUTS

Standalone: it runs in a process of its own and imports nothing of this project. DRAFT is a folder with config.json and
model.safetensors of the plain format. INPUTS holds `head` and `table` [V, H], `tokens` int64 [S], `target_hidden`
[S, L*H] and `last_hidden` [S, H], what the target's norm would get; OUTPUTS gets `anchors` int64 [A], `hidden`
[A, K, H], `predecessors` int64 [A, K], `candidates` and `scores` [A, K, top k].
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from speculators.models.dflash2 import DFlash2DraftModel, DFlash2SpeculatorConfig
from transformers import Qwen3Config


def build(folder: Path, inputs: dict[str, torch.Tensor]) -> DFlash2DraftModel:
    """Return the package's model with a draft's tensors, and nothing of it left as it was drawn."""
    said = json.loads((folder / "config.json").read_text())
    own = said["dflash_config"]
    layers = {name: value for name, value in said.items() if name not in ("architectures", "dflash_config", "dtype")}
    layer_config = Qwen3Config(**layers)
    layer_config._attn_implementation = "eager"
    config = DFlash2SpeculatorConfig(
        transformer_layer_config=layer_config,
        draft_vocab_size=said["vocab_size"],
        aux_hidden_state_layer_ids=[i + 1 for i in own["target_layer_ids"]],
        sliding_window_non_causal=not said["is_causal"],
        **{name: own[name] for name in ("block_size", "mask_token_id", "conv_kernel_size", "conv_group_size")},
        **{name: own[name] for name in ("selector_rank", "selector_top_k")},
    )
    model = DFlash2DraftModel(config)
    borrowed = {"embed_tokens.weight": inputs["table"], "lm_head.weight": inputs["head"]}
    borrowed |= {"verifier_lm_head.weight": inputs["head"], "verifier_norm.weight": torch.ones(said["hidden_size"])}
    model.load_state_dict({**load_file(folder / "model.safetensors"), **borrowed}, strict=True)
    return model.float().eval()


@torch.inference_mode()
def main(folder: str, inputs_path: str, outputs_path: str) -> None:
    inputs = load_file(inputs_path)
    model, seen = build(Path(folder), inputs), {}
    selector, own = model.candidate_selector, model.candidate_selector.score_candidates

    def recorded(logits, hidden, predecessors, candidates):
        scores = own(logits, hidden, predecessors, candidates)
        seen.update(hidden=hidden, predecessors=predecessors, candidates=candidates, scores=scores)
        return scores

    selector.score_candidates = recorded
    tokens = inputs["tokens"][None]
    S, K = tokens.shape[1], model.block_size
    anchors = torch.arange(S - K)  # all that it takes, ascending: as many are asked for as there are
    how, _ = model.get_trainer_kwargs(loss_fn="ce", loss_implementation="eager")
    _, loss, _ = model(
        inputs["target_hidden"][None],
        tokens,
        torch.ones_like(tokens),
        inputs["last_hidden"][None],
        torch.zeros_like(tokens),
        **{**how, "max_anchors": len(anchors)},
    )
    assert loss.isfinite()
    found = {name: x[0].unflatten(0, (len(anchors), K)).contiguous() for name, x in seen.items()}
    save_file({"anchors": anchors, **found}, outputs_path)


if __name__ == "__main__":
    main(*sys.argv[1:])
