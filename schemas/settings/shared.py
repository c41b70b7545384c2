"""What the settings of several commands share: the data, the target and how it is loaded, how tokens are drawn."""

import math
from pathlib import Path
from typing import Annotated, Any

from dflash_offline.schemas.settings.option import ARGUMENTS, AT_LEAST_1, Bounds, Option

MIN_TEMPERATURE = 1e-5
"""Below it, logits divided by the temperature may leave float32; 0 is greedy."""
_TEMPERATURES = Bounds(
    f"0 (greedy), or {MIN_TEMPERATURE} or more", lambda value: value == 0 or MIN_TEMPERATURE <= value < math.inf
)
RESERVED_TEMPLATE_KWARGS = (
    "conversation messages tokenize tokenizer_kwargs add_generation_prompt continue_final_message".split()
)
TARGET = Option("Hugging Face model: a folder, or a hub id.", "Target", "resolved", "MODEL")
DEVICE = Option(
    "Device to compute on: cpu, cuda or cuda:N; auto takes a GPU if there is one.",
    "Target",
    "resolved",
    "NAME",
    completions=("auto", "cpu", "cuda", "cuda:0"),
)
ATTENTION = Option(
    "Attention of the target, as transformers names it: sdpa, eager, flash_attention_2, ...",
    "Target",
    "identity",
    "NAME",
    completions=("sdpa", "eager", "flash_attention_2", "flex_attention"),
)

# The formatter would give every word of an option a line of its own.
# fmt: off
Data = Annotated[tuple[Path, ...], Option(
    "Conversations: files, folders, globs, saved datasets or hub ids; a.jsonl:0.3 takes that share of its rows.",
    ARGUMENTS, "resolved", "DATA")]
InputFormat = Annotated[str | None, Option(
    "Format of the files (json, jsonl, parquet or arrow), of their rows (messages, sharegpt, prompt-response, "
    "text or tokens), or of both, as in parquet,messages.",
    "Data", "identity", "NAME[,NAME]", unset="found out",
    completions=tuple("json jsonl parquet arrow messages sharegpt prompt-response text tokens".split()))]
Limit = Annotated[int | None, Option(
    "Rows to read, at most.", "Data", "identity", "ROWS", unset="all", bounds=AT_LEAST_1)]
SkipBadRows = Annotated[bool, Option(
    "Leave unusable rows out, counted and listed, instead of stopping.", "Data", "identity")]
TemplateKwargs = Annotated[dict[str, Any], Option(
    """Arguments passed to the chat template, as in '{"enable_thinking": false}'.""", "Target", "identity", "JSON")]
Revision = Annotated[str | None, Option(
    "Revision of a hub id: a branch, a tag or a commit.", "Target", "resolved", "NAME", unset="main")]
TrustRemoteCode = Annotated[bool, Option("Run code that comes with the model.", "Target", "free")]
TargetDtype = Annotated[str, Option(
    "Data type of the target's weights: float32, bfloat16 or float16; auto is float32 on the CPU and the "
    "checkpoint's own on a GPU.",
    "Target", "resolved", "NAME", choices=("auto", "float32", "bfloat16", "float16"))]
AttnImplementation = Annotated[str, ATTENTION]
Device = Annotated[str, DEVICE]
DeviceMap = Annotated[str | None, Option(
    "How transformers spreads the target over devices; with auto, one larger than a GPU takes all of them.",
    "Target", "identity", "NAME", unset="one device", completions=("auto",))]
Temperature = Annotated[float, Option(
    "Temperature at which tokens are drawn; 0 takes the likeliest token each time.",
    "Answers", "identity", "T", bounds=_TEMPERATURES)]
TopP = Annotated[float, Option(
    "Probability that the likeliest tokens must have together; others are not drawn. 1 draws from all.",
    "Answers", "identity", "SHARE", bounds=Bounds("above 0, and at most 1", lambda value: 0 < value <= 1))]
# fmt: on


def template_problems(kwargs: dict[str, Any]) -> list[str]:
    """Return what is wrong with a user's arguments to the chat template: those that this program sets itself."""
    taken = sorted(name for name in kwargs if name in RESERVED_TEMPLATE_KWARGS or name.startswith("return_"))
    return [f"chat_template_kwargs holds {', '.join(taken)}, which this program sets itself."] if taken else []
