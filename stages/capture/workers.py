"""Running the shards that are left: in this process, or in several worker processes that share them.

A worker claims a shard by its lock (`ShardWriter.claim`) and tries the shards that others hold again at the end. Memory
of one process: a shard being filled and, with a GPU, one being encoded; and a few encoded chunks. What a shard's write
waits for on the disk holds no more of it.
"""

import multiprocessing
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from queue import SimpleQueue
from typing import Any, Protocol, cast

import numpy as np
import torch

from dflash_offline.schemas.commits import SkippedSample
from dflash_offline.schemas.errors import DflashError
from dflash_offline.schemas.samples import SampleTable
from dflash_offline.schemas.settings.engine import TRANSFORMERS
from dflash_offline.schemas.settings.extract import ExtractConfig
from dflash_offline.stages.capture.bad_features import BadFeatures, skipped_place
from dflash_offline.stages.capture.encode import FeatureEncoder
from dflash_offline.stages.capture.extractor import Extractor
from dflash_offline.stages.capture.faults import as_fault, as_one, fault_message
from dflash_offline.stages.capture.shard import QueuedShard, ShardBuffer, Wanted
from dflash_offline.stages.cores import share_cores
from dflash_offline.stages.progress import Progress, readable_bytes
from dflash_offline.stages.stop import left_to_this_process
from dflash_offline.stages.store.cache import Cache
from dflash_offline.stages.store.writer import ShardWriter
from dflash_offline.stages.target.model import quiet_libraries

_WRITES = 2
"""Shards that may be encoded, written and synced while the next one is run."""
_FAULT = 3
"""Exit code of a worker that has said what went wrong."""


@dataclass(frozen=True, kw_only=True)
class Output:
    """An array of features that shards are written of: the hidden states, or the final ones."""

    writer: ShardWriter
    encoder: FeatureEncoder
    bad_features: BadFeatures
    hidden: Cache | None = None
    """Of final states, the cache whose hidden states are recorded before them."""

    @classmethod
    def of(cls, cache: Cache, config: ExtractConfig, hidden: Cache | None = None) -> "Output":
        """Return what writes the features of a cache, or of its `final`."""
        bad_features = BadFeatures(cache, config.on_bad_features, config.max_skipped)
        return cls(
            writer=ShardWriter(cache), encoder=FeatureEncoder(cache.codec), bad_features=bad_features, hidden=hidden
        )

    @property
    def array(self) -> str:
        """`HIDDEN`, or `FINAL`."""
        return self.writer.cache.array

    def left_out(self, shard: int) -> list[SkippedSample]:
        """Return the samples of a shard that have no hidden states, and so no final ones."""
        record = None if self.hidden is None else self.hidden.record(shard)
        return [] if record is None else record.skipped


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one process needs to run a cache's shards."""

    runner: Extractor
    outputs: list[Output]
    """The hidden states, then the final ones where they are asked for: a shard's are recorded in this order."""

    @property
    def cache(self) -> Cache:
        """The cache, with its hidden states."""
        return self.outputs[0].writer.cache

    def left(self, shard: int) -> list[Output]:
        """Return what a shard has no record of now."""
        return [output for output in self.outputs if not output.writer.cache.is_done(shard)]

    def is_done(self, shard: int) -> bool:
        """Say whether nothing of a shard is left to do now."""
        return not self.left(shard)


class Report:
    """Shows the tokens, shards and bytes that this process or its workers have finished."""

    def __init__(self, progress: Progress, samples: SampleTable, left: Sequence[int]) -> None:
        self.progress = progress
        self.num_shards = len(left)
        self.written: list[int] = []
        total, left_tokens = samples.num_tokens.sum(), samples.num_tokens[np.isin(samples.shard, left)].sum()
        progress.start("Extracting", int(total), "tokens", done=int(total - left_tokens))

    def tokens(self, count: int) -> None:
        """Add tokens whose forward is done."""
        self.progress.advance(count)

    def shard(self, shard: int, num_bytes: int) -> None:
        """Add a finished shard, unless it was another worker who finished it."""
        if num_bytes:
            self.written.append(num_bytes)
            self.progress.advance(
                0, shards=f"{len(self.written)}/{self.num_shards}", written=readable_bytes(sum(self.written))
            )

    def say(self, text: str) -> None:
        """Show a line."""
        self.progress.say(text)


def run_shards(work: Work, left: Sequence[int], progress: Progress) -> list[int]:
    """Run the shards in this process; returns the bytes of each shard that this call wrote."""
    report = Report(progress, work.cache.samples, left)
    _run_shards(work, left, report)
    progress.finish()
    return report.written


def _run_shards(work: Work, left: Sequence[int], report: "Report | _Sender") -> None:
    """Run shards; those that another worker holds are waited for at the end, and run here if that worker died."""
    held: list[int] = []

    def seen_before(shard: int) -> bool:
        if shard in held:
            return True
        held.append(shard)
        return False

    run_free_shards(work, chain(left, held), report, seen_before)


class Listener(Protocol):
    """Hears what becomes of shards, from several threads."""

    def tokens(self, count: int) -> None:
        """Hear of tokens whose forward is done."""

    def shard(self, shard: int, num_bytes: int) -> None:
        """Hear of a finished shard: the bytes that were written, 0 if it was another worker who finished it."""

    def say(self, text: str) -> None:
        """Hear a line for the user."""


def run_free_shards(work: Work, shards: Iterable[int | None], report: Listener, waits: Callable[[int], bool]) -> None:
    """Run shards as they come, None where none is there yet.

    Of a shard that another worker holds, `waits` says whether to wait until it is finished or that worker died.

    A buffer is filled with one shard while those before it are encoded and written; records come in the shards' order.
    On a CPU forward and encoder share cores, so they take turns: only encoded chunks are written and synced meanwhile.
    """
    runner, samples = work.runner, work.cache.samples
    free: dict[str, SimpleQueue[ShardBuffer]] = {output.array: SimpleQueue() for output in work.outputs}
    for output in work.outputs:
        for _ in range(runner.num_buffers):
            free[output.array].put(runner.buffer(output.writer.cache.layout, output.encoder.codec.fill))

    def write(shard: int, queued: list[_Queued], started: float, claim: ExitStack, before: list[Future[None]]) -> None:
        with claim, ExitStack() as held:
            for one in queued:
                held.enter_context(one.held)
            report.shard(shard, sum([one.write(shard, started, before, report.say) for one in queued]))

    pending: deque[Future[None]] = deque()
    with ThreadPoolExecutor(_WRITES, thread_name_prefix="write") as background:
        for shard in shards:
            if shard is None:
                _finish([job for job in pending if job.done()])
                continue
            if work.is_done(shard):
                report.shard(shard, 0)
                continue
            started, claimed = time.time(), partial(work.outputs[0].writer.claim, shard, is_done=work.is_done)
            with ExitStack() as claim:
                if not claim.enter_context(claimed(wait=False)):
                    if not waits(shard):
                        continue
                    if not claim.enter_context(claimed(wait=True)):
                        report.shard(shard, 0)
                        continue
                members, outputs = samples.samples_of_shard(shard), work.left(shard)
                wanted = [Wanted(output.array, output.encoder, free[output.array].get()) for output in outputs]
                _finish([job for job in pending if job.done()])  # before any more work, if it failed
                filling = runner.run_shard(samples, members, wanted, report.tokens)
                queued = [_Queued.of(*one, free[one[0].array]) for one in zip(outputs, filling, strict=True)]
                while len(pending) >= _WRITES:
                    pending.popleft().result()
                pending.append(background.submit(write, shard, queued, started, claim.pop_all(), list(pending)[-1:]))
        _finish(pending)


@dataclass(frozen=True)
class _Queued:
    """One array of a shard whose forwards are queued."""

    output: Output
    shard: QueuedShard
    held: ExitStack
    """Gives the buffer back as it is closed."""

    @classmethod
    def of(cls, output: Output, shard: QueuedShard, free: "SimpleQueue[ShardBuffer]") -> "_Queued":
        held = ExitStack()
        held.callback(free.put, shard.buffer)
        return cls(output, shard, held)

    def write(self, shard: int, started: float, before: list[Future[None]], say: Callable[[str], None]) -> int:
        """Write the array and its record, once those of the shards before are written; returns the bytes written."""
        cache, writer = self.output.writer.cache, self.output.writer
        left_out = self.output.left_out(shard)
        filled = self.shard.wait(left_out)
        bad, codes = filled.bad, self.shard.buffer.array
        fresh = [sample for sample in bad if sample not in left_out]
        if fresh:  # counted under a lock that the one before may need
            _finish(before)
        size = self.output.bad_features.commit(
            shard,
            bad if fresh else [],
            lambda: writer.commit(
                shard, codes, bad, started, filled.sums, encoded=self.held.close, in_turn=lambda: _finish(before)
            ),
        )
        for sample in fresh:
            say(f"Left out: {skipped_place(sample, cache.samples)}")
        return size


def _finish(jobs: Iterable[Future[None]]) -> None:
    """Wait for jobs, and raise what one of them raised."""
    for job in jobs:
        job.result()


def run_workers(
    open_work: Callable[[ExtractConfig], Work],
    config: ExtractConfig,
    cache: Cache,
    left: Sequence[int],
    progress: Progress,
) -> list[int]:
    """Run the shards in `config.workers` processes, one a GPU or a group of cores; returns the bytes of each shard.

    Each process calls `open_work` with the settings for its own device. Once all have ended, raises what went wrong in
    any of them, unless the others did its shards as well; finished shards are kept.
    """
    context = multiprocessing.get_context("spawn")
    resource_tracker.ensure_running()  # which lets through what is held back below, and would for the first worker
    processes: dict[Connection, SpawnProcess] = {}
    report = Report(progress, cache.samples, left)
    faults: list[DflashError | OSError] = []
    try:
        for index in range(config.workers):
            receiver, sender = context.Pipe(duplex=False)
            own = list(left[index :: config.workers])
            order = [*own, *(shard for shard in left if shard not in own)]
            own_config = replace(config, device=_device(config, index))
            arguments = (open_work, own_config, order, sender, _gpus(config, index))
            process = context.Process(target=_worker, args=arguments, name=f"Worker {index}")
            processes[receiver] = process
            with left_to_this_process():
                process.start()
            sender.close()
        listening = set(processes)
        while listening:
            for receiver in cast(list[Connection], wait(listening)):
                try:
                    kind, *values = receiver.recv()
                except EOFError:
                    listening.remove(receiver)
                    continue
                faults.extend(values) if kind == "fault" else getattr(report, kind)(*values)
    except BaseException:
        for process in processes.values():
            if process.pid is not None:
                process.kill()  # finished shards are whole; the rest is run again
        raise
    finally:
        for process in processes.values():
            if process.pid is not None:
                process.join()
    progress.finish()
    for process in processes.values():
        if process.exitcode not in (0, _FAULT):
            faults.append(DflashError(f"{process.name} ended with exit code {process.exitcode}."))
    if faults and not all(map(cache.is_done, left)):
        raise as_one(faults)
    if faults:
        progress.say("\n".join(map(fault_message, faults)))
    return report.written


class _Sender:
    """Sends a worker process's report to the process that started it; safe in threads."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._lock = threading.Lock()

    def send(self, kind: str, *values: Any) -> None:
        with self._lock:
            self._connection.send((kind, *values))

    def tokens(self, count: int) -> None:
        self.send("tokens", count)

    def shard(self, shard: int, num_bytes: int) -> None:
        self.send("shard", shard, num_bytes)

    def say(self, text: str) -> None:
        self.send("say", text)


def _worker(
    open_work: Callable[[ExtractConfig], Work],
    config: ExtractConfig,
    left: list[int],
    connection: Connection,
    gpus: str | None,
) -> None:
    """Run shards in a process of its own: those of its share first, then those that the others have not begun.

    `gpus` are those it is to see, where not all.
    """
    if gpus is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus  # before anything here has asked for them
    threading.Thread(target=_end_with_the_command, daemon=True).start()
    quiet_libraries()
    share_cores(config.workers)
    torch.set_num_threads(max(1, torch.get_num_threads() // config.workers))
    sender = _Sender(connection)
    try:
        work = open_work(config)
        with closing(work.runner):
            _run_shards(work, left, sender)
    except BrokenPipeError:  # the command was killed
        raise SystemExit(_FAULT) from None
    except Exception as error:  # the command shows it, as it shows everything
        sender.send("fault", as_fault(error, "--workers"))
        raise SystemExit(_FAULT) from None


def _end_with_the_command() -> None:
    """End this process once the one that started it has, however that was: workers must not live on unseen."""
    command = multiprocessing.parent_process()
    assert command is not None
    command.join()
    os._exit(_FAULT)


def _gpus(config: ExtractConfig, index: int) -> str | None:
    """Return the GPUs of a worker whose engine takes the first that it sees; None where there is nothing to choose."""
    if config.engine == TRANSFORMERS or config.device == "cpu" or not torch.cuda.is_available():
        return None
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else list(map(str, range(torch.cuda.device_count())))
    return ",".join(gpus_of_engine(names, config.tensor_parallel_size, index))


def gpus_of_engine(names: Sequence[str], size: int, index: int) -> Sequence[str]:
    """Return the GPUs of the engine `index`, each taking `size`: the groups take engines in turn."""
    if size > len(names):
        raise DflashError(f"--tensor-parallel-size is {size}, and there are {len(names)} GPUs: {', '.join(names)}.")
    first = index % (len(names) // size) * size
    return names[first : first + size]


def _device(config: ExtractConfig, index: int) -> str:
    """Return the worker's device: the GPUs take workers in turn."""
    if config.device == "cpu" or not torch.cuda.is_available():
        return "cpu"
    if config.engine != TRANSFORMERS:
        return "cuda"  # the first that the worker sees
    return f"cuda:{index % torch.cuda.device_count()}"
