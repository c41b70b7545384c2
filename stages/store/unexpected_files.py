"""Files in a cache's folder that neither its manifest nor its plan knows."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path

from dflash_offline.schemas.commits import commit_path
from dflash_offline.schemas.manifest import (
    COMMITS,
    FEATURES,
    FINAL,
    FINAL_MANIFEST,
    FINAL_METADATA,
    HIDDEN,
    IDS,
    MANIFEST,
    MASK,
    TARGET,
    TMP,
    Manifest,
)
from dflash_offline.stages.buckets.bundles import bundle_names
from dflash_offline.stages.buckets.mirror import mirror_of
from dflash_offline.stages.store.leftovers import SKIPPED_LOCK, half_written, lock_path

_SHARD_FILE = {
    HIDDEN: re.compile(rf"{re.escape(FEATURES)}/(?:{HIDDEN}/c/(\d+)/0/0|(?:{IDS}|{MASK})/c/(\d+))"),
    FINAL: re.compile(rf"{re.escape(FEATURES)}/{FINAL}/c/(\d+)/0"),
}
_UNREAD = re.compile(r"(?!\.z(?:array|attrs|group|metadata)$)\..*|.*~|Thumbs\.db")
"""What file systems, file views and editors leave in any folder and no reader opens. zarr opens its second version's
metadata."""


@dataclass(frozen=True, kw_only=True)
class UnexpectedFiles:
    """What lies in a cache beside its own files, each by its path within."""

    misleading: list[str] = field(default_factory=list)
    """Where readers look: a chat template in target/, a shard beyond the plan."""
    harmless: list[str] = field(default_factory=list)
    """Where none does: a page of `dflash inspect`."""
    unrecorded_shards: list[int] = field(default_factory=list)
    """Shards with files and no record. For readers they do not exist; a worker may be at one."""


def unexpected_files(cache: Path, manifest: Manifest) -> UnexpectedFiles:
    """Return the files of a cache, a folder or a mirror's, that its manifest, plan and workers do not account for."""
    mirror = mirror_of(cache)
    names = sorted(_files(cache) if mirror is None else mirror.names(manifest.layout.num_shards))
    shards, here = range(manifest.layout.num_shards), {*names}
    arrays = [HIDDEN, FINAL] if FINAL_MANIFEST in here else [HIDDEN]
    records = {array: [f"{commit_path(Path(), shard, array)}" for shard in shards] for array in arrays}
    in_work = {str(part.path.relative_to(cache)) for part in half_written(cache)}
    locks = {str(lock_path(Path(), shard)) for shard in shards}
    bundles = set[str]()
    if mirror is not None:
        bundles.update(*(bundle_names(replace(manifest, array=array)) for array in arrays))
    known = {MANIFEST, *manifest.files, *chain(*records.values()), *bundles, *in_work, *locks, SKIPPED_LOCK}
    known |= {FINAL_MANIFEST, FINAL_METADATA} if FINAL in arrays else set()
    unexpected, unrecorded = UnexpectedFiles(), set[int]()
    for name in names:
        array, number = _shard_of(name, arrays)
        if number and number == str(int(number)) and int(number) in shards:
            if records[array][int(number)] not in here:
                unrecorded.add(int(number))
        elif name not in known:
            folder, _, rest = name.partition("/")
            is_read = folder in (TARGET, COMMITS, FEATURES) and not any(map(_UNREAD.fullmatch, rest.split("/")))
            (unexpected.misleading if is_read else unexpected.harmless).append(name)
    unexpected.unrecorded_shards.extend(sorted(unrecorded))
    return unexpected


def _shard_of(name: str, arrays: Sequence[str]) -> tuple[str, str]:
    """Return the array, and the number as it is written, of a shard's file; empty for any other file."""
    for array in arrays:
        if found := _SHARD_FILE[array].fullmatch(name):
            return array, next(filter(None, found.groups()))
    return "", ""


def _files(cache: Path) -> list[str]:
    """Return the files in the cache's own folders, and what else lies beside those without looking into it."""
    found = []
    for entry in os.scandir(cache):
        if entry.name not in (TARGET, COMMITS, FEATURES, TMP):
            found.append(entry.name)
            continue
        for folder, _, names in os.walk(entry.path, followlinks=True):
            found += [os.path.relpath(os.path.join(folder, name), cache) for name in names]  # noqa: PTH118
    return found
