"""The samples of one or more caches of the same target, numbered consecutively."""

import hashlib
from bisect import bisect_right
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dflash_offline.schemas.draft.anchor_rule import AnchorRule
from dflash_offline.schemas.errors import DflashError, dflash_line
from dflash_offline.schemas.identity import differences, refuse_differences, wherever_placed
from dflash_offline.schemas.manifest import feature_file
from dflash_offline.schemas.samples import Tokens, count_anchors
from dflash_offline.schemas.settings.engine import TRANSFORMERS
from dflash_offline.stages.buckets.local_copy import LocalCopy
from dflash_offline.stages.store.cache import Cache
from dflash_offline.stages.store.shard_file import ShardTokens

LOADED_TOKENS = 1 << 30
"""Tokens of plans that a process keeps in memory, 5 bytes each; those of larger plans come from the shards."""
_DIGEST_BYTES = 32


class Corpus:
    """Samples of several caches, numbered consecutively in the order in which the caches are given."""

    def __init__(self, caches: list[Cache]) -> None:
        self.caches = caches
        is_small = sum(cache.manifest.plan["tokens"] for cache in caches) <= LOADED_TOKENS
        for cache in caches:  # samples are asked for in any order, all of them
            if is_small:
                cache.samples.tokens.load()
            else:
                cache.shard_tokens = ShardTokens(cache.read_tokens, cache.layout.shard_tokens)
        self.starts = np.cumsum([0, *(len(cache.samples) for cache in caches)])
        self._firsts: list[int] = self.starts.tolist()
        self.num_tokens = np.concatenate([cache.samples.num_tokens for cache in caches])
        usable = [cache.usable() + start for cache, start in zip(caches, self.starts[:-1], strict=True)]
        self.usable: NDArray[np.int64] = np.concatenate(usable)
        """Samples that have features, ascending."""
        self.finals = _finals(caches)
        """The target's states after its final norm of each cache; empty unless every usable sample has them."""
        self._left_out = np.zeros(0, np.int64)

    @classmethod
    def open(cls, paths: tuple[Path, ...]) -> "Corpus":
        """Return the corpus of complete caches; `MismatchError` if they were not made alike."""
        caches = [Cache.open(path) for path in paths]
        for number, cache in enumerate(caches):
            cache.require_complete()
            if cache.manifest.checksum in {other.manifest.checksum for other in caches[:number]}:
                raise DflashError(f"{cache.path} is the same cache as one named before it. Name each cache once.")
            _refuse_other_target(caches[0], cache)
        return cls(caches)

    def require_final(self) -> None:
        """Let `split` leave out samples without the target's states after its final norm, as extraction may have done.

        `CacheError` for a cache without such states.
        """
        self.finals = [cache.require_final() for cache in self.caches]
        has_final = [final.usable() + start for final, start in zip(self.finals, self.starts[:-1], strict=True)]
        self._left_out = np.setdiff1d(self.usable, np.concatenate(has_final))

    def copy_locally(self, folder: Path, most_bytes: int, say: Callable[[str], object]) -> None:
        """Keep what is read of the caches in buckets on a local disk, and read it there again."""
        remote = [cache for cache in self.caches if cache.mirror is not None]
        wanted = {
            cache.copied_as: sum(
                commit.files[feature_file(cache.array, shard)].size for shard, commit in cache.commits.items()
            )
            for cache in remote
        }
        copy = LocalCopy(folder, most_bytes, wanted, say)
        for cache in remote:
            cache.local_copy = copy

    def __len__(self) -> int:
        return int(self.starts[-1])

    def engines(self) -> list[str]:
        """Return what ran the target for the caches, each engine once."""
        engines = [cache.manifest.identity.get("engine", {"name": TRANSFORMERS}) for cache in self.caches]
        return list(dict.fromkeys(f"{engine['name']} {engine.get('version', '')}".strip() for engine in engines))

    def locate(self, sample: int) -> tuple[int, int]:
        """Return (number of the cache, number of the sample in it)."""
        cache = bisect_right(self._firsts, sample) - 1
        return cache, sample - self._firsts[cache]

    def tokens(self, sample: int) -> Tokens:
        """Return the sample's tokens, uint32 [num_tokens], and which are supervised, bool [num_tokens]."""
        place, number = self.locate(sample)
        cache = self.caches[place]
        if cache.shard_tokens is None:
            return cache.samples.tokens.of(number)
        ids, mask = cache.shard_tokens.of(int(cache.samples.shard[number]))
        return ids[cache.slots(number)], mask[cache.slots(number)]

    def anchor_id(self, sample: int) -> int:
        """Return the id by which the sample's anchors are drawn, which does not depend on other caches' sizes."""
        cache, number = self.locate(sample)
        return (cache << 32) | number

    def num_anchors(self, rule: AnchorRule, at_most: int) -> NDArray[np.int64]:
        """Return how many anchors an epoch draws from each sample."""
        counts = [_anchor_counts(cache, rule) for cache in self.caches]
        return np.minimum(np.concatenate(counts), at_most)

    def split(self, val_samples: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return (training, validation) samples: at most `val_samples`, and at most a tenth, are held out of training.

        The split is a function of content: the same tokens always fall on the same side, so that no conversation that
        is repeated leaks from one side to the other. The samples of one conversation go together: a later one holds
        the answers of those before.
        """
        room = min(val_samples, len(self.usable) // 10)
        is_held_out = np.zeros(len(self.usable), np.bool_)
        if room:
            is_held_out = _held_out(self._digests(), room)
        has_final = ~np.isin(self.usable, self._left_out)
        return self.usable[~is_held_out & has_final], self.usable[is_held_out & has_final]

    def _digests(self) -> NDArray[np.bytes_]:
        """Return a hash of each usable sample's tokens, or of all samples' of the conversation that it is a part of.

        The plan is read once from its start to its end.
        """
        found = bytearray(_DIGEST_BYTES * len(self.usable))  # of a hundred million, objects would take five times that
        place = 0
        for start, cache, members in zip(self.starts[:-1], self.caches, self.by_cache(self.usable), strict=True):
            is_usable = np.zeros(len(cache.samples), np.bool_)
            is_usable[members - start] = True
            for first, offsets, ids in cache.samples.tokens.groups():
                data, ends = ids.data.cast("B"), (4 * offsets).tolist()
                for number in np.flatnonzero(is_usable[first : first + len(offsets) - 1]).tolist():
                    text = data[ends[number] : ends[number + 1]]
                    found[place : place + _DIGEST_BYTES] = hashlib.sha256(text).digest()
                    place += _DIGEST_BYTES
        digests = np.frombuffer(found, f"S{_DIGEST_BYTES}")
        for places in self._conversations():
            begins = (_DIGEST_BYTES * places).tolist()
            parts = sorted(bytes(found[begin : begin + _DIGEST_BYTES]) for begin in begins)
            digests[places] = hashlib.sha256(b"".join(parts)).digest()
        return digests

    def _conversations(self) -> list[NDArray[np.int64]]:
        """Return the places among the usable samples of each conversation that became several samples."""
        found = []
        for first, cache, members in zip(self.starts[:-1], self.caches, self.by_cache(self.usable), strict=True):
            samples, numbers = cache.samples, members - first
            several = np.flatnonzero(samples.answer[numbers])
            places = np.searchsorted(self.usable, members[several])
            source, row = samples.source_index[numbers[several]], samples.row[numbers[several]]
            order = np.lexsort((places, row, source))
            is_new = np.diff(source[order]).astype(np.bool_) | np.diff(row[order]).astype(np.bool_)
            found += np.split(places[order], np.flatnonzero(is_new) + 1) if len(order) else []
        return found

    def by_cache(self, samples: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """Return ascending samples, those of each cache apart."""
        return np.split(samples, np.searchsorted(samples, self.starts[1:-1]))

    def describe(self, samples: list[int], at_most: int = 20) -> str:
        """Return the samples as messages name them: for each cache a list of numbers, cut where it is long."""
        texts = []
        for cache, members in enumerate(self.by_cache(np.unique(samples))):
            numbers = (members - self.starts[cache]).tolist()
            more = f" and {len(numbers) - at_most} more" if len(numbers) > at_most else ""
            if numbers:
                texts.append(f"{numbers[:at_most]}{more} of {self.caches[cache].path}")
        return ", ".join(texts)

    def non_finite_error(self, samples: list[int], step: int, saved: Path | None) -> DflashError:
        """Return what to tell of a step whose loss or gradient is not finite, given its samples and a checkpoint."""
        cache, number = self.locate(samples[0])
        look = dflash_line("inspect", self.caches[cache].name, "--sample", number)
        return DflashError(
            f"Loss or gradient is not finite at step {step}, samples {self.describe(samples)}. "
            f"{f'The last good checkpoint is {saved}. ' if saved else ''}Lower --learning-rate, or look at those "
            f"samples with `{look}`."
        )


def _finals(caches: list[Cache]) -> list[Cache]:
    """Return the final states of the caches if all of them have those of every usable sample, else nothing."""
    finals = [cache.final for cache in caches if cache.final is not None]
    whole = len(finals) == len(caches) and all(
        np.isin(cache.usable(), final.usable()).all() for cache, final in zip(caches, finals, strict=True)
    )
    return finals if whole else []


def _held_out(digests: NDArray[np.bytes_], room: int) -> NDArray[np.bool_]:
    """Return which samples are held out: those of the least digests, each with all its copies if there is room left.

    Only as many of the least are sorted as the room takes.
    """
    is_held_out = np.zeros(len(digests), np.bool_)
    heads = np.frombuffer(digests, ">u8")[:: _DIGEST_BYTES // 8].astype(np.uint64)
    tried, left = 0, room
    while left and tried < len(digests):
        tried = min(max(16 * tried, 16 * room, 1024), len(digests))
        least = np.flatnonzero(heads <= np.partition(heads, tried - 1)[tried - 1])  # with all their copies
        is_held_out[:], left, tried = False, room, len(least)
        _, which, copies = np.unique(digests[least], return_inverse=True, return_counts=True)
        taken = np.zeros(len(copies), np.bool_)
        for number, count in enumerate(copies.tolist()):
            if count <= left:
                taken[number] = True
                left -= count
        is_held_out[least] = taken[which]
    return is_held_out


def _anchor_counts(cache: Cache, rule: AnchorRule) -> NDArray[np.int64]:
    """Return how many candidates each sample has; the plan counted those of its own rule."""
    samples = cache.samples
    if rule == cache.manifest.anchor_rule:
        return samples.num_anchors
    counts = [count_anchors(samples.loss_mask(number), rule) for number in range(len(samples))]
    return np.array(counts, np.int64)


def _made_by(cache: Cache) -> dict[str, object]:
    """Return what all caches of a run must have in common; the layers that they hold are compared with the draft's."""
    identity, plan = cache.manifest.identity, cache.manifest.plan
    engine = identity.get("engine", {})
    return {
        "quantization of the engine": engine.get("quantization"),
        "kv_cache_dtype of the engine": engine.get("kv_cache_dtype", "auto"),
        "target": wherever_placed(identity["target"]),
        "capture": identity["capture"],
        "mask_token_id": plan["mask_token_id"],
    }


def _refuse_other_target(first: Cache, other: Cache) -> None:
    refuse_differences(
        f"{other.path} does not go with {first.path}; one draft cannot learn from both",
        differences(_made_by(first), _made_by(other)),
        ("first", "other"),
        "Extract one of them again with the other's target and settings, or train on one.",
    )
