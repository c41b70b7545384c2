"""Extraction's rate in real tokens beside forwards without padding or writing; exits 1 where it is under 0.95 of it.

The forwards alone hold as many tokens as the plan's micro-batches, in as many sequences, all of one length. Extraction
pads what the plan leaves to pad, checks, rounds, encodes, hashes, syncs and records every shard. A third side extracts
the same samples in the order of the rows, as older versions planned them. Loading and planning are not counted. The
ratio of processor time is stated as well: on a CPU, encoding takes its part from the forwards. Lengths are log-normal,
on a CPU's larger target an eighth as long. With --gpu the target has the shape of a 1.7B Qwen3, random,
in bfloat16 on a GPU, and the cache lies in memory (tmpfs); the disk's rate is stated apart.
"""

import argparse
import json
import math
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from sides import interleaved, machine, median_ratio, spread
from transformers import Qwen3Config, Qwen3ForCausalLM

from dflash_offline.schemas.commits import commit_path
from dflash_offline.schemas.settings.extract import ExtractConfig
from dflash_offline.stages.capture.create import create_cache
from dflash_offline.stages.capture.inputs import open_inputs
from dflash_offline.stages.capture.runner import TargetRunner
from dflash_offline.stages.capture.workers import run_shards
from dflash_offline.stages.extract import open_worker
from dflash_offline.stages.progress import Silent
from dflash_offline.stages.target.model import layer_states

EMBEDDED = Path(__file__).parents[2] / "pipeline" / "embedded"
TARGET = EMBEDDED / "target"
BOUND = 0.95
FLOOR, OLDER = "forwards without padding", "in the order of the rows"
SHAPE_100M = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "intermediate_size": 2816,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": 1536,
}
SHAPE_1_7B = {
    "hidden_size": 2048,
    "num_hidden_layers": 28,
    "intermediate_size": 6144,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151_936,
}


def random_target(folder: Path, shape: dict[str, int], device: str) -> Path:
    """Save a random bfloat16 Qwen3 with the embedded target's tokenizer; returns its folder."""
    shutil.copytree(TARGET, folder, ignore=shutil.ignore_patterns("model.safetensors", "config.json"))
    torch.manual_seed(0)
    with torch.device(device):
        model = Qwen3ForCausalLM(Qwen3Config(**shape, tie_word_embeddings=True, eos_token_id=2, dtype="bfloat16"))
    print(f"  {sum(p.numel() for p in model.parameters()) / 1e6:,.0f}M parameters, random, seed 0: {shape}")
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


class Sides:
    """A planned cache and its loaded target: forwards alone without padding, and the extraction of all shards."""

    def __init__(self, config: ExtractConfig, *, by_length: bool = True) -> None:
        inputs = open_inputs(config, Silent())
        if not by_length:  # as an older version planned it
            layout = {name: value for name, value in inputs.identity["layout"].items() if name != "order"}
            inputs = replace(inputs, identity={**inputs.identity, "layout": layout})
        create_cache(inputs, Silent())
        self.cache = config.out
        self.work = open_worker(inputs.config)
        assert isinstance(self.work.runner, TargetRunner)
        self.runner = self.work.runner
        self.layout, self.samples = self.work.cache.layout, self.work.cache.samples
        self.num_tokens = int(self.samples.num_tokens.sum())
        self.bytes_written = 0
        shards = map(self.samples.samples_of_shard, range(self.layout.num_shards))
        self.batches = [batch for members in shards for batch in self.runner.batches(self.samples, members)]

    def padded(self) -> int:
        """Return the tokens of all forwards, padding included."""
        return sum(len(batch) * int(self.samples.num_tokens[batch].max()) for batch in self.batches)

    def forward(self) -> None:
        """Run as many tokens as each micro-batch has, in as many sequences of one length, and keep nothing."""
        runner = self.runner
        for batch in self.batches:
            lengths = self.samples.num_tokens[batch]
            ids = np.resize(self.samples.input_ids(int(batch[0])).astype(np.int64), (len(batch), round(lengths.mean())))
            layer_states(runner.model, torch.from_numpy(ids).to(runner.device, non_blocking=True), runner.layer_ids)
        if runner.device.type == "cuda":
            torch.cuda.synchronize(runner.device)

    def extract(self) -> None:
        """Extract every shard anew."""
        shards = range(self.layout.num_shards)
        for shard in shards:
            commit_path(self.cache, shard).unlink(missing_ok=True)
        self.bytes_written = sum(run_shards(self.work, shards, Silent()))


def compare(name: str, config: ExtractConfig, rounds: int) -> bool:
    """Print the sides of one target; returns whether the bound holds."""
    sides = Sides(config)
    older = Sides(replace(config, out=config.out.with_name(f"{config.out.name}-older")), by_length=False)
    layout = sides.layout
    processor = dict[str, list[float]]()
    run = {FLOOR: sides.forward, "extraction": sides.extract, OLDER: older.extract}
    seconds = interleaved({name: counted(side, processor.setdefault(name, [])) for name, side in run.items()}, rounds)
    ratio = median_ratio(seconds, "extraction", FLOOR)
    print(
        f"{name}: {sides.num_tokens:,} tokens, {len(sides.samples)} samples, {layout.num_shards} shards of "
        f"{layout.shard_tokens} slots, {layout.num_layers} layers x {layout.hidden_size}, batches of "
        f"{config.batch_tokens} tokens, {sides.runner.model.dtype} on {sides.runner.device}, "
        f"{torch.get_num_threads()} torch threads"
    )
    print(
        f"  real of padded tokens: {sides.num_tokens / sides.padded():.3f} in {len(sides.batches)} forwards; in the "
        f"order of the rows {older.num_tokens / older.padded():.3f} in {len(older.batches)}"
    )
    for side, values in seconds.items():
        rate = sides.num_tokens / statistics.median(values)
        print(f"  {side:24} {rate:10,.0f} real tokens/s   {spread(values)} s")
    extracting = statistics.median(seconds["extraction"])
    raw = sides.num_tokens * layout.slot_bytes
    print(
        f"  {raw / extracting / 1e6:,.0f} MB/s of raw features, {sides.bytes_written / extracting / 1e6:,.0f} written"
    )
    print(f"  of processor time: {median_ratio(processor, 'extraction', FLOOR):.3f}")
    print(f"  extraction over extraction in the order of the rows: {median_ratio(seconds, 'extraction', OLDER):.3f}")
    print(f"  extraction over {FLOOR}: {ratio:.3f}  >= {BOUND} {'ok' if ratio >= BOUND else 'MISSED'}\n", flush=True)
    return ratio >= BOUND


def counted(side: Callable[[], object], seconds: list[float]) -> Callable[[], None]:
    """Return the side so that it adds what each of its runs takes of all cores together, in seconds."""

    def run() -> None:
        began = time.process_time()
        side()
        seconds.append(time.process_time() - began)

    return run


def disk_rate(folder: Path) -> float:
    """Return MB/s of one synced write of 512 MiB."""
    content = os.urandom(1 << 20)
    began = time.perf_counter()
    with (folder / "rate").open("wb") as file:
        for _ in range(512):
            file.write(content)
        file.flush()
        os.fsync(file.fileno())
    spent = time.perf_counter() - began
    (folder / "rate").unlink()
    return 512 * len(content) / spent / 1e6


def rows(folder: Path, count: int, *, mean: float, most: int) -> tuple[Path]:
    """Write tokens of log-normal lengths, the deviation nine eighths of the mean, to a file."""
    rng = np.random.default_rng(0)
    variance = math.log(1 + (9 / 8) ** 2)
    drawn = rng.lognormal(math.log(mean) - variance / 2, math.sqrt(variance), count)
    lengths = np.clip(drawn.round().astype(int), 16, most).tolist()
    path = folder / f"{count}.jsonl"
    with path.open("w") as file:
        for length in lengths:
            mask = [0] * (length // 3) + [1] * (length - length // 3)
            file.write(json.dumps({"input_ids": rng.integers(10, 1400, length).tolist(), "loss_mask": mask}) + "\n")
    return (path,)


def main() -> int:
    """Compare on every target; returns 1 if a bound does not hold."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gpu", action="store_true", help="a 1.7B shape on a GPU instead of the CPU's targets")
    parser.add_argument("--folder", type=Path, help="where to write; with --gpu /dev/shm unless given")
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    parent = arguments.folder or (Path("/dev/shm") if arguments.gpu else None)
    print(f"{machine()}; {arguments.rounds} rounds, sides in turn, medians\n")
    with tempfile.TemporaryDirectory(dir=parent) as name, tempfile.TemporaryDirectory() as disk:
        folder = Path(name)
        if arguments.gpu:
            print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
            held = [
                compare(
                    "1.7B shape",
                    ExtractConfig(
                        data=rows(folder, 3000, mean=800, most=3072),
                        target=str(random_target(folder / "target", SHAPE_1_7B, "cuda")),
                        out=folder / "cache",
                        dtype="bfloat16",
                        device="cuda",
                    ),
                    arguments.rounds,
                )
            ]
        else:
            held = [
                compare(
                    "embedded target",
                    ExtractConfig(
                        data=rows(folder, 200, mean=800, most=2048),
                        target=str(TARGET),
                        out=folder / "embedded",
                        device="cpu",
                        block_size=8,
                        shard_mib=16,
                    ),
                    arguments.rounds,
                ),
                compare(
                    "100M parameters",
                    ExtractConfig(
                        data=rows(folder, 30, mean=100, most=384),
                        target=str(random_target(folder / "target", SHAPE_100M, "cpu")),
                        out=folder / "random",
                        device="cpu",
                        block_size=8,
                        shard_mib=8,
                        batch_tokens=512,
                    ),
                    arguments.rounds,
                ),
            ]
        print(f"The disk takes {disk_rate(Path(disk)):,.0f} MB/s, one synced file in {disk}.")
    return 0 if all(held) else 1


if __name__ == "__main__":
    sys.exit(main())
