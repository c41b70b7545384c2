"""What to do about each cause of a low served acceptance, client by client.

The facts are those of `schemas.draft.rules`, and of vLLM's pull request 40727.
"""

from dflash_offline.schemas.draft.config import DraftConfig
from dflash_offline.schemas.draft.rules import SGLANG, VLLM, ZLAB
from dflash_offline.stages.evaluation.diagnosis import changes

_EVERYWHERE = "any client"
_REMEDIES = {
    changes.LAYERS: {
        ZLAB: "target_layer_ids in config.json is to be {ids}: id i is the output of decoder layer i, entry i + 1 of "
        "transformers' hidden states, and the client adds that 1.",
        VLLM: "dflash_config.target_layer_ids is to be {ids}, and vLLM adds 1 itself. Versions before its pull request "
        "40727 (April 2026) read one layer too early: upgrade. In the speculators format "
        "aux_hidden_state_layer_ids is {aux}.",
        SGLANG: "dflash_config.target_layer_ids and target_layer_ids are both to be {ids}.",
    },
    changes.NORMED: {
        _EVERYWHERE: "the last layer is read before the final norm by some clients and after it by others: ids are to "
        "be {ids}, all below {last}, and a client that puts the final hidden state in a layer's place is to be mended.",
    },
    changes.CAUSALITY: {
        ZLAB: "is_causal in config.json decides; it is to be {causal}.",
        VLLM: "is_causal and dflash_config.causal are both to be {causal}; older versions read the second alone.",
        SGLANG: "it reads neither key: sliding layers are causal there and full ones are not. A draft of another kind "
        "is to be trained anew for it.",
    },
    changes.MASK_TOKEN: {
        ZLAB: "mask_token_id in config.json is to be {mask}.",
        VLLM: "dflash_config.mask_token_id is to be {mask}; vLLM looks there first.",
        SGLANG: "dflash_config.mask_token_id is to be {mask}; where it is absent SGLang makes up a token.",
    },
    changes.ROTARY: {
        ZLAB: "rope_parameters.rope_theta (transformers 5) and rope_theta (before) are both to be {theta}; remove "
        "rotary keys that are left over from the target's config.",
        VLLM: "rope_parameters.rope_theta is to be {theta}, and rope_scaling null.",
        SGLANG: "rope_parameters.rope_theta and rope_theta are both to be {theta}.",
    },
    changes.ANCHOR: {
        _EVERYWHERE: "no setting does this, so it is the client's own fault: the context ends before the anchor, whose "
        "hidden state joins it in the next round alone. Take a released version of the client.",
    },
    changes.WINDOW: {
        ZLAB: "layer_types is to be {types} and sliding_window {window}; with sliding layers and no window it shows "
        "everything.",
        VLLM: "layer_types is to be {types}, use_sliding_window {sliding} and sliding_window {window}; older versions "
        "make every layer slide where sliding_window is set.",
        SGLANG: "layer_types is to be {types} and sliding_window {window}.",
    },
    changes.BLOCK: {
        ZLAB: "block_size, at the top of config.json and in dflash_config, is to be {block}.",
        VLLM: '"num_speculative_tokens" in --speculative-config is to be {drafted}: what the block drafts.',
        SGLANG: "--speculative-num-draft-tokens is to be {verified}: it counts the token before them.",
    },
    changes.DTYPE: {
        ZLAB: "load target and draft in the data type that the cache was extracted in.",
        VLLM: "--dtype is to be that of the cache. Rounding is no fault; train from a cache of the served data type.",
        SGLANG: "--dtype is to be that of the cache. Rounding is no fault; train from a cache of the served data type.",
    },
    changes.TEMPLATE: {
        ZLAB: "call apply_chat_template with the arguments that the cache was made with, {kwargs}.",
        VLLM: "send chat_template_kwargs {kwargs} in each request, or start with --default-chat-template-kwargs; see "
        "that --chat-template is the target's own.",
        SGLANG: "send chat_template_kwargs {kwargs} in each request; see that --chat-template is the target's own.",
        "training": "where the served mode is the wanted one: `dflash regenerate` and `dflash extract` with its "
        "--chat-template-kwargs, and train on that.",
    },
    changes.TARGET: {
        ZLAB: "load the target that the draft was trained for, {target}, at the same revision and not quantized.",
        VLLM: "the model served is to be {target} at the same --revision, without a --quantization that the cache did "
        "not have; sampling settings of generation_config.json join in unless --generation-config vllm is given.",
        SGLANG: "--model-path is to be {target} at the same --revision, without a --quantization that the cache did "
        "not have.",
        "training": "a draft follows one set of weights: for a fine-tuned or quantized target extract again from it.",
    },
}


def remedies(cause: str, config: DraftConfig, target: str, kwargs: str) -> dict[str, str]:
    """Return what to do about a cause, by client; `config` is the draft's as it was trained."""
    causal = {rule.causal for rule in config.attention_rules.values()}
    ids = config.target_layer_ids
    facts = {
        "ids": list(ids),
        "aux": [i + 1 for i in ids],
        "last": config.num_target_layers - 1,
        "causal": str(causal.pop()).lower() if len(causal) == 1 else "absent",
        "mask": config.mask_token_id,
        "theta": f"{config.rope_theta:.10g}",
        "types": ", ".join(dict.fromkeys(config.layer_types)) + " in the trained order",
        "sliding": str(bool(config.sliding_layers)).lower(),
        "window": "null" if config.sliding_window is None else config.sliding_window,
        "block": config.block_size,
        "drafted": config.num_draft_tokens,
        "verified": 1 + config.num_draft_tokens,
        "kwargs": kwargs,
        "target": target,
    }
    return {client: text.format(**facts) for client, text in _REMEDIES[cause].items()}
