"""A tiny target that says what it is told: each of its tokens follows from the one before alone."""

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from tiny_target import SPECIAL, save_tokenizer
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM


def save_chain(
    folder: Path,
    template: str,
    said: Sequence[str],
    *,
    special: Sequence[str] = (),
    plain: Sequence[str] = (),
    response_template: dict[str, Any] | None = None,
) -> Path:
    """Save a target that, where a prompt ends with the token `said[0]`, says the other ones, each a token of its own.

    `special` and `plain` are tokens that the tokenizer has besides its 300.
    """
    tokenizer: PreTrainedTokenizerFast = save_tokenizer(folder, template, special=(*SPECIAL, *special))
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in plain])
    tokenizer.response_template = response_template
    tokenizer.save_pretrained(folder)
    ids = []
    for text in said:
        (token,) = tokenizer.encode(text, add_special_tokens=False)
        ids.append(token)
    assert len(set(ids[:-1])) == len(ids) - 1, "each token is followed by one other"
    size = len(tokenizer) + len(tokenizer) % 2
    config = Qwen3Config(
        vocab_size=size,
        hidden_size=size,
        intermediate_size=8,
        num_hidden_layers=4,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):  # what layers add decides nothing
                weight.mul_(1e-3)
        model.model.embed_tokens.weight.copy_(torch.eye(size))
        model.lm_head.weight.zero_()
        for now, after in pairwise(ids):
            model.lm_head.weight[after, now] = 1.0
    model.save_pretrained(folder)
    settings = {"eos_token_id": tokenizer.eos_token_id}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    return folder
