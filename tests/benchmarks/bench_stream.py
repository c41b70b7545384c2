"""Steps on micro-batches streamed from a cache against steps on the same micro-batches held in memory.

Run by `make bench-train`, which takes the settings that `dflash train` has where none are given. With --lean they are
the demo's, which compute so little for each token read that the threads that read take a measurable share of the
machine: shown, and held to no floor. Without --cache it extracts the embedded conversations into a temporary folder
first. With --limit-mib the process gives itself a limit of private memory (RLIMIT_DATA), and is refused one larger than
the cache; the page cache is outside that limit.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from sides import interleaved, machine, median_ratio, spread

from dflash_offline.pipeline.demo import CONVERSATIONS, TARGET
from dflash_offline.schemas.settings.train import TrainConfig
from dflash_offline.stages.progress import readable_bytes
from dflash_offline.stages.target.model import choose_device
from dflash_offline.stages.training.corpus import Corpus
from dflash_offline.stages.training.loader import Batch
from dflash_offline.stages.training.metrics import peak_memory
from dflash_offline.stages.training.ranks import Ranks
from dflash_offline.stages.training.run import Training
from dflash_offline.stages.training.schedule import Rows

LEAN: dict[str, Any] = {"draft_layers": 2, "num_anchors": 16, "optimizer": "muon"}
"""The demo's draft and anchors: some seven times less to compute for each token that is read."""


def main() -> None:
    """Print both sides' seconds a step and how much slower streaming is."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--limit-mib", type=int)
    parser.add_argument("--lean", action="store_true", help="the demo's draft and anchors: little to compute a token")
    parser.add_argument("--steps", type=int, default=1, help="of one round")
    parser.add_argument("--rounds", type=int, default=120)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=2, help="of the computation, on a CPU")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        cache = arguments.cache or Path(folder) / "cache"
        if arguments.cache is None:
            # About 0.3 GiB, or 1.3 GiB under a limit: a process that trains has some 0.8 GiB of private memory itself.
            wide = ["--layers", "0,1,2,3,4,5,6,7,8"] if arguments.limit_mib else []
            data = [str(CONVERSATIONS)] * (2 if arguments.limit_mib else 1)
            command = ["extract", *data, "--target", str(TARGET), "--out", str(cache), "--block-size", "8", *wide]
            subprocess.run(
                [sys.executable, "-m", "dflash_offline.pipeline.app", *command, "--shard-mib", "64"], check=True
            )
        compare(cache, arguments)


class Reader:
    """A stream of micro-batches that can be waited for until it reads nothing ahead any more."""

    def __init__(self, training: Training) -> None:
        self._under_way, self._changed = 0, threading.Condition()
        loader = training.loader(training.config.seed)
        self._load = loader.load
        loader.load = self._counted_load  # type: ignore[method-assign]
        self.batches = loader.stream(self._asked(training), training.config.loader_threads)

    def wait(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self._under_way)

    def _asked(self, training: Training) -> Iterator[tuple[Rows, int]]:
        for one in training.schedule.between(0, training.total_steps):
            with self._changed:
                self._under_way += 1
            yield one

    def _counted_load(self, rows: Rows, epoch: int) -> Batch:
        try:
            return self._load(rows, epoch)
        finally:
            with self._changed:
                self._under_way -= 1
                self._changed.notify()


def compare(cache: Path, arguments: argparse.Namespace) -> None:
    """Train one draft from the cache, the sides' steps in turn.

    A streamed step takes a micro-batch that was read ahead and sets off the reading of another one beside it; its time
    ends when that one is read too, so that nothing of it falls into the other side's time.
    """
    size = sum(path.stat().st_size for path in cache.rglob("*") if path.is_file())
    if arguments.limit_mib:
        assert arguments.limit_mib << 20 < size, f"the cache has only {readable_bytes(size)}"
        resource.setrlimit(resource.RLIMIT_DATA, (arguments.limit_mib << 20, arguments.limit_mib << 20))
    steps = (arguments.rounds + 1) * arguments.steps
    config = TrainConfig(
        caches=(cache,),
        out=Path("unused"),
        batch_tokens=896 if arguments.limit_mib else 1792,
        steps=steps,
        device=arguments.device,
        **LEAN if arguments.lean else {"draft_layers": 2} if arguments.limit_mib else {},
    )
    training = Training(config, Corpus.open(config.caches), Ranks(rank=0, count=1, device=choose_device(config.device)))
    # Packed, all micro-batches have one shape and cost the same; under a limit only a few can be held.
    held = cycle(list(islice(training.stream(), 8 if arguments.limit_mib else steps)))
    reader, waits = Reader(training), list[float]()

    def step(batches: Iterator[Batch]) -> float:
        return sum(training.step([batch]).window.wait_s for batch in islice(batches, arguments.steps))

    def stream() -> None:
        waits.append(step(reader.batches))
        reader.wait()

    seconds = interleaved({"memory": lambda: step(held), "stream": stream}, arguments.rounds)
    print(f"{machine()}; {training.device}, {arguments.threads} threads; cache {readable_bytes(size)}")
    if arguments.limit_mib:
        limit = readable_bytes(arguments.limit_mib << 20)
        print(f"private memory limited to {limit}; peak resident {readable_bytes(peak_memory(training.device))}")
    for name, values in seconds.items():
        print(f"  {name:<8} {spread([value / arguments.steps for value in values])} s a step")
    print(f"  waited   {spread([wait / arguments.steps for wait in waits[1:]])} s a step for streamed data")
    floor = "" if arguments.lean else " (floor 0.98)"
    print(f"  stream / memory, rate: {median_ratio(seconds, 'stream', 'memory'):.3f}{floor}")


if __name__ == "__main__":
    main()
