"""One prefix of a bucket (S3, GCS, Azure): whole objects, ranges, conditional writes, and errors to act on.

Credentials and endpoints come from the environment, as obstore takes them. No message shows them: it is made of an
error's status, code and first sentence, and what the environment holds of secrets is masked in it.
"""

import os
import re
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast
from urllib.parse import urlsplit

from dflash_offline.schemas.errors import DflashError, StoreError
from dflash_offline.schemas.secrets import environment_secrets

MOST_OBJECT_BYTES = 5 * 10**9
"""Of an object that is put at once, as a conditional write has to be, or copied by the server."""
_PART_BYTES = 32 << 20
"""Bytes of one request where a whole object is fetched."""
_AT_ONCE = 16
"""Requests that one call has under way."""
RANGE_BYTES = 8 << 20
"""Bytes of one request where a range of an object is read."""
SMALL_AT_ONCE = 64
"""Requests for small objects that one call has under way: each is little but waiting."""
_PAGE = 1000
"""Names that a store lists at a time."""
_CLIENT_OPTIONS = (
    "allow_http allow_invalid_certificates connect_timeout http1_only http2_only pool_idle_timeout proxy_url "
    "proxy_ca_certificate proxy_excludes timeout user_agent"
).split()
"""Options of the HTTP client that the environment may set: AWS_ALLOW_HTTP and so on."""
_PREFIXES = {"s3": "AWS", "gs": "GOOGLE", "az": "AZURE"}
_TIMEOUT = "30m"
"""Of one request: a whole shard is put in one."""
_REPEAT = "What is finished is kept: repeat the command when the store answers again."

T = TypeVar("T")


class Listed(NamedTuple):
    """An object as a list names it."""

    size: int
    """Bytes."""
    changed: float
    """Time of writing by the store's clock, in seconds."""
    e_tag: str | None
    """Another one whenever the content is another; None where the store gives none."""


class Bucket:
    """The objects below one URL, by their names within it. Safe in threads."""

    def __init__(self, url: str, store: Any | None = None) -> None:
        """`store` is an obstore store of the URL; without it one is opened, and `StoreError` says if none can be."""
        self.url = url
        self._store = _open(url) if store is None else store

    def read(self, name: str) -> bytes | None:
        """Return an object's content, or None if there is no such object."""
        return self._found(name, lambda obstore: bytes(obstore.get(self._store, name).bytes()))

    def read_tagged(self, name: str) -> tuple[bytes, str | None] | None:
        """Return an object's content and the entity tag that it has with it, or None if there is no such object."""

        def read(obstore: Any) -> tuple[bytes, str | None]:
            answer = obstore.get(self._store, name)
            return bytes(answer.bytes()), answer.meta["e_tag"]

        return self._found(name, read)

    def size(self, name: str) -> int | None:
        """Return an object's bytes, or None if there is no such object."""
        return self._found(name, lambda obstore: int(obstore.head(self._store, name)["size"]))

    def read_range(self, name: str, begin: int, end: int) -> Any:
        """Return bytes `begin` to `end` of an object that is there, as a buffer; `StoreError` if it is not.

        Many bytes are asked for in parts, side by side: one connection is slower than what a machine can take.
        """
        begins = range(begin, end, RANGE_BYTES)
        if len(begins) == 1:
            found = [self._range(name, begin, end)]
        else:
            found = list(_parts().map(lambda first: self._range(name, first, min(first + RANGE_BYTES, end)), begins))
        if any(part is None for part in found):
            raise StoreError(f"{self.url}/{name} is gone: an object of the cache was removed while it was read.")
        return found[0] if len(found) == 1 else b"".join(memoryview(part) for part in found if part is not None)

    def read_sized(self, name: str, begin: int, end: int) -> tuple[bytes, int] | None:
        """Return bytes `begin` to `end` of an object and the bytes that it has in all, or None if it is not there."""

        def read(obstore: Any) -> tuple[bytes, int]:
            answer = obstore.get(self._store, name, options={"range": (begin, end)})
            return bytes(answer.bytes()), int(answer.meta["size"])

        return self._found(name, read)

    def _range(self, name: str, begin: int, end: int) -> Any | None:
        return self._found(name, lambda obstore: obstore.get_range(self._store, name, start=begin, end=end))

    def fetch(self, name: str, path: Path) -> bool:
        """Write an object to a new file; returns False, with no file left, if there is no such object."""
        size = self.size(name)
        if size is None:
            return False
        path.parent.mkdir(parents=True, exist_ok=True)
        begins = range(0, size, _PART_BYTES)
        with path.open("xb") as file, ThreadPoolExecutor(_AT_ONCE) as pool:
            for part in pool.map(lambda begin: self._range(name, begin, min(begin + _PART_BYTES, size)), begins):
                if part is None:
                    path.unlink()  # it was removed meanwhile
                    return False
                file.write(part)
        return True

    def put(self, name: str, content: bytes | Path) -> None:
        """Make an object hold the content, whole or not at all."""
        self._asked(name, lambda obstore: obstore.put(self._store, name, content))

    def create(self, name: str, content: bytes | Path) -> bool:
        """Make a new object hold the content, whole or not at all; returns False if there is one of this name."""
        size = len(content) if isinstance(content, bytes) else content.stat().st_size
        if size > MOST_OBJECT_BYTES:
            raise DflashError(
                f"{self.url}/{name} would have {size:,} bytes, and a store takes {MOST_OBJECT_BYTES:,} in one object "
                f"that must not be there yet. Extract into a new --out with a lower --shard-mib."
            )

        def put(obstore: Any) -> bool:
            try:
                obstore.put(self._store, name, content, mode="create", use_multipart=False)
            except obstore.exceptions.AlreadyExistsError:
                return False
            return True

        return self._asked(name, put)

    def copy(self, name: str, to: str, size: int) -> bool:
        """Make another object hold what one of `size` bytes does; returns False if that one is not there."""

        def copied(obstore: Any) -> bool:
            if size <= MOST_OBJECT_BYTES:
                obstore.copy(self._store, name, to)
            else:
                obstore.put(self._store, to, iter(obstore.get(self._store, name).stream()))
            return True

        return self._found(name, copied) is not None

    def names(self, within: str = "", cuts: Sequence[str] = ()) -> dict[str, Listed]:
        """Return every object below a folder, by name.

        A list comes a thousand names at a time, each page after the one before. `cuts`, ascending names, let the pages
        between them be asked for side by side, in a store that can begin a list anywhere.
        """

        def listed(first: str, last: str | None) -> dict[str, Listed]:
            return self._asked(within, lambda obstore: self._listed(obstore, within, first, last))

        if not cuts or not self.url.startswith("s3://"):  # others would list from the start for each part
            return listed("", None)
        found = in_parallel(lambda part: listed(*part), zip(["", *cuts], [*cuts, None], strict=True))
        return {name: one for part in found for name, one in part.items()}

    def _listed(self, obstore: Any, within: str, first: str, last: str | None) -> dict[str, Listed]:
        """Return the objects whose names come after `first`, up to `last`."""
        found = {}
        for page in obstore.list(self._store, within or None, offset=first or None, chunk_size=_PAGE):
            for one in page:
                if last is None or one["path"] <= last:
                    found[one["path"]] = Listed(one["size"], one["last_modified"].timestamp(), one["e_tag"])
            if last is not None and page and page[-1]["path"] >= last:
                break
        return found

    def remove(self, *names: str) -> None:
        """Remove objects, in this order; those that are not there are no error."""
        for name in names:
            self._found(name, partial(_delete, self._store, name))

    def _found(self, name: str, ask: Callable[[Any], T]) -> T | None:
        def asked(obstore: Any) -> T | None:
            try:
                return ask(obstore)
            except FileNotFoundError as error:
                if "NoSuchBucket" in str(error) or "ContainerNotFound" in str(error):
                    raise
                return None

        return self._asked(name, asked)

    def _asked(self, name: str, ask: Callable[[Any], T]) -> T:
        import obstore
        import obstore.exceptions

        try:
            return ask(obstore)
        except (obstore.exceptions.BaseError, OSError) as error:
            place = f"{self.url}/{name}" if name else self.url
            raise StoreError(refusal(place, str(error))) from None  # its text may hold secrets


@cache
def _parts() -> ThreadPoolExecutor:
    """Return the threads that ask for the parts of long ranges; no task of theirs waits for another."""
    return ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="ranges")


def _delete(store: Any, name: str, obstore: Any) -> None:
    obstore.delete(store, name)


def in_parallel(work: Callable[[Any], T], items: Iterable[Any], at_once: int | None = None) -> list[T]:
    """Return what requests for all items give, some at a time; raises what the first that failed raised."""
    with ThreadPoolExecutor(at_once or _AT_ONCE) as pool:
        return list(pool.map(work, items))


def _open(url: str) -> Any:
    """Return an obstore store of a URL; `DflashError` if obstore is missing, `StoreError` if no store can be opened."""
    try:
        import obstore.exceptions
        from obstore.store import from_url
    except ImportError as error:
        raise DflashError(
            f"{url} is in an object store, which needs obstore ({error}). "
            "Install it: pip install 'dflash-offline[store]'"
        ) from error
    parts = urlsplit(url)
    if "@" in parts.netloc or parts.query or parts.fragment:
        shown = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
        raise DflashError(
            f"The address of {shown} holds more than a bucket and a prefix. Credentials and endpoints are taken from "
            f"the environment alone, such as AWS_ACCESS_KEY_ID and AWS_ENDPOINT_URL."
        )
    given = {name: os.environ.get(f"{_PREFIXES[parts.scheme]}_{name.upper()}") for name in _CLIENT_OPTIONS}
    options: dict[str, Any] = {"timeout": _TIMEOUT} | {name: value for name, value in given.items() if value}
    for name, value in options.items():
        if value.lower() in ("true", "false", "1", "0"):
            options[name] = value.lower() in ("true", "1")
    try:
        return from_url(url, client_options=cast("Any", options))
    except (obstore.exceptions.BaseError, OSError, ValueError) as error:
        raise StoreError(refusal(url, str(error))) from None


def refusal(place: str, said: str) -> str:
    """Return the message of a request that failed for good: what the store said, and what to do about it."""
    status = re.search(r"status code: (\d{3}[^:\n]*)", said)
    code, text = (re.search(rf"<{tag}>(.*?)</{tag}>", said, re.DOTALL) for tag in ("Code", "Message"))
    if status or code:
        found = " ".join(part[1].strip() for part in (status, code) if part)
        found += f" ({' '.join(text[1].split()).rstrip('.')})" if text else ""
    else:
        found = re.sub(r"\?\S+", "", said.partition("\n")[0]).strip().rstrip(".")
    tried = re.search(r"after (\d+) retries", said)
    often = f", tried {int(tried[1]) + 1} times" if tried and int(tried[1]) else ""
    return environment_secrets().masked(f"{place}: the store refused: {found}{often}. {_advice(said)}")


def _advice(said: str) -> str:
    for pattern, advice in (
        ("RequestTimeTooSkewed", "Set this machine's clock, and repeat the command."),
        ("NoSuchBucket|ContainerNotFound|bucket does not exist", "Make the bucket, or correct its name."),
        (
            r"169\.254\.|[Cc]redential",
            "There are no credentials in the environment that the store takes: set them, such as AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY.",
        ),
        (
            r"status code: 40[13]|AccessDenied|InvalidAccessKeyId|SignatureDoesNotMatch|Permission|nauthenticated",
            "Correct the credentials in the environment, or have them allowed to read, write, list and remove there.",
        ),
        (r"status code: 30\d|Redirect", "Name the bucket's own region, as in AWS_REGION."),
        ("status code: 501|NotImplemented|not supported", "This store lacks what a cache needs; use another."),
    ):
        if re.search(pattern, said):
            return advice
    return _REPEAT
