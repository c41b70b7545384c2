"""Memory and time of plans of a million and of ten million samples: what the planner and a reader take for each sample.

Run by `make bench-scale` (half an hour): what planning keeps beside its files, without the tokenizing; and what a
training run does before its first step, in a process of its own: plan, corpus, split and the packing of an epoch.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import bench_inspect
import numpy as np

from dflash_offline.schemas.settings.extract import ExtractConfig
from dflash_offline.stages.conversations.plan import _Collected
from dflash_offline.stages.conversations.tokenize import BatchOutcome, RowOutcome, SampleOutcome
from dflash_offline.stages.store.cache import Cache
from dflash_offline.stages.training import corpus as corpus_module
from dflash_offline.stages.training.corpus import Corpus
from dflash_offline.stages.training.schedule import Batching, RowLimits, Schedule, row_shape

ROWS = 10_000
SHARD_SAMPLES = 500


class Taken:
    """Notes the seconds of each step and the most memory that the process has held up to its end."""

    def __init__(self) -> None:
        self._began, self.steps = time.perf_counter(), list[tuple[str, float, int]]()
        self.note("start")

    def note(self, name: str) -> None:
        status = Path("/proc/self/status").read_text()
        peak = int(status.partition("VmHWM:")[2].split()[0])
        now = time.perf_counter()
        self.steps.append((name, now - self._began, 1024 * peak))
        self._began = now
        Path("/proc/self/clear_refs").write_text("5")  # the next step's peak is its own


def plan(folder: Path, num_samples: int) -> list[tuple[str, float, int]]:
    """Collect rows of sixteen tokens each, as they come from the tokenizing processes, and write the plan."""
    taken, rng = Taken(), np.random.default_rng(0)
    config = ExtractConfig(data=("data",), target="target", out=folder / "cache")
    source = SimpleNamespace(name="data.jsonl", container="JSONL", path="data.jsonl")
    with _Collected(folder, 1000) as collected:
        for first in range(0, num_samples, ROWS):
            lengths = rng.integers(8, 25, ROWS).tolist()
            rows = [
                RowOutcome("chat", b"", [SampleOutcome(num_tokens=n, num_supervised=n // 2, num_anchors=1)])
                for n in lengths
            ]
            total = sum(lengths)
            batch = [SimpleNamespace(source=source, line=first + number) for number in range(ROWS)]
            ids = rng.integers(0, 1000, total).astype(np.uint32)
            collected.add(batch, BatchOutcome(rows, ids, np.ones(total, np.bool_)))
        taken.note("rows collected")
        collected.write(config, 2 * 3 * 1024, by_length=True)
        taken.note("plan written")
    return taken.steps


def read(cache: Path) -> list[tuple[str, float, int]]:
    """Do what a run does before its first step."""
    taken = Taken()
    corpus_module.LOADED_TOKENS = 0
    opened = Cache(cache)
    assert len(opened.samples)
    taken.note("plan")
    opened.require_complete()
    taken.note("records")
    corpus = Corpus([opened])
    taken.note("corpus")
    training, _ = corpus.split(128)
    taken.note("split")
    num_anchors = np.minimum(opened.samples.num_anchors, 512)
    limits = RowLimits(batch_tokens=8192, batch_block_tokens=65_536, block_size=16, row_tokens=None, long_rows=True)
    shape = row_shape(corpus.num_tokens, num_anchors, limits)
    batching = Batching(num_tokens=corpus.num_tokens, num_anchors=num_anchors, shape=shape, batch_size=8)
    batches = Schedule(batching, [training], [1.0], 0).epoch(0)
    taken.note(f"epoch of {len(batches):,} micro-batches")
    return taken.steps


def main() -> None:
    """Print seconds and bytes a sample of each step."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, nargs="+", default=[1_000_000, 10_000_000])
    parser.add_argument("--folder", type=Path, help="for the files, in place of a temporary folder")
    parser.add_argument("--step", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.step:
        name, folder, count = arguments.step
        print(json.dumps(plan(Path(folder), int(count)) if name == "plan" else read(Path(folder) / "cache")))
        return
    for count in arguments.samples:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            bench_inspect.NUM_SAMPLES, bench_inspect.NUM_SHARDS = count, count // SHARD_SAMPLES
            for name in ("plan", "read"):
                if name == "read":
                    cache = Path(folder) / "cache"
                    bench_inspect.write_records(cache, bench_inspect.make_plan(cache), range(count // SHARD_SAMPLES))
                command = [sys.executable, "-m", "large.scale", "--step", name, folder, str(count)]
                steps = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
                base = steps[0][2]
                print(f"{name}, {count:,} samples; {base / 1e6:.0f} MB before")
                for step, seconds, peak in steps[1:]:
                    print(f"  {step:<34} {seconds:7.1f} s  {(peak - base) / count:7.1f} bytes a sample", flush=True)


if __name__ == "__main__":
    main()
