"""What a user may set for regenerating answers. Each default exists here and nowhere else."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from dflash_offline.schemas.errors import DflashError
from dflash_offline.schemas.settings.evaluate import MIN_TEMPERATURE
from dflash_offline.schemas.settings.shared import template_problems


@dataclass(frozen=True, kw_only=True)
class RegenerateConfig:
    """Settings of `dflash regenerate`."""

    data: tuple[Path, ...]
    """Files, folders, globs, saved datasets or hub ids of conversations, as `dflash extract` takes them."""
    out: Path
    """JSONL file of the conversations with the target's own answers; continued if it was begun."""
    target: str | None = None
    """Hugging Face model that answers: a folder, or a hub id. With servers only a name."""
    servers: tuple[str, ...] = ()
    """Base URLs of OpenAI-compatible servers that answer instead; nothing is loaded here then."""
    model: str | None = None
    """The model's name on the servers; None for the target's."""
    revision: str | None = None
    """Revision of a hub id."""
    temperature: float = 0.0
    """0 for the likeliest token each time; above, tokens are drawn."""
    top_p: float = 1.0
    """When tokens are drawn: the likeliest that together have this much; 1 for all."""
    seed: int = 0
    """Of the draws, a row's own by its number; and of rows, where data has weights."""
    max_new_tokens: int = 2048
    """Tokens of one answer, at most; a longer one leaves its row out."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Passed to the chat template, also by servers that know it."""
    input_format: str | None = None
    """As for `dflash extract`; None to find out."""
    limit: int | None = None
    """Rows read, at most."""
    skip_bad_rows: bool = False
    """Leave unusable rows out, counted and listed, instead of stopping."""
    dtype: str = "auto"
    """float32, bfloat16 or float16; auto is float32 on the CPU and the checkpoint's own on a GPU."""
    attn_implementation: str = "sdpa"
    """As transformers names it."""
    trust_remote_code: bool = False
    """Run code that comes with the model."""
    device: str = "auto"
    """cpu, cuda or cuda:N; auto takes a GPU if there is one."""
    device_map: str | None = None
    """Spread a target over several devices as transformers does, e.g. auto; None for one device."""
    batch_rows: int = 32
    """Conversations answered at once by a target that is loaded here."""
    concurrency: int = 32
    """Requests on their way to all servers together, at most."""
    timeout_s: float = 600.0
    """Seconds within which a server's answer must be complete."""
    row_tries: int = 8
    """Tries after which a row is left out, if its failures are its own: others were answered meanwhile."""
    backoff_s: float = 1.0
    """Seconds before a request's second try; doubled each time, up to a minute, with as much chance added."""
    server_tries: int = 5
    """Tries in a row without an answer after which a server rests."""
    rest_s: float = 15.0
    """Seconds of a server's first rest; one try follows, and without an answer a rest twice as long."""
    rests: int = 4
    """Rests in a row after which a server is gone; when all are, the command stops."""

    @property
    def model_name(self) -> str:
        """What requests name the model."""
        return self.model or self.target or ""

    def __post_init__(self) -> None:
        problems = []
        for (
            name
        ) in "max_new_tokens batch_rows concurrency row_tries server_tries rests timeout_s backoff_s rest_s".split():
            value, low = getattr(self, name), 1 if not name.endswith("_s") else 0
            if not (low <= value < math.inf) or (name == "timeout_s" and not value):
                problems.append(f"{name} is {value}; expected {'at least 1' if low else 'a number of seconds'}.")
        if self.limit is not None and self.limit < 1:
            problems.append(f"limit is {self.limit}; expected at least 1.")
        if self.temperature != 0 and not MIN_TEMPERATURE <= self.temperature < math.inf:
            problems.append(f"temperature is {self.temperature}; expected 0 (greedy), or {MIN_TEMPERATURE} or more.")
        if not 0 < self.top_p <= 1:
            problems.append(f"top_p is {self.top_p}; expected above 0, and at most 1.")
        if not 0 <= self.seed < 2**63:
            problems.append(f"seed is {self.seed}; expected 0 or more, below 2**63.")
        if self.dtype not in ("auto", "float32", "bfloat16", "float16"):
            problems.append(f"dtype is {self.dtype!r}; expected auto, float32, bfloat16 or float16.")
        if self.out.suffix != ".jsonl":
            problems.append(f"out is {self.out}; expected the name of a file that ends in .jsonl.")
        if not self.data:
            problems.append("No data is given.")
        problems += self._source_problems() + template_problems(self.chat_template_kwargs)
        if problems:
            raise DflashError("These settings of `dflash regenerate` cannot be used:\n  " + "\n  ".join(problems))

    def _source_problems(self) -> list[str]:
        problems = []
        if not self.servers and self.target is None:
            problems.append("Nothing is given that could answer. Name a model by --target, or a server by --server.")
        if not self.servers and self.model is not None:
            problems.append("model is the name on a server, and no server is given. Name the model by --target.")
        if self.servers and not self.model_name:
            problems.append("The servers' model has no name. Name it by --model, as the servers list it.")
        for url in self.servers:
            try:
                parts = urlsplit(url)
                usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
            except ValueError:
                usable = False
            if not usable:
                problems.append(f"server is {url!r}; expected a URL, as in http://127.0.0.1:8000/v1.")
        if len(set(self.servers)) < len(self.servers):
            problems.append("The same server is named twice; name each once.")
        return problems
