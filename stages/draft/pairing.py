"""Whether a draft goes with a target: its sizes, and a cache that gives up rejected tokens; or with a trainer."""

from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from dflash_offline.schemas.draft.config import FULL, DraftConfig
from dflash_offline.schemas.errors import UnsupportedTargetError
from dflash_offline.schemas.identity import differences, refuse_differences
from dflash_offline.schemas.variants.table import BASE, VARIANTS
from dflash_offline.stages.draft.model import DraftModel


def check_draft_fits(draft: DraftConfig, target: Any) -> None:
    """Raise `MismatchError` naming each field in which the draft was made for another target."""
    model = target.config.get_text_config(decoder=True)
    num_rows = target.get_input_embeddings().weight.shape[0]
    wanted = {"hidden_size": model.hidden_size, "vocab_size": num_rows, "num_target_layers": model.num_hidden_layers}
    rows = differences({name: getattr(draft, name) for name in wanted}, wanted)
    if draft.mask_token_id >= num_rows:
        rows.append(("mask_token_id", draft.mask_token_id, f"0 to {num_rows - 1}"))
    refuse_differences(
        "The draft was not made for this target",
        rows,
        ("draft", "target"),
        "Name the target it was trained for, or train a draft for this one.",
    )


@torch.inference_mode()
def check_rewindable(target: PreTrainedModel, name: str) -> None:
    """Refuse a target whose cache cannot be taken back to before a rejected token; `name` names it.

    A layer that keeps one state for all that was read, as recurrent layers do, has nothing to go back to. What
    transformers says of its layers is believed, and what it leaves open is tried on a few tokens.
    """
    ids = torch.arange(1, 17, device=target.device)[None]
    why = ""
    try:
        cache = DynamicCache(config=target.config)
        cache.activate_past_recording()
        target(ids[:, :8], past_key_values=cache, use_cache=True)
        if not all(getattr(layer, "is_croppable", True) for layer in cache.layers):
            why = "its layers keep a recurrent state"
        cache.crop(0)
        target(ids[:, :6], past_key_values=cache, use_cache=True)
        cache.crop(-6)
        again = target(ids[:, 8:], past_key_values=cache, use_cache=True).logits
        straight = target(ids, use_cache=False).logits[:, 8:]
    except (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        why = why or str(error).split("\n")[0] or type(error).__name__
    else:
        if not torch.allclose(again.float(), straight.float(), rtol=0.05, atol=0.05 * float(straight.abs().max())):
            why = why or "what it answers after rejected tokens is not what it answers without them"
    if why:
        raise UnsupportedTargetError(
            f"{name} ({type(target).__name__}) cannot be decoded with a draft here: its cache cannot be taken back to "
            f"before a rejected token ({why}). Extracting from it and training for it work, and so does `dflash eval "
            f"RUN --cache CACHE`, which needs no target."
        )


def draft_problems(draft: nn.Module, block_size: int, mask_token_id: int) -> list[str]:
    """Return why a draft would be trained as it is not served, with blocks of this size and this mask token."""
    if not isinstance(draft, DraftModel):
        return _foreign_problems(draft)
    return [
        f"{name} is {here}, but the draft's config, which is served, says {getattr(draft.config, name)}; expected the "
        f"same."
        for name, here in (("block_size", block_size), ("mask_token_id", mask_token_id))
        if getattr(draft.config, name) != here
    ]


def _foreign_problems(draft: nn.Module) -> list[str]:
    """Return why another project's draft, called as a base draft with one mask for all layers, would be trained as it
    is not served."""
    config, ours = getattr(draft, "config", None), "Load the folder with dflash_offline.stages.draft.weights.load_draft"
    kinds = set(getattr(config, "layer_types", None) or [FULL])
    if type(draft).__name__ in VARIANTS.keys() - {BASE.architecture}:
        return [f"The draft is another project's {type(draft).__name__}; expected its {BASE.architecture}. {ours}."]
    if kinds == {FULL} and not getattr(config, "is_causal", False):
        return []
    return [
        f"The draft's config has layer_types {sorted(kinds)} and is_causal {getattr(config, 'is_causal', None)}; "
        f"expected full attention that is not causal. {ours}, which masks every layer as it is served."
    ]
