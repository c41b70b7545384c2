"""Tiny targets and drafts for the decoding tests: random ones, a fitted one, and one that cheats."""

import random

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PreTrainedModel, Qwen3Config

from dflash_offline.schemas.draft.config import DraftConfig
from dflash_offline.stages.draft.decode import plain_decode
from dflash_offline.stages.draft.model import DraftCache, DraftModel

VOCAB, HIDDEN, LAYERS, MASK = 96, 64, 6, 95
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": None,
}


def tiny_target(family: str) -> PreTrainedModel:
    """Return a random float32 target: qwen3, llama, or mistral with a sliding window of 24."""
    torch.manual_seed(7)
    config = {
        "qwen3": lambda: Qwen3Config(**SHAPE),
        "llama": lambda: LlamaConfig(**SHAPE),
        "mistral": lambda: MistralConfig(**SHAPE, sliding_window=24),
    }[family]()
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    return model.eval().requires_grad_(False)


def random_prompts(count: int = 6, length: int = 12) -> list[list[int]]:
    """Return prompts of random tokens, none of them the mask."""
    draw = random.Random(5)
    return [[draw.randrange(MASK) for _ in range(length)] for _ in range(count)]


def tiny_draft_config(block_size: int = 8) -> DraftConfig:
    return DraftConfig(
        hidden_size=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=96,
        vocab_size=VOCAB,
        target_layer_ids=(1, 2, 4),
        num_target_layers=LAYERS,
        block_size=block_size,
        mask_token_id=MASK,
        max_position_embeddings=512,
    )


def random_draft(block_size: int = 8) -> DraftModel:
    torch.manual_seed(11)
    return DraftModel(tiny_draft_config(block_size)).eval()


def fitted_draft(target: PreTrainedModel, prompts: list[list[int]], block_size: int = 8, steps: int = 60) -> DraftModel:
    """Return a draft that has seen the answers to these prompts often enough to be right now and then."""
    draft = random_draft(block_size)
    rows = torch.tensor([prompt + plain_decode(target, prompt, 48, ()).tokens for prompt in prompts])
    states = target(rows, output_hidden_states=True).hidden_states
    features = torch.cat([states[i + 1] for i in draft.config.target_layer_ids], dim=-1)
    optimizer = torch.optim.Adam(draft.parameters(), lr=3e-3)
    first = len(prompts[0])
    anchors = torch.randint(first, rows.shape[1] - block_size, (steps,), generator=torch.Generator().manual_seed(3))
    for anchor in anchors.tolist():
        block = torch.full((len(rows), block_size), MASK)
        block[:, 0] = rows[:, anchor]
        hidden = draft(
            position_ids=torch.arange(anchor + block_size)[None],
            noise_embedding=target.get_input_embeddings()(block),
            target_hidden=features[:, :anchor],
        )
        logits = target.get_output_embeddings()(hidden[:, 1:])
        loss = F.cross_entropy(logits.flatten(0, 1), rows[:, anchor + 1 : anchor + block_size].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return draft.eval().requires_grad_(False)


class OracleDraft(nn.Module):
    """Called like a draft; knows the whole text and proposes it, except at the positions it is told to spoil."""

    def __init__(
        self, target: PreTrainedModel, text: list[int], block_size: int = 8, spoiled: frozenset[int] = frozenset()
    ) -> None:
        super().__init__()
        self.config = tiny_draft_config(block_size)
        head = target.get_output_embeddings().weight
        said = [(token + (position in spoiled)) % VOCAB for position, token in enumerate(text)]
        said += [0] * block_size
        # Least-squares states from which the head reads each token; exact enough because rows are near orthogonal.
        self.states = (torch.linalg.pinv(head.T @ head) @ head.T).T[torch.tensor(said)]
        assert (self.states @ head.T).argmax(dim=-1).tolist() == said
        self.calls: list[tuple[int, int]] = []

    def forward(
        self,
        position_ids: Tensor,
        noise_embedding: Tensor,
        target_hidden: Tensor,
        past_key_values: DraftCache | None = None,
    ) -> Tensor:
        num_block = noise_embedding.shape[1]
        assert position_ids.shape[1] == target_hidden.shape[1] + num_block
        self.calls.append((target_hidden.shape[1], num_block))
        if past_key_values is not None:
            assert past_key_values.length == int(position_ids[0, 0])
            past_key_values.advance(position_ids.shape[1])
        return self.states[position_ids[0, -num_block:]].unsqueeze(0)
