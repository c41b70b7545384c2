"""What a user may set for `dflash diagnose`. Each text and default exists here and nowhere else."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from dflash_offline.schemas.secrets import shown_url
from dflash_offline.schemas.settings import shared
from dflash_offline.schemas.settings.evaluate import is_url
from dflash_offline.schemas.settings.option import ARGUMENTS, AT_LEAST_1, POSITIVE, Option, problems, refuse


@dataclass(frozen=True, kw_only=True)
class DiagnoseConfig:
    """Settings of `dflash diagnose`, which keeps nothing to go on with."""

    # The formatter would give every word of an option a line of its own.
    # fmt: off

    draft: Annotated[Path, Option(
        "Draft folder as it was trained, ours or another's; or a run folder, of which the best checkpoint is taken.",
        ARGUMENTS, "resolved", "DRAFT")]
    cache: Annotated[Path, Option(
        "Cache of the draft's target; the samples that training held out are walked.",
        "What is compared", "resolved", "CACHE")]
    server: Annotated[str | None, Option(
        "Server with the draft, asked one prompt at a time; its own counters say what it accepted.",
        "What is compared", "resolved", "URL", unset="none")] = None
    served: Annotated[str | None, Option(
        "Acceptance by position of a server, as in 0.31,0.12,0.04 (of all rounds, as vLLM logs it); or a result that "
        "`dflash eval --server --save` wrote.",
        "What is compared", "resolved", "SHARES|FILE", unset="none", instead_of="server")] = None
    served_rounds: Annotated[int | None, Option(
        "Rounds that the shares of --served were counted over.",
        "What is compared", "identity", "ROUNDS", unset="as many as are walked", bounds=AT_LEAST_1)] = None
    prompts: Annotated[Path | None, Option(
        "JSONL file of the prompts that are served, so that chat template and thinking mode are compared too.",
        "What is compared", "resolved", "FILE", unset="those of the held-out samples")] = None
    limit: Annotated[int, Option(
        "Prompts or held-out samples, at most, from the first.",
        "What is compared", "identity", "PROMPTS", bounds=AT_LEAST_1)] = 200
    max_new_tokens: Annotated[int, Option(
        "Tokens of one answer, at most.", "What is compared", "identity", "TOKENS", bounds=AT_LEAST_1)] = 256
    chat_template_kwargs: Annotated[dict[str, Any], Option(
        """Arguments of the chat template that your requests send, as in '{"enable_thinking": false}'.""",
        "What is compared", "identity", "JSON")] = field(default_factory=dict)
    model: Annotated[str | None, Option(
        "Name of the model on the server.", "What is compared", "resolved", "NAME",
        unset="the first that it lists")] = None
    timeout_s: Annotated[float, Option(
        "Time within which an answer of the server must be complete.", "What is compared", "free", "SECONDS",
        bounds=POSITIVE)] = 600.0
    target: Annotated[str | None, replace(shared.TARGET, unset="the one that the cache names")] = None
    other_target: Annotated[str | None, Option(
        "Another model of the same shape that may be the one which is served.",
        "Target", "resolved", "MODEL", unset="none")] = None
    rerun: Annotated[bool, Option(
        "Run the target again for what the cache does not hold: other layers, prompts, another data type.",
        "Target", "identity")] = True
    revision: shared.Revision = None
    device: shared.Device = "auto"
    dtype: shared.TargetDtype = "auto"
    attn_implementation: shared.AttnImplementation = "sdpa"
    trust_remote_code: shared.TrustRemoteCode = False

    # fmt: on

    def __post_init__(self) -> None:
        found = problems(self) + shared.template_problems(self.chat_template_kwargs)
        if self.server is not None and self.served is not None:
            found.append("Give either --server URL or --served, not both: one of them says what was served.")
        if self.server is not None and not is_url(self.server):
            found.append(f"server is {shown_url(self.server)!r}; expected a URL, as in http://127.0.0.1:8000/v1.")
        if self.served_rounds is not None and self.served is None:
            found.append("served_rounds says over how many rounds the shares of --served were counted; give them.")
        if self.model is not None and self.server is None:
            found.append("model is what a server calls it: give --server URL too.")
        if self.prompts is not None and self.server is None and self.served is None:
            found.append("prompts are those that were served: give --server URL or --served too.")
        if not self.rerun and (self.target or self.other_target or self.prompts):
            found.append("target, other_target and prompts need a target to be run, and --no-rerun forbids it.")
        refuse("diagnose", found)
