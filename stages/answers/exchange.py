"""One exchange with a server: a request, and a response of bounded bytes and time, its secrets masked.

Responses are asked for uncompressed and refused otherwise, so that a byte received is a byte held; the headers are
bounded by h11 (100 KiB), and all of it by the time limit.
"""

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpx2

from dflash_offline.schemas.secrets import Secrets

LONGEST_RETRY_AFTER_S = 600.0
CONNECT_TIMEOUT_S = 10.0
_MOST_BYTES = 1 << 20
"""Bytes of a response beside its tokens, at most: what they become as objects is some fifty times as much."""
_BYTES_OF_NUMBER, _BYTES_OF_TOKEN = 8, 256
"""Bytes of a token's number; of a long token, escaped, and its number."""


class NoAnswerError(Exception):
    """A try gave no answer, and the next one may."""

    def __init__(self, what: str, *, of_row: bool, heard: bool = True, retry_after_s: float = 0.0) -> None:
        super().__init__(what)
        self.of_row = of_row
        """Whether the row may be what made the try fail."""
        self.heard = heard
        """Whether there was a server at all."""
        self.retry_after_s = retry_after_s
        """Seconds that the server asks to be left alone."""


@dataclass(frozen=True, kw_only=True)
class Response:
    """What a server said."""

    status: int
    retry_after_s: float
    body: bytes
    error: str
    """The body as an error shows it, where the status is one."""


class Client:
    """Exchanges with servers, many at once, over connections that are kept."""

    def __init__(self, secrets: Secrets, *, concurrency: int, timeout_s: float) -> None:
        self.secrets = secrets
        self._timeout_s = timeout_s
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        if secrets.key:
            headers["Authorization"] = f"Bearer {secrets.key}"
        self._client = httpx2.AsyncClient(
            headers=headers,
            timeout=httpx2.Timeout(None, connect=min(CONNECT_TIMEOUT_S, timeout_s)),
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=concurrency),
        )

    async def __aenter__(self) -> "Client":
        await self._client.__aenter__()
        return self

    async def __aexit__(self, *raised: Any) -> None:
        await self._client.__aexit__(*raised)

    async def post(
        self,
        url: str,
        document: dict[str, Any],
        num_new_tokens: int = 0,
        on_piece: Callable[[bytes], None] | None = None,
    ) -> Response:
        """Return the response to a JSON document; `NoAnswerError` if none comes whole and in time.

        It may be as large as the tokens of the request and `num_new_tokens` more need. `on_piece` is shown each piece
        of a body of status 200 as it comes.
        """
        content = json.dumps(document).encode()
        most_bytes = _MOST_BYTES + _BYTES_OF_NUMBER * len(content) + _BYTES_OF_TOKEN * num_new_tokens
        return await self._exchange("POST", url, content, most_bytes, on_piece)

    async def get(self, url: str, most_bytes: int = 16 * _MOST_BYTES) -> Response:
        """Return what stands at a URL, of so many bytes at most."""
        return await self._exchange("GET", url, None, most_bytes, None)

    async def _exchange(
        self, method: str, url: str, content: bytes | None, most_bytes: int, on_piece: Callable[[bytes], None] | None
    ) -> Response:
        body = bytearray()
        try:
            async with (
                asyncio.timeout(self._timeout_s),
                self._client.stream(method, url, content=content) as response,
            ):
                coding = response.headers.get("content-encoding", "identity")
                if coding.strip().lower() != "identity":
                    shown = self.secrets.masked(coding)[:40]
                    raise NoAnswerError(f"the answer is compressed ({shown!r}), which was not asked for", of_row=False)
                async for piece in response.aiter_raw():
                    body += piece
                    if len(body) > most_bytes:
                        raise NoAnswerError(f"more than {most_bytes:,} bytes", of_row=True)
                    if on_piece and response.status_code == 200:
                        on_piece(piece)
        except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
            what = f"cannot connect ({self.secrets.masked(str(error)) or type(error).__name__})"
            raise NoAnswerError(what, of_row=False, heard=False) from None
        except TimeoutError:
            raise NoAnswerError(f"no answer within {self._timeout_s:g} s", of_row=True) from None
        except httpx2.RequestError as error:
            what = f"connection broken ({type(error).__name__}: {self.secrets.masked(str(error))})"
            raise NoAnswerError(what, of_row=True) from None
        return Response(
            status=response.status_code,
            retry_after_s=retry_after_s(response.headers),
            body=bytes(body),
            error="" if response.status_code == 200 else self._error_text(bytes(body)),
        )

    def _error_text(self, body: bytes) -> str:
        text = body[:4096].decode(errors="replace")
        try:
            error = json.loads(body)
            error = error.get("error", error)
            text = str(error["message"] if isinstance(error, dict) and "message" in error else error)
        except (ValueError, AttributeError, RecursionError):
            pass
        return " ".join(str(self.secrets.masked(text)).split())[:300] or "(nothing more)"


def retry_after_s(headers: Any) -> float:
    """Return the seconds of a Retry-After header, which may also name an instant; 0 without one."""
    text = headers.get("retry-after", "")
    try:
        seconds = float(text)
    except ValueError:
        try:
            seconds = (parsedate_to_datetime(text) - datetime.now(UTC)).total_seconds()
        except (ValueError, TypeError):
            return 0.0
    return min(max(seconds, 0.0), LONGEST_RETRY_AFTER_S) if seconds == seconds else 0.0
