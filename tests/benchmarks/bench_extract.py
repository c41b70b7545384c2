"""Extraction's rate beside the same forwards without any writing; exits 1 where it is under 0.95 of it.

Both sides run the same micro-batches of the same plan with the loaded target; loading and planning are not counted.
Extraction checks, rounds, encodes, hashes, syncs and records every shard. With --gpu the target has the shape of a
1.7B Qwen3, random, in bfloat16 on a GPU, and the cache lies in memory (tmpfs); the disk's rate is stated apart.
"""

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from sides import interleaved, machine, median_ratio, spread
from transformers import Qwen3Config, Qwen3ForCausalLM

from dflash_offline.schemas.commits import commit_path
from dflash_offline.schemas.settings.extract import ExtractConfig
from dflash_offline.stages.capture.create import create_cache
from dflash_offline.stages.capture.inputs import open_inputs
from dflash_offline.stages.capture.runner import micro_batches, pad_sequences
from dflash_offline.stages.capture.workers import run_shards
from dflash_offline.stages.extract import open_worker
from dflash_offline.stages.progress import Silent
from dflash_offline.stages.target.model import layer_states

EMBEDDED = Path(__file__).parents[2] / "pipeline" / "embedded"
TARGET = EMBEDDED / "target"
BOUND = 0.95
ROUNDS = 9
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
    """A planned cache and its loaded target: forwards alone, and the extraction of all shards."""

    def __init__(self, config: ExtractConfig) -> None:
        create_cache(open_inputs(config, Silent()), Silent())
        self.cache = config.out
        self.work = open_worker(config)
        self.runner = self.work.runner
        self.layout, self.samples = self.work.writer.cache.layout, self.work.writer.cache.samples
        self.num_tokens = int(self.samples.num_tokens.sum())
        self.bytes_written = 0

    def forward(self) -> None:
        """Run every micro-batch, from its tokens to its captured states, and keep nothing."""
        runner = self.runner
        for shard in range(self.layout.num_shards):
            members = self.samples.samples_of_shard(shard)
            for batch in micro_batches(self.samples, members, runner.batch_tokens):
                padded = torch.from_numpy(pad_sequences(self.samples, batch)).to(runner.device, non_blocking=True)
                layer_states(runner.model, padded, runner.layer_ids)
        if runner.device.type == "cuda":
            torch.cuda.synchronize(runner.device)

    def extract(self) -> None:
        """Extract every shard anew."""
        shards = range(self.layout.num_shards)
        for shard in shards:
            commit_path(self.cache, shard).unlink(missing_ok=True)
        self.bytes_written = sum(run_shards(self.work, shards, Silent()))


def compare(name: str, config: ExtractConfig) -> bool:
    """Print the two sides of one target; returns whether the bound holds."""
    sides = Sides(config)
    layout = sides.layout
    seconds = interleaved({"forward": sides.forward, "extraction": sides.extract}, ROUNDS)
    ratio = median_ratio(seconds, "extraction", "forward")
    print(
        f"{name}: {sides.num_tokens:,} tokens, {len(sides.samples)} samples, {layout.num_shards} shards of "
        f"{layout.shard_tokens} slots, {layout.num_layers} layers x {layout.hidden_size}, batches of "
        f"{config.batch_tokens} tokens, {sides.runner.model.dtype} on {sides.runner.device}, "
        f"{torch.get_num_threads()} torch threads"
    )
    for side, values in seconds.items():
        rate = sides.num_tokens / statistics.median(values)
        print(f"  {side:12} {rate:10,.0f} tokens/s   {spread(values)} s")
    extracting = statistics.median(seconds["extraction"])
    raw = sides.num_tokens * layout.slot_bytes
    print(
        f"  {raw / extracting / 1e6:,.0f} MB/s of raw features, {sides.bytes_written / extracting / 1e6:,.0f} written"
    )
    print(f"  extraction over forward: {ratio:.3f}  >= {BOUND} {'ok' if ratio >= BOUND else 'MISSED'}\n")
    return ratio >= BOUND


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


def conversations(folder: Path, count: int) -> tuple[Path]:
    """Write the first of the embedded conversations to a file of their own."""
    path = folder / f"{count}.jsonl"
    with (EMBEDDED / "conversations.jsonl").open() as lines:
        path.write_text("".join(line for _, line in zip(range(count), lines, strict=False)))
    return (path,)


def main() -> int:
    """Compare on every target; returns 1 if a bound does not hold."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gpu", action="store_true", help="a 1.7B shape on a GPU instead of the CPU's targets")
    parser.add_argument("--folder", type=Path, help="where to write; with --gpu /dev/shm unless given")
    arguments = parser.parse_args()
    parent = arguments.folder or (Path("/dev/shm") if arguments.gpu else None)
    print(f"{machine()}; {ROUNDS} rounds, sides in turn, medians\n")
    with tempfile.TemporaryDirectory(dir=parent) as name, tempfile.TemporaryDirectory() as disk:
        folder = Path(name)
        if arguments.gpu:
            print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
            held = [
                compare(
                    "1.7B shape",
                    ExtractConfig(
                        data=conversations(folder, 3000),
                        target=str(random_target(folder / "target", SHAPE_1_7B, "cuda")),
                        out=folder / "cache",
                        dtype="bfloat16",
                        device="cuda",
                    ),
                )
            ]
        else:
            held = [
                compare(
                    "embedded target",
                    ExtractConfig(
                        data=conversations(folder, 300),
                        target=str(TARGET),
                        out=folder / "embedded",
                        device="cpu",
                        block_size=8,
                        shard_mib=16,
                    ),
                ),
                compare(
                    "100M parameters",
                    ExtractConfig(
                        data=conversations(folder, 30),
                        target=str(random_target(folder / "target", SHAPE_100M, "cpu")),
                        out=folder / "random",
                        device="cpu",
                        block_size=8,
                        shard_mib=8,
                        batch_tokens=512,
                    ),
                ),
            ]
        print(f"The disk takes {disk_rate(Path(disk)):,.0f} MB/s, one synced file in {disk}.")
    return 0 if all(held) else 1


if __name__ == "__main__":
    sys.exit(main())
