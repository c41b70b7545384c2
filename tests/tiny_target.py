"""Tiny random targets with a real tokenizer and chat template, saved as Hugging Face folders."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

WITH_TAGS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}{{ '\n' }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ m.content }}<|im_end|>{{ '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant{{ '\n' }}{% endif %}"
)
WITHOUT_TAGS = WITH_TAGS.replace("{% generation %}", "").replace("{% endgeneration %}", "")
WORDS = """the a red blue green cat dog bird sees likes counts
one two three four five six seven eight nine ten""".split()


SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|mask|>")


def save_tokenizer(
    folder: Path, template: str = WITH_TAGS, *, special: tuple[str, ...] = SPECIAL, eos: str = "<|im_end|>"
) -> PreTrainedTokenizerFast:
    """Save a byte-level BPE tokenizer of about 300 tokens with chat markers, among them a reserved mask token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(WORDS)] * 10, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=eos,
        pad_token=special[0],
        additional_special_tokens=[token for token in special[1:] if token != eos],
    )
    fast.chat_template = template
    fast.save_pretrained(folder)
    return fast


def save_target(
    folder: Path, *, template: str = WITH_TAGS, num_layers: int = 6, seed: int = 0, **overrides: object
) -> Path:
    """Save a random Qwen3 target with its tokenizer; returns the folder."""
    torch.manual_seed(seed)
    settings = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": 304,
        "max_position_embeddings": 512,
        "num_hidden_layers": num_layers,
    }
    config = Qwen3Config(**{**settings, **overrides}, tie_word_embeddings=True, eos_token_id=2)
    model = Qwen3ForCausalLM(config)
    for parameter in model.parameters():  # large enough that greedy answers vary
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.15)
    model.generation_config.eos_token_id = 2
    model.save_pretrained(folder)
    save_tokenizer(folder, template)
    return folder


def conversations(count: int, seed: int = 0, *, most_words: int = 60) -> list[dict[str, object]]:
    """Return rows of one or two turns with answers of varied length."""
    generator = torch.Generator().manual_seed(seed)

    def words(low: int, high: int) -> str:
        length = int(torch.randint(low, high, (), generator=generator))
        return " ".join(WORDS[int(i)] for i in torch.randint(0, len(WORDS), (length,), generator=generator))

    rows: list[dict[str, object]] = []
    for index in range(count):
        messages = [{"role": "user", "content": words(3, 12)}, {"role": "assistant", "content": words(10, most_words)}]
        if index % 3 == 0:
            messages += [{"role": "user", "content": words(2, 6)}, {"role": "assistant", "content": words(8, 30)}]
        rows.append({"messages": messages})
    return rows


def save_conversations(path: Path, count: int, seed: int = 0) -> Path:
    """Write rows as JSONL; returns the path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in conversations(count, seed)))
    return path
