"""The static files of a new cache, published in a bucket by whoever is first, whole or not at all.

An attempt puts its files under names of its own below `tmp/`. One object, made only if it is not there, says which
attempt it is to be; whoever finds it has the server copy that attempt's files to their names, the manifest last. So the
files beside a manifest are those of one attempt, whoever copies them and wherever it dies: copies of one attempt are
alike, and no attempt is chosen once there is a manifest.
"""

import secrets
from pathlib import Path

from dflash_offline.schemas.errors import StoreError
from dflash_offline.schemas.manifest import MANIFEST, TMP
from dflash_offline.stages.buckets.bucket import Bucket, Listed, in_parallel

_CHOSEN = f"{TMP}/chosen"
"""Names the attempt that is being put in place."""
_ATTEMPT = f"{TMP}/building-"


def publish_static(bucket: Bucket, folder: Path) -> None:
    """Publish the files of a folder, unless another attempt is published first; `bucket` then holds that one's."""
    attempt = f"{_ATTEMPT}{secrets.token_hex(8)}"
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    in_parallel(lambda name: bucket.put(f"{attempt}/{name}", folder / name), files)
    if bucket.size(MANIFEST) is None and bucket.create(_CHOSEN, attempt.encode()):
        _put_in_place(bucket, attempt)
    complete_static(bucket)
    remove_attempts(bucket)


def prepare_bucket(bucket: Bucket) -> None:
    """Make sure that a bucket can hold a cache, and complete or clean up what was being published in it.

    Raises `StoreError` as `try_conditional_writes` does.
    """
    try_conditional_writes(bucket)
    complete_static(bucket)
    remove_attempts(bucket)


def try_conditional_writes(bucket: Bucket) -> None:
    """Raise `StoreError` if a bucket cannot be written, or writes over an object that must not be there yet.

    Nothing of the trial stays.
    """
    probe = f"{TMP}/probe-{secrets.token_hex(8)}"
    try:
        if not bucket.create(probe, b"first") or bucket.create(probe, b"second"):
            raise StoreError(
                f"{bucket.url}: the store writes over an object although it is told not to (If-None-Match), so that "
                f"two workers could mix their shards. Use a store that knows conditional writes."
            )
    finally:
        bucket.remove(probe)


def complete_static(bucket: Bucket) -> bool:
    """Put in place what was chosen and is not published yet, if anything is; returns whether there is a manifest."""
    chosen = bucket.read(_CHOSEN)
    if chosen is not None:
        _put_in_place(bucket, chosen.decode())
    return bucket.size(MANIFEST) is not None


def remove_attempts(bucket: Bucket) -> None:
    """Remove what attempts have left, once there is a manifest."""
    if bucket.size(MANIFEST) is None:
        return
    left = [name for name in bucket.names(TMP) if name.startswith(_ATTEMPT)]
    in_parallel(bucket.remove, left)
    bucket.remove(_CHOSEN)


def attempts(bucket: Bucket) -> dict[str, Listed]:
    """Return what attempts have put so far, by name."""
    return {name: found for name, found in bucket.names(TMP).items() if name.startswith((_ATTEMPT, _CHOSEN))}


def _put_in_place(bucket: Bucket, attempt: str) -> None:
    """Copy the files of the chosen attempt to their names, the manifest last, unless there is a manifest."""
    if bucket.size(MANIFEST) is not None:
        return
    sizes = {name.removeprefix(f"{attempt}/"): size for name, (size, *_) in bucket.names(attempt).items()}
    for name in [*(name for name in sizes if name != MANIFEST), MANIFEST]:
        if not bucket.copy(f"{attempt}/{name}", name, sizes.get(name, 0)) and bucket.size(MANIFEST) is None:
            raise StoreError(
                f"{bucket.url}/{attempt}/{name} is gone, and no plan is published yet: something else removes objects "
                f"there. Name a new --out."
            )
