"""Steps on micro-batches streamed from a cache against steps on the same micro-batches held in memory.

Run by `make bench-train`. Without --cache it extracts the embedded conversations into a temporary folder first. With
--limit-mib the process gives itself a limit of private memory (RLIMIT_DATA), and is refused one larger than the cache;
the page cache is outside that limit.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path

import torch
from sides import interleaved, machine, median_ratio, spread

from dflash_offline.pipeline.embedded import CONVERSATIONS, TARGET
from dflash_offline.schemas.config import TrainConfig
from dflash_offline.stages.corpus import Corpus
from dflash_offline.stages.distributed import Ranks
from dflash_offline.stages.loader import Batch
from dflash_offline.stages.metrics import peak_memory
from dflash_offline.stages.progress import readable_bytes
from dflash_offline.stages.target import choose_device
from dflash_offline.stages.training import Training


def main() -> None:
    """Print both sides' seconds a step and how much slower streaming is."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--limit-mib", type=int)
    parser.add_argument("--steps", type=int, default=8, help="of one round")
    parser.add_argument("--rounds", type=int, default=15)
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


def compare(cache: Path, arguments: argparse.Namespace) -> None:
    """Train from the cache in rounds, both sides from the same draft on."""
    size = sum(path.stat().st_size for path in cache.rglob("*") if path.is_file())
    if arguments.limit_mib:
        assert arguments.limit_mib << 20 < size, f"the cache has only {readable_bytes(size)}"
        resource.setrlimit(resource.RLIMIT_DATA, (arguments.limit_mib << 20, arguments.limit_mib << 20))
    config = TrainConfig(
        caches=(cache,),
        out=Path("unused"),
        batch_tokens=1792,
        num_anchors=16,
        draft_layers=2,
        optimizer="muon",
        steps=(arguments.rounds + 1) * arguments.steps,
        device=arguments.device,
    )
    training = Training(config, Corpus.open(config.caches), Ranks(rank=0, count=1, device=choose_device(config.device)))
    loader, steps = training.loader(config.seed), arguments.steps
    # Packed, all micro-batches have one shape and cost the same; under a limit only one round's can be held.
    held = cycle(list(islice(training.stream(), steps if arguments.limit_mib else None)))
    plan = training.schedule.between(0, config.steps or 0)
    waits: list[float] = []

    def step(batches: Iterator[Batch]) -> float:
        return sum(training.step([batch]).wait_s for batch in batches)

    def stream() -> None:
        """Begin anew every round, so that nothing is read ahead on the other side's time: the first wait counts."""
        waits.append(step(loader.stream(islice(plan, steps), config.loader_threads, training.device)))

    sides = {"memory": lambda: step(islice(held, steps)), "stream": stream}
    seconds = interleaved(sides, arguments.rounds)
    print(f"{machine()}; {training.device}, {arguments.threads} threads; cache {readable_bytes(size)}")
    if arguments.limit_mib:
        limit = readable_bytes(arguments.limit_mib << 20)
        print(f"private memory limited to {limit}; peak resident {readable_bytes(peak_memory(training.device))}")
    for name, values in seconds.items():
        print(f"  {name:<8} {spread([value / steps for value in values])} s a step")
    print(f"  waited   {spread([wait / steps for wait in waits[1:]])} s a step for streamed data")
    print(f"  stream / memory, rate: {median_ratio(seconds, 'stream', 'memory'):.3f} (floor 0.98)")


if __name__ == "__main__":
    main()
