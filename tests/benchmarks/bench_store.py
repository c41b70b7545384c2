"""Size, error and speed of the feature store beside other ways to keep the same features; exits 1 if a bound fails.

All sides of a table take turns within one run, every figure is a median, files are read from a warm page cache and
from the disk, and MB are of raw bfloat16 features of real tokens. Axes: T tokens, L captured layers, H hidden size.
"""

import argparse
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import zarr
from feature_sets import (
    OUTLIER_RULE,
    TARGET,
    WIDE_RULE,
    Store,
    embedded_features,
    joined,
    new_store,
    read_features,
    stressed,
    widened,
)
from peers import bits, open_zarr, peers, sync_files
from sides import interleaved, machine, median_ratio
from torch import Tensor
from transformers import AutoModelForCausalLM

from dflash_offline.pipeline.doctor.storage import try_store
from dflash_offline.schemas.manifest import FEATURES, HIDDEN, FeatureLayout
from dflash_offline.stages.cores import usable_cores
from dflash_offline.stages.store.cache import Cache
from dflash_offline.stages.target.layer_ids import default_layer_ids

WIDTH = 2048
NUM_CONVERSATIONS = 150
NUM_SHORT, NUM_LONG, LONG_TOKENS = 32, 4, 2000
LAYOUTS = (
    ("lossless", FeatureLayout(), 0.72),
    ("rounded, 4 bits", FeatureLayout(kind="rounded", mantissa_bits=4), 0.53),
    ("scaled, 1/8", FeatureLayout(kind="scaled", step=1 / 8), 0.36),
    ("scaled, 1/4", FeatureLayout(kind="scaled", step=1 / 4), 0.30),
)
ROUNDS = 9
LOADERS = 2
"""Threads that read ahead in training, by default."""
TORCH_BOUND, ZARR_BOUND, WRITE_BOUND = 1.1, 2.5, 0.85
ONE_CORE = "ours, on one core"
SHARD_BYTES = 512 << 20
"""Raw features of a shard by default; what is written comes near it."""
SLOW = ("torch.load gzip",)
"""Sides that read and write a tenth of the samples; their rates are of that."""
ONE_THREAD = ("parquet",)
"""Sides that crash where several threads read."""

Samples = list[Tensor]


class Bounds:
    """Which bounds held."""

    def __init__(self) -> None:
        self.failed: list[str] = []

    def check(self, what: str, value: float, *, at_least: float | None = None, at_most: float | None = None) -> str:
        """Return "ok" or "MISSED", and remember what was missed."""
        bound = at_least if at_least is not None else at_most
        holds = value >= bound if at_least is not None else value <= bound
        if not holds:
            self.failed.append(f"{what}: {value:.3f}, bound {bound}")
        return "ok" if holds else "MISSED"


def raw_bytes(samples: Sequence[Tensor]) -> int:
    return sum(2 * sample.numel() for sample in samples)


def sizes(folder: Path, sets: dict[str, Samples], bounds: Bounds) -> dict[str, Store]:
    """Print bytes and errors of every feature set in every layout; returns the lossless stores."""
    print(
        "Bytes over raw bfloat16 and error: per channel, root mean square over the channel's standard deviation, both"
    )
    print("over all tokens but each sample's first; L2 over all. `set / layout`, ratio, bound, median, worst, L2.\n")
    kept = {}
    for name, samples in sets.items():
        for layout_name, layout, bound in LAYOUTS:
            store = new_store(folder / f"{name}-{layout.kind}-{layout.step}", samples, layout)
            ratio = store.commit() / raw_bytes(samples)
            held = bounds.check(f"{name}, {layout_name}: bytes", ratio, at_most=bound)
            median, worst, relative = errors(store, samples)
            print(
                f"  {name + ' / ' + layout_name:42} {ratio:.3f}  <= {bound:.2f} {held:6}  "
                f"{median:8.2%} {worst:8.2%} {relative:8.2%}"
            )
            if layout.kind == "lossless":
                kept[name] = store
    return kept


def errors(store: Store, samples: Samples) -> tuple[float, float, float]:
    """Return each channel's error over its standard deviation (median, worst), and the relative L2 error."""
    reader = Cache.open(store.cache)
    stored = [read_features(reader, number) for number in range(len(samples))]
    later = torch.cat([torch.arange(len(sample)) > 0 for sample in samples])
    channels, lost, total = [], 0.0, 0.0
    for layer in range(samples[0].shape[1]):
        raw = torch.cat([sample[:, layer] for sample in samples]).float()
        difference = torch.cat([sample[:, layer] for sample in stored]).float() - raw
        lost += float(difference.double().square().sum())
        total += float(raw.double().square().sum())
        channels.append(difference[later].square().mean(dim=0).sqrt() / raw[later].std(dim=0))
    found = torch.cat(channels)
    return float(found.median()), float(found.max()), (lost / total) ** 0.5


@torch.inference_mode()
def divergence(folder: Path, samples: Samples, ids: list[Tensor]) -> None:
    """Print what each layout does to the target's own logits when its last captured layer is read back from it."""
    model = AutoModelForCausalLM.from_pretrained(TARGET, dtype=torch.float32).eval()
    last = samples[0].shape[1] - 1
    layer = model.model.layers[default_layer_ids(len(model.model.layers), None)[-1]]
    print("\nKL of the target's logits, in nats a token, when the last captured layer's output comes from the store")
    for name, layout, _ in LAYOUTS:
        reader = Cache.open(folder / f"embedded-{layout.kind}-{layout.step}")
        total, count = 0.0, 0
        for number, tokens in enumerate(ids[:50]):
            clean = model(tokens[None]).logits.log_softmax(-1)
            replaced = read_features(reader, number)[None, :, last].float()
            handle = layer.register_forward_hook(lambda *_, value=replaced: value)
            other = model(tokens[None]).logits.log_softmax(-1)
            handle.remove()
            total += float((clean.exp() * (clean - other)).sum())
            count += len(tokens)
        print(f"  {name:20} {total / count:.2e}")


def read_side(
    readers: dict[str, Callable[[int], Tensor]], name: str, order: list[int], pool: ThreadPoolExecutor | None
) -> Callable[[], None]:
    """Return what reads the samples in this order, by this thread or by those of a pool."""

    def side(part: list[int] = order) -> None:
        read = readers[name]
        for number in part:
            read(number)

    if pool is None:
        return side
    return lambda: [job.result() for job in [pool.submit(side, order[i::LOADERS]) for i in range(LOADERS)]]


def reads(folder: Path, name: str, num_reads: int) -> list[str]:
    """Print the rate of random-sample reads of every side, of the samples saved in a folder; returns missed bounds.

    Runs in a process of its own: what is left free in another's memory would decide how fast new tensors are made.
    """
    samples: Samples = torch.load(folder / "samples")
    lengths, bounds = [len(sample) for sample in samples], Bounds()
    store = new_store(folder / "ours", samples, FeatureLayout())
    store.commit()
    reader = Cache.open(store.cache)
    begins = reader.samples.start.tolist()
    kept = threading.local()

    def read_into_buffer(number: int) -> Tensor:
        if not hasattr(kept, "features"):
            kept.features = torch.zeros(max(lengths), *samples[0].shape[1:], dtype=torch.bfloat16)
            kept.codes = kept.features.view(torch.int16).numpy().view(np.uint16)
        reader.codes(number, out=kept.codes[: lengths[number]])
        return kept.features[: lengths[number]]

    readers = {
        "ours": read_into_buffer,
        "ours, new tensor": lambda number: read_features(reader, number),
        "zarr-python": open_zarr(store.cache / FEATURES / HIDDEN, begins, lengths),
    }
    others = peers(lengths, samples[0].shape[1:])
    for peer_name, peer in others.items():
        (folder / peer_name).mkdir()
        peer.write(folder / peer_name, samples)
        readers[peer_name] = peer.open(folder / peer_name)

    def forget_pages() -> None:
        readers.update({peer_name: peer.open(folder / peer_name) for peer_name, peer in others.items()})
        drop_pages(folder)  # which spares what is mapped, so that the maps had to go first

    for side, read in readers.items():  # every side gives the same bits; this warms the page cache, too
        for number, sample in enumerate(samples):
            assert np.array_equal(bits(read(number)), bits(sample)), f"{side} reads sample {number} wrong"
    sync_files(folder)
    random = np.random.default_rng(0)
    again, once = random.integers(0, len(samples), num_reads).tolist(), random.permutation(len(samples)).tolist()
    print(f"\nRandom-sample reads: {name}, {raw_bytes(samples) / len(samples) / 1e6:.2f} MB a sample")
    with ThreadPoolExecutor(LOADERS) as pool:
        for who, threads, order, before in (
            ("by one thread", None, again, int),
            (f"by {LOADERS} threads, as training reads", pool, again, int),
            (f"by {LOADERS} threads, from the disk, every sample once", pool, once, forget_pages),
        ):
            print(f"  {who}")
            size = raw_bytes([samples[number] for number in order])
            tenth = order[: max(1, len(order) // 10)]
            sides = {
                side: read_side(readers, side, tenth if side in SLOW else order, threads)
                for side in readers
                if threads is None or side not in ONE_THREAD
            }
            seconds = interleaved(sides, ROUNDS, before)
            for side in SLOW:
                seconds[side] = [value * len(order) / len(tenth) for value in seconds[side]]
            print_reads(f"{name}, {who}", seconds, size, bounds)
    sys.stdout.flush()
    return bounds.failed


def drop_pages(folder: Path) -> None:
    """Take synced files out of the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def print_reads(name: str, seconds: dict[str, list[float]], size: int, bounds: Bounds) -> None:
    fastest = min(
        (side for side in seconds if side.startswith("torch.load")), key=lambda s: statistics.median(seconds[s])
    )
    for side, values in seconds.items():
        ratio = median_ratio(seconds, "ours", side)
        bound = {"torch.load": TORCH_BOUND, fastest: TORCH_BOUND, "zarr-python": ZARR_BOUND}.get(side)
        line = f"    {side:22} {size / statistics.median(values) / 1e6:8,.0f} MB/s   ours is {ratio:7.2f} times as fast"
        if bound is not None:
            line += f"  >= {bound} {bounds.check(f'{name}: reading, over {side}', ratio, at_least=bound)}"
        print(line)


def writes(folder: Path, name: str, samples: Samples, bounds: Bounds) -> None:
    """Print the rate of synced writes of every side, and how well ours uses the cores."""
    folder.mkdir()
    lengths = [len(sample) for sample in samples]
    store = new_store(folder / "ours", samples, FeatureLayout())
    sides: dict[str, Callable[[], object]] = {
        "ours": store.commit,
        ONE_CORE: lambda: on_one_core(store.commit),
        "zarr-python": lambda: write_zarr(store),
    }
    for peer_name, peer in peers(lengths, samples[0].shape[1:]).items():
        if not peer_name.startswith("torch.load ") or peer_name in SLOW:
            part = samples[: max(1, len(samples) // 10)] if peer_name in SLOW else samples
            sides[peer_name] = lambda peer=peer, path=folder / peer_name, part=part: (
                peer.write(path, part),
                sync_files(path),
            )

    def remove() -> None:
        """Take away what was written, and wait for the disk: to free an old file is no part of writing a new one."""
        store.forget()
        for peer_name in sides.keys() - {"ours", ONE_CORE, "zarr-python"}:
            shutil.rmtree(folder / peer_name, ignore_errors=True)
            (folder / peer_name).mkdir()
        os.sync()

    seconds = interleaved(sides, ROUNDS, remove)
    size = raw_bytes(samples)
    print(f"\nWhole-shard writes, synced: {name}, {size / 1e6:.0f} MB in all, to {folder.parent}")
    for side, values in seconds.items():
        part = raw_bytes(samples[: max(1, len(samples) // 10)]) if side in SLOW else size
        print(f"  {side:20} {part / statistics.median(values) / 1e6:8,.0f} MB/s")
    cores = usable_cores()
    scaling = median_ratio(seconds, "ours", ONE_CORE) / cores
    held = bounds.check(f"{name}: writing, over one core x {cores}", scaling, at_least=WRITE_BOUND)
    print(f"  ours over ours on one core x {cores}: {scaling:.2f}  >= {WRITE_BOUND} {held}")


def on_one_core(turn: Callable[[], object]) -> None:
    """Do it with every thread of this process on the same core."""
    cores = os.sched_getaffinity(0)
    threads = [int(thread.name) for thread in Path("/proc/self/task").iterdir()]
    try:
        for thread in threads:
            os.sched_setaffinity(thread, {min(cores)})
        turn()
    finally:
        for thread in threads:
            os.sched_setaffinity(thread, cores)


def write_zarr(store: Store) -> None:
    """Write the same shard by zarr-python's default pipeline, beside ours, synced."""
    path = store.cache / FEATURES / HIDDEN
    array = zarr.open_array(str(path), mode="r+")
    array[:] = store.codes
    sync_files(path)


def memory(cache: Path, sample: int, size: int) -> None:
    """Print the reader's peak memory while it reads one sample, in a process of its own."""
    code = (
        "import sys, pathlib; sys.path.insert(0, sys.argv[3])\n"
        "from feature_sets import read_features, Cache\n"
        "def status(key): return int(pathlib.Path('/proc/self/status').read_text().split(key)[1].split()[0]) * 1024\n"
        "reader = Cache.open(pathlib.Path(sys.argv[1])); read_features(reader, 0)\n"
        "before = status('VmRSS:'); pathlib.Path('/proc/self/clear_refs').write_text('5')\n"
        "for _ in range(3): read_features(reader, int(sys.argv[2]))\n"
        "print(status('VmHWM:') - before)"
    )
    command = [sys.executable, "-c", code, str(cache), str(sample), str(Path(__file__).parent)]
    peak = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    print(f"\nReader's peak memory over what it held before: {peak / 1e6:.1f} MB for a sample of {size / 1e6:.1f} MB")


def main() -> int:
    """Run everything; returns 1 if a bound does not hold."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=None, help="where to write; the system's temporary folder")
    arguments = parser.parse_args()
    print(f"{machine()}, {usable_cores()} usable; torch threads {torch.get_num_threads()}; {ROUNDS} rounds\n")
    print(f"{WIDE_RULE}\n{OUTLIER_RULE}\n")
    bounds = Bounds()
    embedded, ids = embedded_features(NUM_CONVERSATIONS)
    short = widened(embedded[:NUM_SHORT], WIDTH)
    long = widened(joined(embedded[NUM_SHORT:], LONG_TOKENS, NUM_LONG), WIDTH)
    wide = short + long
    sets = {
        "embedded": embedded,
        "embedded, outliers": stressed(embedded),
        f"wide {WIDTH}": wide,
        f"wide {WIDTH}, outliers": stressed(wide),
    }
    with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
        folder = Path(temporary)
        stores = sizes(folder, sets, bounds)
        divergence(folder, embedded, ids)
        decoded = try_store().decode_bytes_per_s / 1e6
        cores = usable_cores()
        print(f"\nFloor of a read: one core decodes {decoded:,.0f} MB/s of what is in its cache, {cores} cores")
        print(f"{cores * decoded:,.0f}; a peer copies what it keeps uncompressed from the page cache.")
        print("\nSettings; the peers give a new bfloat16 tensor, they have no way to fill one:")
        print("  ours: Cache.codes(out=...), into a torch buffer that is kept, as training does")
        print("  zarr-python: array[begin:end] of the same files")
        for peer_name, peer in peers([], (1, 1)).items():
            print(f"  {peer_name}: {peer.settings}")
        for number, (name, samples, num_reads) in enumerate(
            (
                ("embedded", embedded, 100),
                (f"wide {WIDTH}, {LONG_TOKENS} tokens", long, 4),
                (f"wide {WIDTH}, conversations", short, 30),
            )
        ):
            (folder / f"read-{number}").mkdir()
            torch.save(samples, folder / f"read-{number}" / "samples")
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                bounds.failed += process.submit(reads, folder / f"read-{number}", name, num_reads).result()
        whole = wide + long * ((SHARD_BYTES - raw_bytes(wide)) // raw_bytes(long))
        writes(folder / "write-wide", f"wide {WIDTH}", whole, bounds)
        memory(stores[f"wide {WIDTH}"].cache, NUM_SHORT, 2 * long[0].numel())
    print("\n" + ("Every bound holds." if not bounds.failed else "MISSED:\n  " + "\n  ".join(bounds.failed)))
    return 1 if bounds.failed else 0


if __name__ == "__main__":
    sys.exit(main())
