"""What nobody may see: the key of the servers, the passwords in their URLs, and the credentials of object stores."""

import base64
import os
import re
from collections.abc import Iterable
from typing import Any
from urllib.parse import unquote, urlsplit, urlunsplit

from dflash_offline.schemas.errors import DflashError

KEY_VARIABLE = "OPENAI_API_KEY"
MASK = "***"
SHORTEST_KEY = 8
"""Characters of a secret that an answer may not hold; shorter ones, as in 'EMPTY', are words."""


_STORE_VARIABLE = re.compile(r"(AWS|AZURE|GOOGLE)_\w*(KEY|SECRET|TOKEN|PASSWORD|CREDENTIAL|SAS)\w*")
"""Names of variables that hold credentials of object stores."""


class Secrets:
    """Masks secrets wherever a text holds them."""

    def __init__(self, key: str | None, urls: Iterable[str], others: Iterable[str] = ()) -> None:
        """`others` are masked as well. Raises `DflashError`, which does not show it, for a key no request can carry."""
        if key is not None and not re.fullmatch(r"[!-~]+", key):
            raise DflashError(
                f"{KEY_VARIABLE} holds a blank, a line break or a character that is not ASCII; expected the key alone. "
                f"Set it again, or unset it if the servers need none."
            )
        self.key = key
        found = {key, *others} if key else {*others}
        for parts in map(urlsplit, urls):
            name, password = unquote(parts.username or ""), unquote(parts.password or "")
            if password:
                found |= {password, parts.password or "", base64.b64encode(f"{name}:{password}".encode()).decode()}
            found |= {value for value in (parts.username, parts.query) if value and not password}
        self._found = sorted(found, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, self._found))) if self._found else None

    def masked(self, value: Any) -> Any:
        """Return a text, or any value of JSON, without secrets."""
        if self._pattern is None:
            return value
        if isinstance(value, str):
            return self._pattern.sub(MASK, value)
        if isinstance(value, list):
            return [self.masked(item) for item in value]
        if isinstance(value, dict):
            return {self.masked(key): self.masked(item) for key, item in value.items()}
        return value

    def spelled_in(self, texts: Iterable[str]) -> bool:
        """Say whether a text spells a secret that is long enough to be no common word."""
        return any(secret in text for text in texts for secret in self._found if len(secret) >= SHORTEST_KEY)


def environment_secrets() -> Secrets:
    """Return what masks the credentials of object stores that the environment holds."""
    values = (value for name, value in os.environ.items() if _STORE_VARIABLE.fullmatch(name))
    return Secrets(None, (), [value for value in values if len(value) >= SHORTEST_KEY])


def shown_url(url: str) -> str:
    """Return a URL as it may be seen and stored: without name, password, query and fragment."""
    try:
        parts = urlsplit(url)
        host = parts.netloc.rpartition("@")[2]
    except ValueError:
        return MASK if "@" in url else url
    return urlunsplit((parts.scheme, host, parts.path, "", ""))
