"""Extraction on a Ray cluster: each worker loads the target once and runs shards of the cache as it is given them."""

import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dflash_offline.schemas.errors import CacheError, DflashError
from dflash_offline.schemas.manifest import Manifest
from dflash_offline.schemas.settings.engine import TRANSFORMERS
from dflash_offline.schemas.settings.extract import ExtractConfig
from dflash_offline.stages.buckets.mirror import worked_on
from dflash_offline.stages.capture.workers import Report, Work, run_free_shards
from dflash_offline.stages.cluster.pool import Needs, Pool
from dflash_offline.stages.cluster.tasks import Tasks
from dflash_offline.stages.cluster.worker import PROGRESS, Given, Tell
from dflash_offline.stages.progress import Progress
from dflash_offline.stages.store.cache import Cache
from dflash_offline.stages.target.model import quiet_libraries


@dataclass(frozen=True, kw_only=True)
class _Settings:
    """What a worker needs to begin."""

    open_work: Callable[[ExtractConfig], Work]
    config: ExtractConfig
    manifest: str
    """Checksum of the cache's manifest."""


def run_on_cluster(
    ray: Any,
    open_work: Callable[[ExtractConfig], Work],
    config: ExtractConfig,
    cache: Cache,
    left: Sequence[int],
    device: torch.device,
    progress: Progress,
) -> list[int]:
    """Run the shards on a cluster's nodes, as many as there are; returns the bytes of each shard.

    Each worker calls `open_work` with the settings for its node. `device` is what the target was planned on. Raises
    what went wrong in workers unless others did their shards as well; finished shards are kept.
    """
    gpus = gpus_of_worker(config, device)
    own = replace(config, out=Path(cache.name), device=device.type)  # of a bucket its URL: its mirror is this machine's
    needs = Needs(
        # A CPU's target takes the threads of the plan, on which the last bits of its features depend.
        cpus=1 if gpus else cache.manifest.plan["cpu_threads"],
        gpus=gpus,
        least=config.workers_min,
        most=min(len(left), config.workers_max or len(left)),
    )
    job = _Shards(Report(progress, cache.samples, left), cache)
    settings = _Settings(open_work=open_work, config=own, manifest=cache.manifest.checksum)
    Pool(ray=ray, do=do_shards, config=settings, needs=needs, tasks=Tasks(left), job=job, progress=progress).run()
    return job.report.written


def gpus_of_worker(config: Any, device: torch.device) -> int:
    """Return the GPUs of each worker; `DflashError` if the target was planned on another kind of device than theirs."""
    given = config.gpus_per_worker
    if device.type == "cpu":
        if given:
            raise DflashError(
                f"--gpus-per-worker is {given}, and there is no GPU here, where the plan is made and measured with the "
                f"target as workers run it. Start the command on a node with a GPU of their kind."
            )
        return 0
    if given == 0:
        raise DflashError("--gpus-per-worker is 0, and the target was planned on a GPU. Add --device cpu.")
    return given or (1 if config.engine == TRANSFORMERS else config.tensor_parallel_size)


class _Shards:
    """What the command hears of shards."""

    what, unit = "shards", "tokens"

    def __init__(self, report: Report, cache: Cache) -> None:
        self.report = report
        self._cache = cache
        self._unfinished: dict[int, int] = {}
        """Tokens that each worker has run of shards that it has not finished."""

    def task(self, number: int) -> None:
        """A shard's number says all."""

    def progress(self, worker: int, count: int) -> None:
        """Add tokens whose forward is done."""
        self._unfinished[worker] = self._unfinished.get(worker, 0) + count
        self.report.tokens(count)

    def hear(self, worker: int, task: int, *values: Any) -> None:
        """Shards are told of as a whole."""

    def finish(self, worker: int, task: int, *values: Any) -> int:
        """Add a finished shard; returns its tokens, none if it was another's."""
        samples = self._cache.samples
        tokens = int(samples.num_tokens[samples.samples_of_shard(task)].sum()) if values[0] else 0
        self._unfinished[worker] = self._unfinished.get(worker, 0) - tokens
        self.report.shard(task, *values)
        return tokens

    def lose(self, worker: int) -> None:
        """Take away the tokens that will be run again."""
        self.report.tokens(-self._unfinished.pop(worker, 0))


def do_shards(settings: _Settings, tasks: Given, tell: Tell) -> None:
    """Run the shards that this worker is given, once its target is loaded."""

    def put_off(shard: int) -> bool:
        tell("held", shard)
        return False

    quiet_libraries()
    _refuse_unseen(settings)
    work = settings.open_work(settings.config)
    with closing(work.runner):
        run_free_shards(work, _numbers(tasks), _Telling(tell), put_off)


def _numbers(tasks: Given) -> Iterator[int | None]:
    for task in tasks:
        yield None if task is None else task[0]


class _Telling:
    """Tells the command of shards."""

    def __init__(self, tell: Tell) -> None:
        self._tell = tell

    def tokens(self, count: int) -> None:
        """Tell of tokens whose forward is done."""
        self._tell(PROGRESS, count)

    def shard(self, shard: int, num_bytes: int) -> None:
        """Tell of a finished shard."""
        self._tell("finished", shard, num_bytes)

    def say(self, text: str) -> None:
        """Have a line shown."""
        self._tell("say", text)


def _refuse_unseen(settings: _Settings) -> None:
    """Raise `DflashError` unless this node sees the command's cache."""
    out = settings.config.out
    try:
        found = Manifest.read(worked_on(out)).checksum
    except (CacheError, OSError):
        found = ""
    if found != settings.manifest:
        what = "holds another cache" if found else "holds no cache"
        raise DflashError(
            f"{out} {what} on {socket.gethostname()}: that node does not see what the command has planned. Put --out "
            f"where every node has it under the same path, or into an object store, as in s3://bucket/prefix."
        )
