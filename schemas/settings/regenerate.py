"""What a user may set for `dflash regenerate`. Each text and default exists here and nowhere else."""

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

from dflash_offline.schemas.secrets import shown_url
from dflash_offline.schemas.settings import cluster, shared
from dflash_offline.schemas.settings.engine import (
    TRANSFORMERS,
    Engine,
    EngineArgs,
    GpuMemoryUtilization,
    KvCacheDtype,
    Quantization,
    TensorParallelSize,
    engine_problems,
)
from dflash_offline.schemas.settings.option import AT_LEAST_0, AT_LEAST_1, SEEDS, Bounds, Option, problems, refuse

_SECONDS = Bounds("a number of seconds", lambda value: 0 <= value < math.inf)
_INSTEAD = {
    "device_map": "vllm takes tensor_parallel_size",
    "attn_implementation": "vllm chooses its own",
    "batch_rows": "vllm takes max_num_seqs in engine_args",
}
"""Settings of transformers alone."""
_LEAST_TEMPERATURE_OF_VLLM = 0.01
"""vLLM draws at it where a lower one is asked for."""


@dataclass(frozen=True, kw_only=True)
class RegenerateConfig:
    """Settings of `dflash regenerate`."""

    # The formatter would give every word of an option a line of its own.
    # fmt: off

    data: shared.Data
    out: Annotated[Path, Option(
        "JSONL file of the conversations with the target's own answers; continued if it was begun.",
        "Data", "free", "FILE")]
    input_format: shared.InputFormat = None
    limit: shared.Limit = None
    skip_bad_rows: shared.SkipBadRows = False
    target: Annotated[str | None, replace(
        shared.TARGET,
        help="Hugging Face model that answers: a folder, or a hub id. With --server only a name.")] = None
    revision: shared.Revision = None
    trust_remote_code: shared.TrustRemoteCode = False
    dtype: shared.TargetDtype = "auto"
    attn_implementation: shared.AttnImplementation = "sdpa"
    device: shared.Device = "auto"
    device_map: shared.DeviceMap = None
    batch_rows: Annotated[int, Option(
        "Conversations that a target loaded here answers at once; another number may decide a near tie otherwise.",
        "Target", "identity", "ROWS", bounds=AT_LEAST_1)] = 32
    engine: Engine = TRANSFORMERS
    tensor_parallel_size: TensorParallelSize = 1
    gpu_memory_utilization: GpuMemoryUtilization = 0.9
    quantization: Quantization = None
    kv_cache_dtype: KvCacheDtype = "auto"
    engine_args: EngineArgs = field(default_factory=dict)
    max_new_tokens: Annotated[int, Option(
        "Tokens of one answer, at most; a longer answer leaves its row out.",
        "Answers", "identity", "TOKENS", bounds=AT_LEAST_1)] = 2048
    keep_rewritten: Annotated[bool, Option(
        "Keep answers that the chat template or the tokenizer writes otherwise than the target said them.",
        "Answers", "identity")] = False
    stop_after_rejected: Annotated[int, Option(
        "Answers after which the command stops if all of them are rejected for one reason; 0 goes on.",
        "Answers", "free", "ANSWERS", bounds=AT_LEAST_0)] = 8
    temperature: shared.Temperature = 0.0
    top_p: shared.TopP = 1.0
    top_k: Annotated[int, Option(
        "Likeliest tokens that may be drawn; 0 draws from all.",
        "Answers", "identity", "TOKENS", bounds=AT_LEAST_0)] = 0
    min_p: Annotated[float, Option(
        "Share of the likeliest token's probability that a token must have to be drawn; 0 draws from all.",
        "Answers", "identity", "SHARE", bounds=Bounds("0 or more, and below 1", lambda value: 0 <= value < 1))] = 0.0
    seed: Annotated[int, Option(
        "Seed of what is drawn, to which each row adds its number; and of rows, where data has shares.",
        "Answers", "identity", "SEED", bounds=SEEDS)] = 0
    chat_template_kwargs: shared.TemplateKwargs = field(default_factory=dict)
    servers: Annotated[tuple[str, ...], Option(
        "OpenAI-compatible server that answers instead of a model loaded here; may be given several times.",
        "Servers", "resolved", "URL", flags=("--server",))] = ()
    model: Annotated[str | None, Option(
        "Name of the model on the servers.", "Servers", "resolved", "NAME", unset="the target's")] = None
    concurrency: Annotated[int, Option(
        "Requests on their way to all servers together, at most.",
        "Servers", "free", "REQUESTS", bounds=AT_LEAST_1)] = 32
    timeout_s: Annotated[float, Option(
        "Time within which a server's answer must be complete.",
        "Servers", "free", "SECONDS",
        bounds=Bounds("a number of seconds above 0", lambda value: 0 < value < math.inf))] = 600.0
    row_tries: Annotated[int, Option(
        "Tries after which a row is left out that fails while others are answered.",
        "Servers", "free", "TRIES", bounds=AT_LEAST_1)] = 8
    backoff_s: Annotated[float, Option(
        "Pause before a request's second try; each next one is doubled, up to a minute, or what the server asks.",
        "Servers", "free", "SECONDS", bounds=_SECONDS)] = 1.0
    server_tries: Annotated[int, Option(
        "Tries in a row without an answer after which a server is left in peace for a while.",
        "Servers", "free", "TRIES", bounds=AT_LEAST_1)] = 5
    rest_s: Annotated[float, Option(
        "Time that a failing server is first left in peace; one try follows, and each next rest is twice as long.",
        "Servers", "free", "SECONDS", bounds=_SECONDS)] = 15.0
    rests: Annotated[int, Option(
        "Rests in a row after which a server is gone; when all are, the command stops.",
        "Servers", "free", "TIMES", bounds=AT_LEAST_1)] = 4
    ray: cluster.Ray = None
    gpus_per_worker: cluster.GpusPerWorker = None
    workers_min: cluster.WorkersMin = 1
    workers_max: cluster.WorkersMax = None

    # fmt: on

    @property
    def model_name(self) -> str:
        """What requests name the model."""
        return self.model or self.target or ""

    def __post_init__(self) -> None:
        found = problems(self)
        if self.out.suffix != ".jsonl":
            found.append(f"out is {self.out}; expected the name of a file that ends in .jsonl.")
        if not self.data:
            found.append("No data is given.")
        if not self.temperature:
            asked = [name for name in ("top_k", "min_p") if getattr(self, name)]
            found += [f"{name} is of tokens that are drawn, and temperature is 0, which is greedy." for name in asked]
        found += self._source_problems() + cluster.cluster_problems(self) + engine_problems(self, {}, _INSTEAD)
        refuse("regenerate", found + shared.template_problems(self.chat_template_kwargs))

    def _source_problems(self) -> list[str]:
        found = []
        if not self.servers and self.target is None:
            found.append("Nothing is given that could answer. Name a model by --target, or a server by --server.")
        if not self.servers and self.model is not None:
            found.append("model is the name on a server, and no server is given. Name the model by --target.")
        if self.servers and self.engine != TRANSFORMERS:
            found.append(
                f"engine is {self.engine}, and servers are given, which answer instead. Leave one of them out."
            )
        if self.engine != TRANSFORMERS and 0 < self.temperature < _LEAST_TEMPERATURE_OF_VLLM:
            found.append(f"temperature is {self.temperature}, and vllm draws at 0.01 or more; 0 is greedy.")
        if self.servers and not self.model_name:
            found.append("The servers' model has no name. Name it by --model, as the servers list it.")
        for url in self.servers:
            try:
                parts = urlsplit(url)
                usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
            except ValueError:
                usable = False
            if not usable:
                found.append(f"server is {shown_url(url)!r}; expected a URL, as in http://127.0.0.1:8000/v1.")
        if self.ray is not None and (self.servers or self.engine != TRANSFORMERS):
            found.append("ray has workers answer by transformers. vllm answers on many machines as servers on each.")
        if len(set(self.servers)) < len(self.servers):
            found.append("The same server is named twice; name each once.")
        return found
