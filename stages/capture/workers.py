"""Doing the shards that are left: in this process, or in several that share them.

Memory of one process: a shard being filled and, with a GPU, one being encoded; and a few encoded chunks. Never more
than three shards.
"""

import multiprocessing
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from queue import SimpleQueue
from typing import Any, cast

import torch

from dflash_offline.schemas.errors import DflashError
from dflash_offline.schemas.samples import SampleTable
from dflash_offline.schemas.settings.extract import ExtractConfig
from dflash_offline.stages.capture.bad_features import BadFeatures, skipped_place
from dflash_offline.stages.capture.encode import FeatureEncoder
from dflash_offline.stages.capture.shard import Capture, Capturer, ShardBuffer
from dflash_offline.stages.progress import Progress, readable_bytes
from dflash_offline.stages.store.writer import ShardWriter
from dflash_offline.stages.target.model import quiet_libraries

_FAULT = 3
"""Exit code of a worker that has said what went wrong."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What it takes to do a cache's shards in one process."""

    writer: ShardWriter
    capturer: Callable[[], Capturer]
    """Loads the target when the first shard is begun."""
    encoder: FeatureEncoder
    bad_features: BadFeatures


class Report:
    """Shows tokens, shards and bytes as they are finished, whichever process they come from."""

    def __init__(self, progress: Progress, samples: SampleTable, num_shards: int, done_tokens: int) -> None:
        self.progress = progress
        self.num_shards = num_shards
        self.written: list[int] = []
        progress.start("Extracting", int(samples.num_tokens.sum()), "tokens", done=done_tokens)

    def tokens(self, count: int) -> None:
        """Note tokens whose forward is done."""
        self.progress.advance(count)

    def shard(self, num_bytes: int) -> None:
        """Note a finished shard."""
        self.written.append(num_bytes)
        self.progress.advance(
            0, shards=f"{len(self.written)}/{self.num_shards}", written=readable_bytes(sum(self.written))
        )

    def say(self, text: str) -> None:
        """Show a line."""
        self.progress.say(text)


def run_shards(work: Work, left: Sequence[int], samples: SampleTable, progress: Progress, done: int) -> list[int]:
    """Do the shards in this process; returns the bytes of each shard that this call wrote."""
    capturer = work.capturer()  # loading is not part of the rate shown
    report = Report(progress, samples, len(left), done)
    _do_shards(work, capturer, left, report)
    progress.finish()
    return report.written


def _do_shards(work: Work, capturer: Capturer, left: Sequence[int], report: Any) -> None:
    """Fill a buffer while another's shard is encoded and written; on a CPU, while the last one's is written.

    A target on the CPU needs the cores that encode: its threads would wait for the slowest of them, so it waits whole.
    Shards that another worker holds are waited for at the end, and done here if that worker died.
    """
    writer = work.writer
    free: SimpleQueue[ShardBuffer] = SimpleQueue()
    for _ in range(1 if capturer.device.type == "cpu" else 2):
        free.put(capturer.buffer(writer.cache.layout, work.encoder.codec.fill))

    def write(shard: int, capture: Capture, started: float, claim: ExitStack) -> None:
        with claim, ExitStack() as held:
            held.callback(free.put, capture.buffer)
            captured = capture.wait()
            bad, codes = captured.bad, capture.buffer.array
            size = work.bad_features.commit(
                shard, bad, lambda: writer.commit(shard, codes, bad, started, captured.sums, encoded=held.close)
            )
            for one in bad:
                report.say(f"Left out: {skipped_place(one, writer.cache.samples)}")
            if size:  # else another worker's record won
                report.shard(size)

    pending: Future[None] | None = None
    with ThreadPoolExecutor(1, thread_name_prefix="write") as background:
        for waiting in (False, True):
            for shard in left:
                if writer.cache.is_done(shard):
                    continue
                started = time.time()
                with ExitStack() as claim:
                    if not claim.enter_context(writer.claim(shard, wait=waiting)):
                        continue
                    members, buffer = writer.cache.samples.samples_of_shard(shard), free.get()
                    if pending is not None and pending.done():
                        pending.result()  # before any more work, if it failed
                    capture = capturer.capture(writer.cache.samples, members, work.encoder, buffer, report.tokens)
                    if pending is not None:
                        pending.result()
                    pending = background.submit(write, shard, capture, started, claim.pop_all())
            if pending is not None:
                pending.result()


def run_workers(
    open_work: Callable[[ExtractConfig], Work],
    config: ExtractConfig,
    left: Sequence[int],
    samples: SampleTable,
    progress: Progress,
    done: int,
    is_done: Callable[[int], bool],
) -> list[int]:
    """Do the shards in `config.workers` processes, one a GPU or a group of cores; returns the bytes of each written.

    Each process calls `open_work` with the settings for its own device. Raises what went wrong in any of them after
    all have ended; what they finished is kept.
    """
    context = multiprocessing.get_context("spawn")
    processes: dict[Connection, SpawnProcess] = {}
    report = Report(progress, samples, len(left), done)
    faults: list[DflashError | OSError] = []
    try:
        for index in range(config.workers):
            receiver, sender = context.Pipe(duplex=False)
            own = list(left[index :: config.workers])
            order = [*own, *(shard for shard in left if shard not in own)]
            own_config = replace(config, device=_device(config, index))
            process = context.Process(
                target=_worker, args=(open_work, own_config, order, sender), name=f"Worker {index}"
            )
            process.start()
            sender.close()
            processes[receiver] = process
        listening = set(processes)
        while listening:
            for receiver in cast(list[Connection], wait(listening)):
                try:
                    kind, value = receiver.recv()
                except EOFError:
                    listening.remove(receiver)
                    continue
                faults.append(value) if kind == "fault" else getattr(report, kind)(value)
    except BaseException:
        for process in processes.values():
            process.terminate()  # finished shards are whole; the rest is done again
        raise
    finally:
        for process in processes.values():
            process.join()
    progress.finish()
    for process in processes.values():
        if process.exitcode not in (0, _FAULT):
            faults.append(DflashError(f"{process.name} ended with exit code {process.exitcode}."))
    left_over = [shard for shard in left if not is_done(shard)]
    if faults and not left_over:  # the others did its shards as well
        progress.say("\n".join(map(_told, faults)))
    elif faults:
        raise _as_one(faults)
    return report.written


class _Sender:
    """A worker's side of `Report`; safe in threads."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._lock = threading.Lock()

    def send(self, kind: str, value: Any) -> None:
        with self._lock:
            self._connection.send((kind, value))

    def tokens(self, count: int) -> None:
        self.send("tokens", count)

    def shard(self, num_bytes: int) -> None:
        self.send("shard", num_bytes)

    def say(self, text: str) -> None:
        self.send("say", text)


def _worker(
    open_work: Callable[[ExtractConfig], Work], config: ExtractConfig, left: list[int], connection: Connection
) -> None:
    """Do shards in a process of its own, first those of its own share, then what others have not begun."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the command's to handle
    quiet_libraries()
    sender = _Sender(connection)
    try:
        work = open_work(config)
        _do_shards(work, work.capturer(), left, sender)
    except BrokenPipeError:  # the command was killed; its workers must not live on unseen
        raise SystemExit(_FAULT) from None
    except (DflashError, OSError) as error:
        known = isinstance(error, OSError) and error.errno is not None
        sender.send("fault", error if known else DflashError(str(error)))
        raise SystemExit(_FAULT) from None


def _as_one(faults: list[DflashError | OSError]) -> DflashError | OSError:
    """Return what to raise: a fault of the system that all have met as it is, for commands have advice for it."""
    numbers = {fault.errno if isinstance(fault, OSError) else None for fault in faults}
    if len(numbers) == 1 and None not in numbers:
        return faults[0]
    return DflashError("\n".join(dict.fromkeys(map(_told, faults))))


def _told(fault: DflashError | OSError) -> str:
    if isinstance(fault, OSError) and fault.filename:
        return f"{fault.filename}: {fault.strerror}"
    return str(fault)


def _device(config: ExtractConfig, index: int) -> str:
    """Return the worker's device: workers are dealt to the GPUs in turn."""
    if config.device == "cpu" or not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{index % torch.cuda.device_count()}"
