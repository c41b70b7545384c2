"""What a user may set for `dflash eval`. Each default exists here and nowhere else."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dflash_offline.schemas.errors import DflashError
from dflash_offline.schemas.settings.shared import DTYPES, choice_problems, template_problems

MIN_TEMPERATURE = 1e-5
"""Below it, logits divided by the temperature may leave float32; 0 is greedy."""


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Settings of `dflash eval`."""

    draft: Path
    """Folder of a draft (config.json and model.safetensors), or of a run, of which the best checkpoint is taken."""
    target: str | None = None
    """Hugging Face model: a folder, or a hub id; None for the serving walk over a cache, which needs no target."""
    prompts: Path | None = None
    """JSONL file of {"messages": [...]} or {"prompt": "..."}; an optional "kind" groups the figures."""
    cache: Path | None = None
    """Cache whose held-out part gives the prompts, or is walked; instead of `prompts`."""
    revision: str | None = None
    """Revision of a hub id."""
    limit: int | None = None
    """Prompts read from the top of the file, or held-out samples of the cache; None for all."""
    max_new_tokens: int = 256
    """Tokens of one answer, at most."""
    temperature: float = 0.0
    """0 for greedy decoding; above, tokens are drawn, and drafted ones kept by rejection sampling."""
    top_p: float = 1.0
    """When tokens are drawn: the likeliest that together have this much; 1 for all."""
    seed: int = 0
    """Of the draws."""
    repeats: int = 1
    """Times that each prompt is decoded each way, in turn; its seconds are the median."""
    prompt_lookup: bool = False
    """Also decode with prompt lookup, the comparison that needs no draft."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Passed to the chat template."""
    device: str = "auto"
    """cpu, cuda or cuda:N; auto takes a GPU if there is one."""
    dtype: str = "auto"
    """float32, bfloat16 or float16; auto is float32 on the CPU and the target's own on a GPU."""
    attn_implementation: str = "sdpa"
    """As transformers names it."""
    trust_remote_code: bool = False
    """Run code that comes with the model."""
    threads: int | None = None
    """CPU threads of torch; None for torch's own choice."""
    keep_rounds: bool = False
    """Also keep every prompt's rounds, token by token; only where a target decodes."""

    def __post_init__(self) -> None:
        problems = []
        for name in ("limit", "max_new_tokens", "threads", "repeats"):
            value = getattr(self, name)
            if value is not None and value < 1:
                problems.append(f"{name} is {value}; expected at least 1.")
        if self.temperature != 0 and not MIN_TEMPERATURE <= self.temperature < math.inf:
            problems.append(f"temperature is {self.temperature}; expected 0 (greedy), or {MIN_TEMPERATURE} or more.")
        if not 0 < self.top_p <= 1:
            problems.append(f"top_p is {self.top_p}; expected above 0, and at most 1.")
        if not 0 <= self.seed < 2**63:
            problems.append(f"seed is {self.seed}; expected 0 or more, below 2**63.")
        problems += self._source_problems()
        problems += choice_problems(self, dtype=DTYPES)
        problems += template_problems(self.chat_template_kwargs)
        if problems:
            raise DflashError("These settings of `dflash eval` cannot be used:\n  " + "\n  ".join(problems))

    def _source_problems(self) -> list[str]:
        if (self.prompts is None) == (self.cache is None):
            return ["Give either --prompts FILE or --cache CACHE: one of them is what is decoded."]
        if self.target is not None:
            return []
        if self.cache is None:
            return ["No target is given. Name one with --target, or walk a cache without it, by --cache CACHE."]
        live = {"temperature": self.temperature > 0, "prompt_lookup": self.prompt_lookup, "repeats": self.repeats > 1}
        return [f"{name} needs --target: a cache is walked without one." for name, given in live.items() if given]
