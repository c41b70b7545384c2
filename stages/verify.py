"""Is a cache what its records say, and are its features the target's?

Axes: T tokens, L captured layers, H hidden size.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import zarr
from numpy.typing import NDArray

from dflash_offline.schemas.commits import Commit, commit_path, read_commit
from dflash_offline.schemas.config import RerunConfig
from dflash_offline.schemas.errors import CacheError
from dflash_offline.schemas.files import locked, sha256_file
from dflash_offline.schemas.manifest import FEATURES, MANIFEST, SAMPLES, Manifest, refuse_other_identity
from dflash_offline.schemas.samples import SampleTable
from dflash_offline.stages.cache import IDS, MASK, CacheReader
from dflash_offline.stages.cores import usable_cores
from dflash_offline.stages.leftovers import lock_path
from dflash_offline.stages.progress import Progress
from dflash_offline.stages.statistics import Sums, agree, layer_statistics
from dflash_offline.stages.target import choose_device, load_model, open_target, run_captured

LARGEST_ERROR = 0.02
"""Relative L2 error of one layer that rounding to bfloat16 and another machine's arithmetic may explain."""

_AT_ONCE = 8
"""Shards verified side by side; each holds one sample's features in float32."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One thing that is wrong."""

    place: str
    """A file within the cache, or a shard."""
    what: str
    shard: int | None = None
    """The shard to redo; None if a static file is at fault, which `extract` cannot redo."""


@dataclass(frozen=True, kw_only=True)
class LayerFit:
    """How one stored layer compares with the target run again."""

    layer_id: int
    error: float
    """Relative L2 error over the samples drawn."""
    best_layer_id: int
    """The one of this layer and its neighbours that fits best."""
    best_error: float
    largest_error: float = LARGEST_ERROR
    """What may be explained by arithmetic and by the feature layout."""

    @property
    def fault(self) -> str:
        """What is wrong with the layer, or an empty string."""
        if self.best_layer_id != self.layer_id:
            return (
                f"layer {self.layer_id} is off by {self.best_layer_id - self.layer_id:+d}: the target's layer "
                f"{self.best_layer_id} fits better (error {self.best_error:.2%} against {self.error:.2%})"
            )
        if self.error > self.largest_error:
            return (
                f"layer {self.layer_id} differs from the target's by {self.error:.2%}; expected at most "
                f"{self.largest_error:.1%}"
            )
        return ""


def verify_cache(cache: Path, progress: Progress) -> list[Fault]:
    """Return every fault of a cache: files against their records, chunks against their checksums, tokens against the
    plan, features against the recorded statistics. A shard that is not extracted is a fault too."""
    try:
        manifest = Manifest.read(cache)
    except CacheError as error:
        return [Fault(place=MANIFEST, what=str(error))]
    static = [Fault(place=name, what=what) for name, what in manifest.static_faults(cache)]
    if static:
        return static
    reader = CacheReader(cache)
    faults = [Fault(place=SAMPLES, what=what) for what in _plan_faults(manifest, reader.samples)]
    group = zarr.open_group(str(cache / FEATURES), mode="r")

    def check(shard: int) -> list[Fault]:
        return [Fault(place=place, what=what, shard=shard) for place, what in _shard_faults(reader, group, shard)]

    progress.start("Verifying", manifest.layout.num_shards, "shards")
    with ThreadPoolExecutor(min(usable_cores(), _AT_ONCE), thread_name_prefix="verify") as pool:
        for found in pool.map(check, range(manifest.layout.num_shards)):
            faults += found
            progress.advance(1, faults=len(faults))
    progress.finish()
    return faults


def _plan_faults(manifest: Manifest, samples: SampleTable) -> Iterator[str]:
    """Yield what is wrong with the plan's tokens: files that are as they were written may hold nothing to train on."""
    mask_token = manifest.plan["mask_token_id"]
    wrong: dict[str, list[int]] = {"masked": [], "counted": [], "holding": []}
    for sample in range(len(samples)):
        num_supervised = int(np.count_nonzero(samples.loss_mask(sample)))
        if not num_supervised:
            wrong["masked"].append(sample)
        if num_supervised != samples.num_supervised[sample]:
            wrong["counted"].append(sample)
        if (samples.input_ids(sample) == mask_token).any():
            wrong["holding"].append(sample)
    said = {
        "masked": "have no supervised token and train nothing; extract anew with another --mask, or mend the template",
        "counted": "have another number of supervised tokens than their row says; extract anew",
        "holding": f"hold the mask token {mask_token}, which stands for what is to be drafted; extract anew without "
        f"--mask-token-id",
    }
    for kind, found in wrong.items():
        if found:
            yield f"{len(found):,} of {len(samples):,} samples, the first {found[0]}, {said[kind]}"


def _shard_faults(reader: CacheReader, group: zarr.Group, shard: int) -> Iterator[tuple[str, str]]:
    cache = reader.cache
    place = str(commit_path(cache, shard).relative_to(cache))
    try:
        commit = read_commit(cache, shard, reader.manifest.checksum)
    except CacheError as error:
        yield place, str(error)
        return
    if commit is None:
        yield place, "is missing: the shard is not extracted"
        return
    faulty = False
    for name, record in commit.files.items():
        path = cache / name
        if not path.is_file():
            what = "is missing"
        elif path.stat().st_size != record.size:
            what = f"has {path.stat().st_size} bytes, expected {record.size}"
        elif sha256_file(path) != record.sha256:
            what = f"has another sha256 than its record{_samples_hit(reader, shard, name)}"
        else:
            continue
        faulty = True
        yield name, what
    if not faulty:
        yield from _content_faults(reader, group, commit)


def _samples_hit(reader: CacheReader, shard: int, name: str) -> str:
    """Name the first sample of a damaged shard whose features can no longer be read."""
    if "hidden_states" not in name:
        return ""
    for sample in set(reader.samples.samples_of_shard(shard).tolist()) - reader.skipped:
        try:
            reader.read_codes(sample)
        except CacheError as error:
            return f"; {reader.samples.place(sample)} cannot be read: {error}"
    return "; all samples can still be read"


def _content_faults(reader: CacheReader, group: zarr.Group, commit: Commit) -> Iterator[tuple[str, str]]:
    samples, shard, layout = reader.samples, commit.shard, reader.manifest.layout
    skipped = {one.sample for one in commit.skipped}
    members = np.array([i for i in samples.samples_of_shard(shard).tolist() if i not in skipped], np.int64)
    place = f"shard {shard}"
    slots = slice(shard * layout.shard_tokens, (shard + 1) * layout.shard_tokens)
    for name, wanted in ((IDS, samples.input_ids), (MASK, samples.loss_mask)):
        array = group[name]
        assert isinstance(array, zarr.Array)
        stored = np.asarray(array[slots])
        for sample in members.tolist():
            begin = int(samples.start[sample]) - slots.start
            if not np.array_equal(stored[begin : begin + samples.num_tokens[sample]], wanted(sample)):
                yield place, f"{name} of {samples.place(sample)} differs from the plan"
                break
    num_tokens = int(samples.num_tokens[members].sum())
    if (commit.num_samples, commit.num_tokens) != (len(members), num_tokens):
        yield (
            place,
            f"the record counts {commit.num_samples} samples, {commit.num_tokens} tokens; the plan "
            + (f"{len(members)}, {num_tokens}"),
        )
    sums = [Sums() for _ in reader.layer_ids]
    try:
        for sample in members.tolist():
            values = reader.read_values(sample)
            sums = [one + Sums.of(values[:, column]) for column, one in enumerate(sums)]
    except CacheError as error:
        yield place, str(error)
        return
    for have, want in zip(commit.layers, layer_statistics(sums, reader.layer_ids), strict=True):
        if not agree(have, want):
            yield place, f"statistics of layer {have.layer_id} are {want}, the record says {have}"


def repair(cache: Path, faults: list[Fault]) -> list[int]:
    """Forget the faulty shards, so that `extract` redoes just those; returns them."""
    shards = sorted({fault.shard for fault in faults if fault.shard is not None})
    for shard in shards:
        lock = lock_path(cache, shard)
        lock.parent.mkdir(exist_ok=True)
        lock.touch()
        with locked(lock, wait=True):  # a worker that is at it finishes first, and its record goes too
            commit_path(cache, shard).unlink(missing_ok=True)
    return shards


def compare_with_target(cache: Path, rerun: RerunConfig, progress: Progress) -> list[LayerFit]:
    """Run the target again on samples drawn by seed and return how each stored layer compares.

    Each layer is also compared with the target's layers before and after it: an id off by one trains without a sign
    and is served badly. Raises `MismatchError` if the target is not the one the cache names.
    """
    reader = CacheReader(cache)
    recorded, origin = reader.manifest.identity["target"], reader.manifest.origin
    finished = reader.usable()
    if not len(finished):
        raise CacheError(f"{cache} has no finished shard to compare with the target. Let `dflash extract` finish one.")
    device = choose_device(rerun.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    revision = rerun.revision or (origin.get("revision") if rerun.target == origin["target"] else None)
    files = open_target(rerun.target, revision=revision, trust_remote_code=rerun.trust_remote_code)
    own = {name: recorded[name] for name in ("dtype", "attn_implementation", "device_map")}
    refuse_other_identity(cache, {"target": recorded}, {"target": {**files.identity(), **own}})
    drawn = np.random.default_rng(rerun.seed).choice(finished, min(rerun.samples, len(finished)), replace=False)
    model = load_model(
        files,
        dtype=getattr(torch, recorded["dtype"]),
        device=device,
        attn_implementation=rerun.attn_implementation or recorded["attn_implementation"],
        device_map=rerun.device_map or recorded["device_map"],
        trust_remote_code=rerun.trust_remote_code,
    )
    around = sorted({n for i in reader.layer_ids for n in (i - 1, i, i + 1) if 0 <= n < files.num_layers})
    squares = np.zeros((len(reader.layer_ids), len(around)))
    norms = np.zeros(len(reader.layer_ids))
    progress.start("Running the target", len(drawn), "samples")
    for sample in np.sort(drawn).tolist():
        ids = torch.from_numpy(reader.samples.input_ids(sample).astype(np.int64))[None].to(device)
        states = [state[0].float().cpu().numpy() for state in run_captured(model, ids, around)]
        _add_errors(reader.read_values(sample), states, squares, norms)
        progress.advance(1)
    progress.finish()
    errors = np.sqrt(squares / norms[:, None])
    fits = []
    for row, layer_id in enumerate(reader.layer_ids):
        near = [column for column, other in enumerate(around) if abs(other - layer_id) <= 1]
        best = min(near, key=lambda column: errors[row, column])
        fits.append(
            LayerFit(
                layer_id=layer_id,
                error=float(errors[row, around.index(layer_id)]),
                best_layer_id=around[best],
                best_error=float(errors[row, best]),
                largest_error=LARGEST_ERROR + reader.manifest.layout.features.expected_error,
            )
        )
    return fits


def _add_errors(
    stored: NDArray[np.float32],
    states: list[NDArray[np.float32]],
    squares: NDArray[np.float64],
    norms: NDArray[np.float64],
) -> None:
    for row in range(stored.shape[1]):
        norms[row] += float(np.square(stored[:, row]).sum(dtype=np.float64))
        for column, state in enumerate(states):
            squares[row, column] += float(np.square(stored[:, row] - state).sum(dtype=np.float64))
