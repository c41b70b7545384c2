"""Retries: which server the next try goes to and when, and how often until a server or a row is given up.

A try goes to the least busy of the servers that answer. A server that gives nothing for some tries in a row rests; one
single try follows, of something harmless, and without an answer a longer rest. After some rests in a row it is gone: it
is still tried at times, but when all are gone the work stops. A row is given up after some tries that failed for its
own sake while other rows were answered.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, wait_exponential, wait_random

from dflash_offline.schemas.errors import DflashError
from dflash_offline.schemas.secrets import shown_url
from dflash_offline.schemas.settings.regenerate import RegenerateConfig
from dflash_offline.stages.answers.advice import NO_ANSWER, REFUSED, REWRITTEN
from dflash_offline.stages.answers.chat_completions import (
    TOKENS,
    Said,
    ask_server,
    optional_fields,
    readings,
    tokens_of,
)
from dflash_offline.stages.answers.dialogues import Answer, Dialogue
from dflash_offline.stages.answers.exchange import Client, NoAnswerError

LONGEST_BACKOFF_S = 60.0
LONGEST_REST = 16
"""Times the first rest that a server rests at most."""
POLL_S = 0.02
"""Seconds between two looks for a server that is ready, while all rest."""
PROBE = Dialogue(index=0, source="", line=0, questions=[[{"role": "user", "content": "Say yes."}]], recorded=[[]])
"""What a server is asked after a rest: no row, for there may be rows that it never answers."""


class ServersGoneError(DflashError):
    """No server answers any more."""


@dataclass
class Server:
    """One server and how its requests went."""

    url: str
    optional: dict[str, Any]
    """Fields of requests that it may not know, as they are sent to it."""
    is_known: bool = False
    """Whether it has answered with these fields: what it refuses then is the row."""
    tokenizes: bool = True
    """Whether it says what its chat template makes of a conversation."""
    busy: int = 0
    """Requests under way."""
    given: int = 0
    """Requests that were sent to it in all."""
    failures: int = 0
    """Tries without an answer, in a row."""
    rests: int = 0
    """Rests in a row; above 0 it gets nothing but a single try after each."""
    rests_until: float = 0.0
    on_trial: bool = False
    """Whether the single try after a rest is under way."""
    last_error: str = ""
    """Why the newest failed try gave no answer."""

    @property
    def name(self) -> str:
        """The URL as it may be seen."""
        return shown_url(self.url)


class Servers:
    """All servers of one run, asked until there is an answer."""

    def __init__(self, urls: Sequence[str], config: RegenerateConfig, say: Callable[[str], None]) -> None:
        self.config = config
        self.say = say
        self.servers = [Server(url, optional_fields(config)) for url in urls]
        self.num_answers = 0
        self.was_heard = False
        """Whether any of them has said anything at all."""

    async def ask(self, client: Client, dialogue: Dialogue) -> Answer:
        """Return the next answer of a dialogue, tried until there is one, or until the row itself is to blame."""
        answers_before, failures, avoid = self.num_answers, 0, None

        def is_to_blame(state: RetryCallState) -> bool:
            nonlocal failures
            assert state.outcome is not None
            failures += getattr(state.outcome.exception(), "of_row", 0)
            return failures >= self.config.row_tries and self.num_answers > answers_before

        async def attempt() -> Answer:
            nonlocal avoid
            avoid = server = await self._acquire(avoid)
            try:
                if server.on_trial:
                    await self._probe(client, server)
                said = await self._ask_as_it_takes(client, server, dialogue, self.config.max_new_tokens)
                answer = await self._compared(client, server, dialogue, said)
            except NoAnswerError as error:
                self._note_failure(server, error)
                raise
            finally:
                server.busy -= 1
            self._note_answer(server, counts=answer.fault != REFUSED)
            return answer

        retrying = AsyncRetrying(
            retry=retry_if_exception_type(NoAnswerError), wait=self._wait, stop=is_to_blame, reraise=True
        )
        try:
            return await retrying(attempt)
        except NoAnswerError as error:
            detail = f"turn {len(dialogue.answers)}: {failures} tries; the last: {error}"
            return Answer(fault=NO_ANSWER, detail=detail)

    async def _ask_as_it_takes(self, client: Client, server: Server, dialogue: Dialogue, max_tokens: int) -> Said:
        """Return a server's answer to a request without the fields that it refuses to take, and say which these are."""
        optional = dict(server.optional)
        while True:
            said = await ask_server(client, server.url, self.config, dialogue, max_tokens, optional)
            if said.answer.fault != REFUSED or server.is_known or not optional:
                break
            named = [name for name in optional if name in said.answer.detail] or [*optional]
            if named == ["top_k"] and optional["top_k"] == -1:
                optional["top_k"] = 0  # how other servers are told to take all
            else:
                optional = {name: value for name, value in optional.items() if name not in named}
        if said.answer.fault == REFUSED:
            return said
        if not server.is_known:
            server.is_known, server.optional = True, optional
            if missing := self._not_taken(server):
                self.say(f"{server.name} does not take {', '.join(missing)}: its own values hold, if it has any")
        if said.answer.fault or not (missing := self._not_taken(server)):
            return said
        return replace(said, answer=replace(said.answer, not_taken=missing))

    def _not_taken(self, server: Server) -> list[str]:
        return sorted(optional_fields(self.config).keys() - server.optional.keys() - {TOKENS})

    async def _compared(self, client: Client, server: Server, dialogue: Dialogue, said: Said) -> Answer:
        """Return the answer as the server's chat template writes it back in the tokens that were generated.

        It stays as it came where the server says neither those nor what its template makes of it.
        """
        if said.answer.fault or said.prompt_ids is None or said.ids is None or not server.tokenizes:
            return said.answer
        wanted = said.prompt_ids + said.ids[:-1]  # any token that ends an answer may stand for another
        for answer in readings(said.answer):
            written = await tokens_of(client, server.url, self.config, dialogue, answer)
            if not isinstance(written, list):
                server.tokenizes = False
                return said.answer
            if written[: len(wanted)] == wanted:
                return replace(answer, compared=True)
        if self.config.keep_rewritten:
            return said.answer
        detail = f"turn {len(dialogue.answers)}: the server's chat template makes other tokens of it"
        return Answer(fault=REWRITTEN, detail=detail)

    async def _probe(self, client: Client, server: Server) -> None:
        """Note that a server answers again; `NoAnswerError`, for which no row is to blame, if it does not."""
        try:
            said = await self._ask_as_it_takes(client, server, PROBE, 1)
        except NoAnswerError as error:
            error.of_row = False
            raise
        self._note_answer(server, counts=said.answer.fault != REFUSED)

    def _wait(self, state: RetryCallState) -> float:
        """Return the seconds until the next try: doubled each time, and no fewer than the server asks for."""
        first = self.config.backoff_s
        assert state.outcome is not None
        asked_for = getattr(state.outcome.exception(), "retry_after_s", 0.0)
        backoff = wait_exponential(multiplier=first, max=LONGEST_BACKOFF_S) + wait_random(0, first)
        return max(backoff(state), asked_for)

    async def _acquire(self, avoid: Server | None) -> Server:
        """Return a server that is ready, once one is: another than `avoid` where there is one."""
        while True:
            now = time.monotonic()
            ready = [s for s in self.servers if not s.rests or (now >= s.rests_until and not s.on_trial)]
            if ready:
                server = min(ready, key=lambda s: (s is avoid, s.busy, s.given))
                server.busy += 1
                server.given += 1
                server.on_trial = server.rests > 0
                return server
            await asyncio.sleep(POLL_S)

    def _note_answer(self, server: Server, *, counts: bool) -> None:
        """Note that a server does its work; a refusal does not count among the answers."""
        self.was_heard = True
        self.num_answers += counts
        server.failures = server.rests = 0
        server.on_trial = False

    def _note_failure(self, server: Server, error: NoAnswerError) -> None:
        """Count a try without an answer, and let the server rest after too many; `ServersGoneError` if all are gone."""
        self.was_heard |= error.heard
        server.failures += 1
        server.last_error = str(error)
        was_sent_before_the_rest = server.rests and not server.on_trial
        if was_sent_before_the_rest or (server.failures < self.config.server_tries and not server.on_trial):
            return
        server.on_trial = False
        rest_s = max(self.config.rest_s * min(2**server.rests, LONGEST_REST), error.retry_after_s)
        server.rests += 1
        server.rests_until = time.monotonic() + rest_s
        if all(map(self._is_gone, self.servers)):
            listed = "".join(
                f"\n  {gone.name}: {gone.failures} tries in a row; the last: {gone.last_error}" for gone in self.servers
            )
            check = "" if self.was_heard else " See that --server is right."
            raise ServersGoneError(
                f"No server answers:{listed}\nThe answers so far are kept. Repeat the command when one is back.{check}"
            )
        self.say(f"{server.name} rests for {rest_s:.0f} s after {server.failures} tries in a row: {error}")

    def _is_gone(self, server: Server) -> bool:
        # Where nothing was ever heard the likely fault is the URL, and nobody should wait to be told.
        rests = self.config.rests if self.was_heard else 0
        return server.rests > rests and not server.on_trial
