"""What a server accepted, slot by slot: as it counts it while it is asked, as a saved result says, or as typed in."""

import asyncio
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dflash_offline.schemas.checked import checked
from dflash_offline.schemas.errors import DflashError
from dflash_offline.schemas.evaluation import Counted, read_result
from dflash_offline.schemas.secrets import KEY_VARIABLE, Secrets, shown_url
from dflash_offline.schemas.settings.diagnose import DiagnoseConfig
from dflash_offline.schemas.settings.evaluate import EvalConfig
from dflash_offline.stages.answers.exchange import Client
from dflash_offline.stages.evaluation.diagnosis.known_text import KnownText
from dflash_offline.stages.evaluation.diagnosis.likelihood import Counts
from dflash_offline.stages.progress import Progress, Silent
from dflash_offline.stages.serving.counters import SGLANG, VLLM
from dflash_offline.stages.serving.measure import LiveServer, Pass, Question, measure

_LARGE_BLOCK = 64
_WHAT_TO_DO = "Name a result of `dflash eval --server URL --save FILE`, or give the shares themselves."


@dataclass(frozen=True, kw_only=True)
class ServedProfile:
    """What a server accepted of what it drafted."""

    source: str
    """Where this is known from."""
    client: str | None
    """What serves: vLLM or SGLang."""
    shares: tuple[float, ...]
    """Of all rounds, the share that accepted at least 1, 2, ... tokens; empty where the length alone is known."""
    length: float
    """Tokens a round."""
    rounds: int | None
    """Rounds counted; None where nobody says."""
    block_size: int | None
    """Tokens that are drafted, and one: those that the target reads; None where nobody says."""
    texts: tuple[KnownText, ...] = ()
    """The very answers, where the server was asked one prompt at a time."""
    each: Counts | None = field(default=None, repr=False)
    """What it counted for each of them, [P, 1 + m]."""
    other_prompts: int = 0
    """Prompts of which its chat template made other tokens than the cache's."""
    notes: tuple[str, ...] = ()

    @property
    def tries_a_round(self) -> int:
        """Tokens that a round is taken to try where the length alone is known: more than any block drafts."""
        return 2 * (self.block_size or _LARGE_BLOCK)

    def counts(self, rounds: int) -> Counts:
        """Return the counts [1 + m]; over so many rounds where it is not known how many there were.

        Of an acceptance length alone, they are the tokens tried and accepted.
        """
        rounds = self.rounds or rounds
        return rounds * np.array([1.0, *self.shares] if self.shares else [self.tries_a_round, self.length - 1])


def typed_profile(text: str, rounds: int | None) -> ServedProfile:
    """Return the profile of shares with commas between."""
    try:
        shares = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise DflashError(
            f"--served is {text!r}; expected shares of all rounds by position, as in 0.31,0.12,0.04, or the file of a "
            f"result. {_WHAT_TO_DO}"
        ) from None
    if any(not 0 <= later <= share <= 1 for share, later in zip(shares, (*shares[1:], 0.0), strict=True)):
        raise DflashError(
            f"--served is {text!r}; expected shares of all rounds from 0 to 1, none above the one before it: a token "
            f"is accepted only behind an accepted one. Shares of those tried at each position are other numbers."
        )
    return ServedProfile(
        source="--served", client=None, shares=shares, length=1 + sum(shares), rounds=rounds, block_size=None
    )


def saved_profile(path: Path) -> tuple[ServedProfile, dict[str, Any]]:
    """Return the profile of a live server that a saved result holds, its first pass, and that result.

    The result is empty where the prompts it is of are not known well enough to be answered again: others used the
    server, or tokens were drawn.
    """
    result = read_result(path, _WHAT_TO_DO)
    service: Any = result.get("service")
    try:
        told = service["passes"][0]["counted"]
        drafted, kind = service["num_speculative_tokens"], str(service["kind"])
    except (TypeError, KeyError, IndexError):
        told = None
    if told is None:
        raise DflashError(f"{path} holds no counts of a live server. {_WHAT_TO_DO}")
    counted = checked(told, Counted, path, _WHAT_TO_DO)
    profile = _profile(str(path), kind, counted, None if drafted is None else drafted + 1)
    return profile, {} if result["config"].get("temperature") or counted.is_disturbed else result


def _profile(source: str, kind: str, counted: Counted, block_size: int | None, **more: Any) -> ServedProfile:
    rounds = counted.rounds
    if counted.acceptance_length is None:
        raise DflashError(
            f"{source} counted no drafts: the server was started without a draft. Start it as the draft's card says "
            f"(vLLM: --speculative-config, SGLang: --speculative-algorithm DFLASH)."
        )
    by_slot = counted.accepted_by_slot or ()
    return ServedProfile(
        source=source,
        client=kind if kind in (VLLM, SGLANG) else None,
        shares=tuple(number / rounds for number in by_slot) if rounds else (),
        length=counted.acceptance_length,
        rounds=rounds,
        block_size=block_size,
        **more,
    )


def ask_server(
    config: DiagnoseConfig, questions: Sequence[Question], ids: Sequence[list[int]], progress: Progress
) -> ServedProfile:
    """Return what a server counts while it answers the questions one at a time, greedily.

    `ids` are the prompts' tokens as the cache's target renders them. Prompts during which others used the server are
    left out. A server whose counters are not by round is known by its acceptance length alone.
    """
    assert config.server is not None
    kind, drafted, passes, whole = asyncio.run(_ask(config, questions, progress))
    url, block_size = shown_url(config.server), None if drafted is None else drafted + 1
    if whole is None:
        raise DflashError(f"{url} shows no counters that are known here (vLLM's /metrics, SGLang's /server_info).")
    if whole.rounds is None or not all(one.answers[0].ids for one in passes):
        return _profile(url, kind, whole, block_size, notes=(_AVERAGED,) if whole.since_start else ())
    texts, each, others = [], [], 0
    for question, own, one in zip(questions, ids, passes, strict=True):
        answer, counted = one.answers[0], one.counted
        assert counted is not None
        if counted.is_disturbed:
            continue
        prompt, rounds = answer.prompt_ids or own, counted.rounds or 0
        others += prompt != own
        # The first token is the prompt's own; a round gives one more than it accepts, and none behind the last.
        beyond = rounds + (counted.accepted or 0) - (len(answer.ids) - 1)
        place, full = question.prompt.place, [*prompt, *answer.ids]
        texts.append(KnownText(place=place, ids=full, first=len(prompt), last=len(full) - 1, beyond=max(beyond - 1, 0)))
        each.append([rounds, *(counted.accepted_by_slot or ())])
    left_out = len(passes) - len(texts)
    if not texts:
        raise DflashError(f"Others used {url} during every prompt. Repeat the command when nobody does.")
    slots = max(map(len, each))
    counts = np.array([row + [0] * (slots - len(row)) for row in each], dtype=float)
    rounds, *by_slot = (int(number) for number in counts.sum(axis=0))
    total = Counted(
        acceptance_length=1 + sum(by_slot) / rounds if rounds else None, rounds=rounds, accepted_by_slot=tuple(by_slot)
    )
    notes = (f"{left_out} prompts are left out, during which others used the server",) if left_out else ()
    more = {"texts": tuple(texts), "each": counts, "other_prompts": others, "notes": notes}
    return _profile(url, kind, total, block_size, **more)


_AVERAGED = "the server tells its average acceptance length since it was started, of all prompts that it had"


async def _ask(
    config: DiagnoseConfig, questions: Sequence[Question], progress: Progress
) -> tuple[str, int | None, list[Pass], Counted | None]:
    """Return what the server is, how many tokens it drafts, a pass for each question, and what it counted in all."""
    assert config.server is not None
    asking = EvalConfig(
        draft=config.draft,
        cache=config.cache,
        server=config.server,
        model=config.model,
        max_new_tokens=config.max_new_tokens,
        timeout_s=config.timeout_s,
        chat_template_kwargs=config.chat_template_kwargs,
    )
    secrets = Secrets(os.environ.get(KEY_VARIABLE) or None, [config.server])
    async with Client(secrets, concurrency=1, timeout_s=config.timeout_s) as client:
        server = await LiveServer.meet(client, config.server, asking, questions[0])
        progress.start(f"Asking {shown_url(config.server)}", len(questions), "prompts")
        try:
            passes = []
            for question in questions:
                passes += await measure(server, [question], (1,), Silent())
                progress.advance(1)
        finally:
            progress.finish()
        return server.kind, server.num_speculative_tokens, passes, passes[-1].counted
