"""What a user may set for `dflash eval`. Each text and default exists here and nowhere else."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

from dflash_offline.schemas.secrets import shown_url
from dflash_offline.schemas.settings import shared
from dflash_offline.schemas.settings.option import (
    ARGUMENTS,
    AT_LEAST_1,
    POSITIVE,
    SEEDS,
    Bounds,
    Option,
    problems,
    refuse,
)


def is_url(text: str) -> bool:
    """Say whether a text is the URL of a server."""
    try:
        parts = urlsplit(text)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Settings of `dflash eval`, which keeps nothing to go on with: a role here says what its result depends on."""

    # The formatter would give every word of an option a line of its own.
    # fmt: off

    draft: Annotated[Path, Option(
        "Draft folder, ours or another's; or a run folder, of which the best checkpoint is taken.",
        ARGUMENTS, "resolved", "DRAFT")]
    prompts: Annotated[Path | None, Option(
        'JSONL file of {"messages": [...]} or {"prompt": "..."}, a "kind" in it groups the figures; or a public set: '
        "gsm8k, math500, humaneval, mbpp, mt-bench or alpaca. NAME:FILE reads a copy of one.",
        "What is decoded", "resolved", "FILE",
        completions=tuple("gsm8k math500 humaneval mbpp mt-bench alpaca".split()))] = None
    cache: Annotated[Path | None, Option(
        "Cache whose held-out samples are the prompts, or are walked where there is no target; instead of --prompts.",
        "What is decoded", "resolved", "CACHE", instead_of="prompts")] = None
    limit: Annotated[int | None, Option(
        "Prompts, or held-out samples of the cache, to read at most, from the first; of a public set drawn by --seed.",
        "What is decoded", "identity", "PROMPTS", unset="all", bounds=AT_LEAST_1,
        flags=("--limit", "--num-prompts"))] = None
    target: Annotated[str | None, replace(shared.TARGET, unset="none; a cache is walked without it")] = None
    revision: shared.Revision = None
    max_new_tokens: Annotated[int, Option(
        "Tokens of one answer, at most.", "Answers", "identity", "TOKENS", bounds=AT_LEAST_1)] = 256
    temperature: shared.Temperature = 0.0
    top_p: shared.TopP = 1.0
    seed: Annotated[int, Option(
        "Seed of the tokens that are drawn, and of the prompts of a public set.",
        "Answers", "identity", "SEED", bounds=SEEDS)] = 0
    repeats: Annotated[int, Option(
        "Times that each prompt is decoded each way, in turn; its seconds are the median.",
        "Answers", "free", "TIMES", bounds=AT_LEAST_1)] = 1
    prompt_lookup: Annotated[bool, Option(
        "Also decode with prompt lookup, the comparison that needs no draft.", "Answers", "free")] = False
    confidence_threshold: Annotated[float | None, Option(
        "Foretold acceptance below which a block ends before a token, for drafts with a confidence head.",
        "Answers", "identity", "SHARE", unset="whole blocks",
        bounds=Bounds("0 to 1", lambda value: 0 <= value <= 1))] = None
    chat_template_kwargs: shared.TemplateKwargs = field(default_factory=dict)
    draft_lengths: Annotated[bool, Option(
        "Also measure every shorter block, and say how many tokens to draft at each --concurrency; takes some times as "
        "long.", "How many tokens to draft", "free")] = False
    speeds: Annotated[tuple[Path, ...], Option(
        "Saved result of --server with some number of drafted tokens, for its costs; two or more numbers give a line. "
        "Repeat it for each.",
        "How many tokens to draft", "resolved", "FILE", unset="costs are timed on --target")] = ()
    server: Annotated[str | None, Option(
        "OpenAI-compatible server of the target with the draft, to be measured live; --target is set beside it.",
        "Server", "resolved", "URL", unset="none")] = None
    plain_server: Annotated[str | None, Option(
        "Server of the target alone, to compare answers and speed with.", "Server", "resolved", "URL",
        unset="none")] = None
    model: Annotated[str | None, Option(
        "Name of the model on both servers.", "Server", "resolved", "NAME", unset="the first that each lists")] = None
    concurrency: Annotated[tuple[int, ...], Option(
        "Requests under way at a time: a pass over all prompts, or the costs of --draft-lengths, for each number.",
        "Server", "free", "N,N")] = (1,)
    timeout_s: Annotated[float, Option(
        "Time within which an answer of a server must be complete.", "Server", "free", "SECONDS",
        bounds=POSITIVE)] = 600.0
    device: shared.Device = "auto"
    dtype: shared.TargetDtype = "auto"
    attn_implementation: shared.AttnImplementation = "sdpa"
    trust_remote_code: shared.TrustRemoteCode = False
    threads: Annotated[int | None, Option(
        "CPU threads of torch.", "Target", "free", "THREADS", unset="one a core", bounds=AT_LEAST_1)] = None
    keep_rounds: Annotated[bool, Option(
        "Keep every prompt's rounds in the result, token by token, where a target decodes; --html does so itself.",
        "Output", "free")] = False

    # fmt: on

    def __post_init__(self) -> None:
        found = problems(self) + self._source_problems() + self._length_problems()
        refuse("eval", found + shared.template_problems(self.chat_template_kwargs))

    def _source_problems(self) -> list[str]:
        if (self.prompts is None) == (self.cache is None):
            return ["Give either --prompts FILE or --cache CACHE: one of them is what is decoded."]
        if self.server is not None:
            return self._server_problems()
        if self.plain_server is not None:
            return ["plain_server is compared with a server of the draft, and none is given. Name it by --server."]
        if self.target is not None:
            return []
        if self.cache is None:
            return ["No target is given. Name one with --target, or walk a cache without it, by --cache CACHE."]
        live: dict[str, bool] = {"confidence_threshold": self.confidence_threshold is not None}
        live |= {"temperature": self.temperature > 0, "prompt_lookup": self.prompt_lookup, "repeats": self.repeats > 1}
        return [f"{name} needs --target: a cache is walked without one." for name, given in live.items() if given]

    def _length_problems(self) -> list[str]:
        found = []
        if not self.concurrency or min(self.concurrency) < 1:
            found.append(f"concurrency is {','.join(map(str, self.concurrency))}; expected numbers from 1.")
        if len(set(self.concurrency)) < len(self.concurrency):
            found.append("concurrency names a number twice; name each once.")
        if self.speeds and not self.draft_lengths:
            found.append("speeds are for draft_lengths, which is not asked for. Add --draft-lengths.")
        if self.draft_lengths and self.target is None and self.cache is None:
            found.append("draft_lengths drafts here: name --target, or a --cache that is walked without one.")
        return found

    def _server_problems(self) -> list[str]:
        if self.confidence_threshold is not None:
            return ["confidence_threshold is of the drafting here; a server has its own. Leave out --server."]
        found = [
            f"{name} is {shown_url(url)!r}; expected a URL, as in http://127.0.0.1:8000/v1."
            for name, url in (("server", self.server), ("plain_server", self.plain_server))
            if url is not None and not is_url(url)
        ]
        if self.target is None and (self.prompt_lookup or self.repeats > 1):
            found.append("prompt_lookup and repeats are of a target that is loaded here. Name one by --target.")
        return found
