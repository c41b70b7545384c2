"""The array `final` added to a cache: the target's last hidden states, after its final norm.

`final.json` says that there is such an array, and how it is stored; it comes first, so that whoever adds the array goes
on with what it says. The array's metadata follow from it. A cache's own manifest and records stay as they are: for who
asks for hidden states alone nothing has changed, and who asks for final states asks for all of their records.
"""

import json
from dataclasses import asdict

from dflash_offline.schemas.errors import DflashError
from dflash_offline.schemas.files import publish, refuse_links
from dflash_offline.schemas.identity import refuse_other_identity
from dflash_offline.schemas.manifest import (
    FEATURES,
    FINAL,
    FINAL_MANIFEST,
    FINAL_METADATA,
    FINAL_RULE,
    TMP,
    FinalDocument,
)
from dflash_offline.stages.store.array_metadata import final_document
from dflash_offline.stages.store.cache import Cache
from dflash_offline.stages.store.chunks import CODEC
from dflash_offline.stages.store.leftovers import part_path


def add_final(cache: Cache) -> Cache:
    """Let a cache have the array `final`, unless it has; returns it, of any number of shards.

    Raises `MismatchError` if it has one that was made otherwise.
    """
    folder, features = cache.path, cache.layout.features.of_final
    refuse_links(folder, f"{FEATURES}/{FINAL}", TMP)
    identity = {"capture": FINAL_RULE, "codec": CODEC, "features": asdict(features)}
    content = FinalDocument(cache=cache.manifest.checksum, identity=identity, features=features).to_bytes()
    _publish(cache, FINAL_MANIFEST, content)
    manifest = cache.manifest.final(folder)
    if manifest is None:
        raise DflashError(f"{folder / FINAL_MANIFEST} was removed just now. Repeat the command.")
    refuse_other_identity(folder / FINAL_MANIFEST, manifest.identity["final"], identity)
    metadata = json.dumps(final_document(manifest), indent=2).encode()
    _publish(cache, FINAL_METADATA, metadata)
    final = cache.final
    assert final is not None, "it was published"
    return final


def _publish(cache: Cache, name: str, content: bytes) -> None:
    """Write a small file of a cache, whole, unless there is one of its name."""
    if cache.mirror is not None:
        cache.mirror.bucket.create(name, content)
        cache.mirror.pull_one(name)
    elif not (path := cache.path / name).exists():
        (cache.path / TMP).mkdir(exist_ok=True)  # copies of a cache may lack empty folders
        temporary = part_path(cache.path, 0)  # what a killed command leaves of it is removed with half-written shards
        try:
            publish([content], temporary=temporary, path=path)
        finally:
            temporary.unlink(missing_ok=True)
