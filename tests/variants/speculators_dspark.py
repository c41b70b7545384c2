"""Run the DSpark model of speculators over one row, anchors at every supervised place, as its training does.

    PYTHONPATH=<folder with the package speculators> python speculators_dspark.py DRAFT INPUTS OUTPUTS

Standalone: it runs in a process of its own and imports nothing of this project. DRAFT is a folder with config.json and
model.safetensors of the plain format. INPUTS holds `head` and `table` [V, H], `tokens` int64 [S], `target_hidden`
[S, L*H] and `final` [S, H], the target's states after its final norm; OUTPUTS gets `anchors` int64 [A], `hidden`
[A, B, H], `logits` and `targets` [A, B, V] with the bias and of the target, `confidence` [A, B], and the loss.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from speculators.models.dspark import DSparkDraftModel, DSparkSpeculatorConfig, core
from transformers import Qwen3Config


def build(folder: Path, inputs: dict[str, torch.Tensor]) -> DSparkDraftModel:
    """Return the package's model with a draft's tensors, and nothing of it left as it was drawn."""
    said = json.loads((folder / "config.json").read_text())
    own = "block_size mask_token_id markov_rank markov_head_type enable_confidence_head confidence_head_with_markov"
    others = {"architectures", "dtype", "target_layer_ids", "num_target_layers", *own.split()}
    layer_config = Qwen3Config(**{name: value for name, value in said.items() if name not in others})
    layer_config._attn_implementation = "eager"
    config = DSparkSpeculatorConfig(
        transformer_layer_config=layer_config,
        draft_vocab_size=said["vocab_size"],
        aux_hidden_state_layer_ids=[i + 1 for i in said["target_layer_ids"]],
        **{name: said[name] for name in own.split()},
    )
    model = DSparkDraftModel(config)
    borrowed = {"embed_tokens.weight": inputs["table"], "lm_head.weight": inputs["head"]}
    borrowed |= {"verifier_lm_head.weight": inputs["head"], "verifier_norm.weight": torch.ones(said["hidden_size"])}
    model.load_state_dict({**load_file(folder / "model.safetensors"), **borrowed}, strict=True)
    model.verifier_norm = torch.nn.Identity()  # what it is given has been through the norm
    return model.float().eval()


@torch.inference_mode()
def main(folder: str, inputs_path: str, outputs_path: str) -> None:
    inputs, seen = load_file(inputs_path), {}
    model, own = build(Path(folder), inputs), core.compute_metrics

    def recorded(logits, targets, confidence, *rest, **more):
        seen.update(logits=logits, targets=targets, confidence=confidence)
        return own(logits, targets, confidence, *rest, **more)

    core.compute_metrics = recorded
    model.norm.register_forward_hook(lambda module, args, output: seen.update(hidden=output))
    tokens = inputs["tokens"][None]
    S, B = tokens.shape[1], model.block_size
    anchors = torch.arange(S - B)  # all that it takes, ascending: as many are asked for as there are
    how, _ = model.get_trainer_kwargs(loss_fn="ce", loss_implementation="eager")
    _, loss, _ = model(
        inputs["target_hidden"][None],
        tokens,
        torch.ones_like(tokens),
        inputs["final"][None],
        torch.zeros_like(tokens),
        **{**how, "max_anchors": len(anchors)},
    )
    found = {name: x[0].unflatten(0, (len(anchors), B)).contiguous() for name, x in seen.items()}
    save_file({"anchors": anchors, "loss": loss.reshape(1), **found}, outputs_path)


if __name__ == "__main__":
    main(*sys.argv[1:])
