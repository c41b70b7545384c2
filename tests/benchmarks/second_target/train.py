"""Trains the second target from nothing, on one core in minutes: a Llama of 1.7M parameters with a head of its own.

Nothing of it is the demo's: the architecture, the tokenizer (words, signs and numbers of up to three digits are merged
apart), the chat template, the corpus. Rows of one length hold several conversations one after the other.
"""

import math
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dflash_offline.stages.training.optimizer import Muon
from second_target.rows import Drawn, generate

# Axes: B rows, S positions, V vocabulary.

VOCAB_SIZE = 1280
PAD, BEGIN, END, MASK = "<pad>", "<s>", "</s>", "<fill>"
TEMPLATE = (
    "{%- for message in messages %}"
    "{%- if message['role'] == 'assistant' %}{% generation %}{{- message['content'] + '</s>' }}{% endgeneration %}"
    "{%- else %}{{- '<s>[' + message['role'] + '] ' + message['content'] + ' [/]\\n' }}{%- endif %}"
    "{%- endfor %}"
)
WORDS_SIGNS_NUMBERS = r"\p{N}{1,3}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\n *| +"
ROWS, ROW_TOKENS, POOL = 8, 256, 256


def make_tokenizer() -> Any:
    """Return a PreTrainedTokenizerFast of VOCAB_SIZE tokens learned from 12,000 rows."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS_SIGNS_NUMBERS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[PAD, BEGIN, END, MASK],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text for row in islice(generate("train", 0), 12_000) for text in row), trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BEGIN,
        eos_token=END,
        mask_token=MASK,
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = TEMPLATE
    return wrapped


def make_model(tokenizer: Any) -> Any:
    """Return an untrained LlamaForCausalLM, float32, whose head is not its embedding."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=1,
        head_dim=16,
        intermediate_size=352,
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 50000.0},
        tie_word_embeddings=False,
        initializer_range=0.05,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    model.set_attn_implementation("eager")  # for rows this short, faster on the CPU than the fused kernel
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)  # every layer starts as the identity
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
    )
    return model


def encode(tokenizer: Any, row: Drawn) -> tuple[list[int], list[float]]:
    """Return a conversation's token ids and their loss weights: 1 for the answer's, a tenth for the prompt's."""
    messages = [{"role": "user", "content": row[0]}, {"role": "assistant", "content": row[1]}]
    encoded = tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    return encoded["input_ids"], [max(0.1, said) for said in encoded["assistant_masks"]]


def batches(tokenizer: Any, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (token ids, loss weights), both [ROWS, S], sorted by length within a pool, padded with weight 0."""
    stream, draw = generate("train", seed), torch.Generator().manual_seed(seed)
    most = ROWS * ROW_TOKENS
    while True:
        pool = sorted((encode(tokenizer, row) for row in islice(stream, POOL)), key=lambda pair: len(pair[0]))
        groups: list[list[tuple[list[int], list[float]]]] = [[]]
        for pair in pool:
            if (len(groups[-1]) + 1) * len(pair[0]) > most:
                groups.append([])
            groups[-1].append(pair)
        for i in torch.randperm(len(groups), generator=draw).tolist():
            length = max(len(ids) for ids, _ in groups[i])
            ids_BS = torch.tensor([ids + [0] * (length - len(ids)) for ids, _ in groups[i]])
            yield ids_BS, torch.tensor([weights + [0.0] * (length - len(weights)) for _, weights in groups[i]])


def train(out: Path, steps: int, seed: int) -> None:
    """Write tokenizer and weights, bfloat16, into a folder that transformers loads."""
    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer).train()
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if all(p is not matrix for matrix in matrices)]
    optimizers = [
        Muon(matrices, lr=0.02, weight_decay=0.01),
        torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]
    schedulers = [
        torch.optim.lr_scheduler.LambdaLR(
            one, lambda step: min(1.0, (step + 1) / 60) * 0.5 * (1 + math.cos(math.pi * step / steps))
        )
        for one in optimizers
    ]
    began, smooth = time.monotonic(), 0.0
    for step, (ids_BS, weights_BS) in enumerate(islice(batches(tokenizer, seed + 1), steps)):
        logits_BSV = model(input_ids=ids_BS[:, :-1], use_cache=False).logits
        losses = cross_entropy(logits_BSV.flatten(0, 1), ids_BS[:, 1:].flatten(), reduction="none")
        loss = (losses * weights_BS[:, 1:].flatten()).sum() / weights_BS[:, 1:].sum()
        loss.backward()
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        smooth = loss.item() if step == 0 else 0.95 * smooth + 0.05 * loss.item()
        if (step + 1) % 50 == 0:
            print(f"step {step + 1}/{steps} loss {smooth:.4f} {time.monotonic() - began:.0f} s", flush=True)
    tokenizer.save_pretrained(out)
    model.to(torch.bfloat16).save_pretrained(out)
