"""Which server a request goes to: the least busy of those that answer; one that does not is left to rest.

A server that gives nothing for some tries in a row rests; one single try follows, of something harmless, and without an
answer a longer rest.
After some rests in a row it is gone: it is still tried at times, but when all are gone the work stops.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dflash_offline.schemas.errors import DflashError
from dflash_offline.schemas.settings.regenerate import RegenerateConfig

POLL_S = 0.02
"""Between two looks for a server that is ready, while all rest."""
LONGEST_REST = 16
"""Of a server that others stand in for, in first rests."""


class ServersGoneError(DflashError):
    """No server answers any more."""


@dataclass
class Server:
    """One server and how it does."""

    url: str
    busy: int = 0
    """Requests on their way."""
    given: int = 0
    """Requests that it was given in all."""
    failures: int = 0
    """Tries without an answer, in a row."""
    rests: int = 0
    """In a row; above 0 it gets nothing but a single try after each rest."""
    rests_until: float = 0.0
    on_trial: bool = False
    """The single try after a rest is on its way."""
    last: str = ""
    """What became of the newest try without an answer."""


class Servers:
    """All servers of one run."""

    def __init__(self, urls: Sequence[str], config: RegenerateConfig, say: Callable[[str], None]) -> None:
        self.config = config
        self.say = say
        self.servers = [Server(url) for url in urls]
        self.num_answers = 0
        self.was_heard = False
        """Whether any of them has said anything at all."""

    async def acquire(self, avoid: Server | None) -> Server:
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

    def answered(self, server: Server, *, counts: bool) -> None:
        """Note that a server does its work; a refusal does not count among the answers."""
        self.was_heard = True
        self.num_answers += counts
        server.failures = server.rests = 0
        server.on_trial = False

    def failed(self, server: Server, what: str, *, heard: bool, retry_after_s: float) -> None:
        """Note a try without an answer, though something may have been heard; `ServersGoneError` ends all hope."""
        self.was_heard |= heard
        server.failures += 1
        server.last = what
        was_sent_before_the_rest = server.rests and not server.on_trial
        if was_sent_before_the_rest or (server.failures < self.config.server_tries and not server.on_trial):
            return
        server.on_trial = False
        rest_s = max(self.config.rest_s * min(2**server.rests, LONGEST_REST), retry_after_s)
        server.rests += 1
        server.rests_until = time.monotonic() + rest_s
        if all(self._is_gone(one) for one in self.servers):
            listed = "".join(
                f"\n  {one.url}: {one.failures} tries in a row; the last: {one.last}" for one in self.servers
            )
            check = "" if self.was_heard else " See that --server is right."
            raise ServersGoneError(
                f"No server answers:{listed}\nThe answers so far are kept. Repeat the command when one is back.{check}"
            )
        self.say(f"{server.url} rests for {rest_s:.0f} s after {server.failures} tries in a row: {what}")

    def _is_gone(self, server: Server) -> bool:
        # Where nothing was ever heard the likely fault is the URL, and nobody should wait to be told.
        rests = self.config.rests if self.was_heard else 0
        return server.rests > rests and not server.on_trial
