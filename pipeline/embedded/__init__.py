"""The default target that ships with the package, the conversations it answered, and how both were made."""

from pathlib import Path

HERE = Path(__file__).resolve().parent
TARGET = HERE / "target"
"""A Hugging Face model folder: Qwen3 architecture, byte-level BPE tokenizer, chat template with generation tags."""
CONVERSATIONS = HERE / "conversations.jsonl"
"""Training conversations whose answers are the target's own greedy ones, as `dflash regenerate` made them."""
PROMPTS = HERE / "prompts.jsonl"
"""Held-out conversations of the same kinds, none of which is in CONVERSATIONS."""
