"""What a server counts of its own work: vLLM at /metrics, SGLang at /server_info."""

import json
import re
from collections import defaultdict
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from dflash_offline.schemas.errors import DflashError
from dflash_offline.schemas.evaluation import Counted
from dflash_offline.schemas.secrets import shown_url
from dflash_offline.stages.answers.exchange import Client, NoAnswerError

VLLM, SGLANG, UNKNOWN = "vLLM", "SGLang", "unknown"
_SAMPLE = re.compile(r"^([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)", re.MULTILINE)
_POSITION = re.compile(r'(?:^|,)position="(\d+)"')
_DRAFTS = "vllm:spec_decode_num_drafts_total"
_SGLANG_TOKENS, _SGLANG_REQUESTS = "sglang:generation_tokens_total", "sglang:num_requests_total"


@dataclass(frozen=True, kw_only=True)
class Counters:
    """A server's counters at one moment; what it does not count is None."""

    kind: str
    requests: int | None = None
    """Requests that ended."""
    tokens: int | None = None
    """Tokens that it generated."""
    running: int | None = None
    """Requests under way."""
    drafts: int | None = None
    drafted: int | None = None
    accepted: int | None = None
    by_slot: tuple[int, ...] = ()
    average: float | None = None
    """Tokens a round since the server's start."""
    num_speculative_tokens: int | None = None


def server_root(url: str) -> str:
    """Return a base URL without what belongs to the OpenAI protocol."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(path=re.sub(r"(/v\d+)?(/chat)?(/completions)?/?$", "", parts.path)))


async def read_counters(client: Client, url: str) -> Counters:
    """Return a server's counters; of one that shows none that are known here, the kind alone."""
    root = server_root(url)
    metrics = _samples(await _text(client, f"{root}/metrics"))
    if any(name.startswith("vllm:") for name in metrics):
        return _of_vllm(metrics)
    for name in ("server_info", "get_server_info"):
        try:
            found = json.loads(await _text(client, f"{root}/{name}"))
        except (ValueError, RecursionError):
            continue
        if isinstance(found, dict) and isinstance(found.get("internal_states"), list):
            return _of_sglang(found, metrics)
    return Counters(kind=UNKNOWN)


def counted(before: Counters, after: Counters, requests: int, tokens: int, url: str) -> Counted | None:
    """Return what a server counted between two moments in which it gave us so many answers of so many tokens.

    Raises `DflashError` where a counter went back, which it does only when the server is started again.
    """
    if after.kind == UNKNOWN:
        return None
    pairs = [(getattr(before, name), getattr(after, name)) for name in ("requests", "tokens", "drafts", "accepted")]
    if before.kind != after.kind or any(new < (old or 0) for old, new in pairs if new is not None):
        raise DflashError(
            f"The server at {shown_url(url)} was started again while it was measured: its counters went back. Repeat "
            f"the command."
        )
    others: dict[str, Any] = {
        "other_requests": _others(before.requests, after.requests, requests),
        "other_tokens": _others(before.tokens, after.tokens, tokens),
    }
    if after.drafts is None:
        return Counted(acceptance_length=after.average, since_start=True, **others)
    rounds, drafted, accepted = (
        (getattr(after, name) or 0) - (getattr(before, name) or 0) for name in ("drafts", "drafted", "accepted")
    )
    old = (*before.by_slot, *(0,) * len(after.by_slot))
    return Counted(
        acceptance_length=1 + accepted / rounds if rounds else None,
        rounds=rounds,
        drafted=drafted,
        accepted=accepted,
        accepted_by_slot=tuple(new - was for new, was in zip(after.by_slot, old, strict=False)),
        **others,
    )


def _others(before: int | None, after: int | None, ours: int) -> int:
    return 0 if after is None else after - (before or 0) - ours


async def _text(client: Client, url: str) -> str:
    """Return what stands at a URL; nothing where the server has nothing there."""
    try:
        response = await client.get(url)
    except NoAnswerError as error:
        raise DflashError(f"{shown_url(url)}: {error}. See that --server is right and the server is up.") from None
    return response.body.decode(errors="replace") if response.status == 200 else ""


def _samples(text: str) -> dict[str, list[tuple[str, int]]]:
    """Return the samples of Prometheus's text format by name, each with its labels; values are whole here."""
    found = defaultdict(list)
    for name, labels, value in _SAMPLE.findall(text):
        try:
            found[name].append((labels, int(float(value))))
        except (ValueError, OverflowError):
            continue
    return found


def _total(samples: dict[str, list[tuple[str, int]]], name: str) -> int | None:
    """Return a counter's sum over all engines and labels; None where there is none."""
    return sum(value for _, value in samples[name]) if name in samples else None


def _of_vllm(samples: dict[str, list[tuple[str, int]]]) -> Counters:
    slots: dict[int, int] = defaultdict(int)
    for labels, value in samples.get("vllm:spec_decode_num_accepted_tokens_per_pos_total", ()):
        if position := _POSITION.search(labels):
            slots[int(position[1])] += value
    by_slot = tuple(value for _, value in sorted(slots.items()))
    return Counters(
        kind=VLLM,
        requests=_total(samples, "vllm:request_success_total"),
        tokens=_total(samples, "vllm:generation_tokens_total"),
        running=_total(samples, "vllm:num_requests_running"),
        drafts=_total(samples, _DRAFTS),
        drafted=_total(samples, "vllm:spec_decode_num_draft_tokens_total"),
        accepted=_total(samples, "vllm:spec_decode_num_accepted_tokens_total"),
        by_slot=by_slot,
        num_speculative_tokens=len(by_slot) or None,
    )


def _of_sglang(info: dict[str, Any], samples: dict[str, list[tuple[str, int]]]) -> Counters:
    """SGLang averages since its start, an average for each of its schedulers, and counts requests only if asked to."""
    states = [state for state in info["internal_states"] if isinstance(state, dict)]
    averages = [state.get("avg_spec_accept_length") for state in states]
    numbers = [value for value in averages if isinstance(value, int | float) and not isinstance(value, bool) and value]
    block = info.get("speculative_num_draft_tokens")
    return Counters(
        kind=SGLANG,
        requests=_total(samples, _SGLANG_REQUESTS),
        tokens=_total(samples, _SGLANG_TOKENS),
        average=sum(numbers) / len(numbers) if numbers else None,
        num_speculative_tokens=block - 1 if isinstance(block, int) and block > 1 else None,  # it counts the anchor
    )
