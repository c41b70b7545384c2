"""One training step on the CPU against a straightforward implementation of the same step: steps/s and peak memory.

Usage: python tests/benchmarks/bench_train.py [--rounds 5] [--tiny]

Same weights, row and anchors, no padding; both sides do forward, backward and an AdamW step. The other side uses the
same draft with a dense mask over all keys and holds all drafted slots' logits in one float32 tensor. Memory is
measured with each side in a process of its own: the peak resident size of two steps, less the resident size before
them, when weights, optimizer moments, head, embeddings and the row are in memory. Linux only (/proc). A third side is
the same step of a DFlash 2 draft of the same shape, against this trainer's of the base draft.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from sides import interleaved, machine, median_ratio, spread
from steps import PackedRow, packed_row, step_flops, straightforward_loss, target_ends
from torch import nn

from dflash_offline.schemas.draft.config import DraftConfig
from dflash_offline.schemas.variants.dflash import DFlash
from dflash_offline.schemas.variants.dflash2 import DFlash2
from dflash_offline.schemas.variants.variant import Variant
from dflash_offline.stages.draft.model import DraftModel
from dflash_offline.stages.trainer import DFlashTrainerModule
from dflash_offline.stages.training.optimizer import make_optimizers

GAMMA = 7.0
OURS, OTHER, DFLASH2 = "this trainer", "straightforward", "this trainer, DFlash 2"
CPU = torch.device("cpu")


def setting(tiny: bool, variant: Variant) -> tuple[DraftConfig, PackedRow]:
    scale = 8 if tiny else 1
    config = DraftConfig(
        hidden_size=512 // scale,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64 // scale,
        intermediate_size=1536 // scale,
        vocab_size=32_000 // scale,
        target_layer_ids=(1, 5, 9),
        num_target_layers=12,
        block_size=16,
        mask_token_id=0,
        variant=variant,
    )
    lengths, anchors = ((384, 512, 640, 512), (64, 96, 128, 112)) if not tiny else ((160, 160), (8, 16))
    return config, packed_row(config, lengths, anchors, CPU, torch.float32)


class Side:
    """A draft with its optimizer, and one way to compute its loss."""

    def __init__(self, name: str, tiny: bool) -> None:
        torch.manual_seed(0)
        self.config, self.row = setting(tiny, DFlash2() if name == DFLASH2 else DFlash())
        head, table = target_ends(self.config, CPU, torch.float32)
        self.draft = DraftModel(self.config)
        self.optimizers = make_optimizers(self.draft, "adamw", 1e-4, 0.01)
        module = DFlashTrainerModule(
            self.draft, head, table, self.config.mask_token_id, 16, "sdpa", loss_decay_gamma=GAMMA
        )
        self.loss: Callable[[], torch.Tensor] = (
            (lambda: self.row.step(module).loss)
            if name != OTHER
            else (lambda: straightforward_loss(self.draft, head, table, self.row, GAMMA))
        )
        self.module = module

    def step(self) -> None:
        self.loss().backward()
        self._optimize()

    def make_moments(self) -> None:
        """Have the optimizer allocate its moments, without a step's activations."""
        for parameter in self.draft.parameters():
            parameter.grad = torch.zeros_like(parameter)
        self._optimize()

    def _optimize(self) -> None:
        nn.utils.clip_grad_norm_(self.draft.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


def resident(field: str) -> int:
    """Return VmRSS or VmHWM of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def peak_of_own_process(name: str, tiny: bool) -> None:
    side = Side(name, tiny)
    side.make_moments()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    for _ in range(2):
        side.step()
    print(json.dumps(resident("VmHWM") - before))


def measured_peak(name: str, tiny: bool, threads: int) -> int:
    command = [sys.executable, __file__, "--memory-of", name, "--threads", str(threads)]
    run = subprocess.run([*command, "--tiny"] if tiny else command, check=True, capture_output=True, text=True)
    return int(json.loads(run.stdout))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--tiny", action="store_true", help="seconds instead of minutes; the figures mean nothing")
    parser.add_argument("--memory-of", choices=(OURS, OTHER, DFLASH2), help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.memory_of:
        peak_of_own_process(given.memory_of, given.tiny)
        return
    sides = {name: Side(name, given.tiny) for name in (OURS, OTHER, DFLASH2)}
    losses = {name: side.loss().item() for name, side in sides.items()}
    assert abs(losses[OURS] - losses[OTHER]) < 1e-5 * losses[OTHER], losses
    config, row = sides[OURS].config, sides[OURS].row
    slots = int(row.step(sides[OURS].module).valid_tokens)
    print(f"{machine()}, {given.threads} threads, torch {torch.__version__}, float32")
    print(
        f"draft: hidden {config.hidden_size}, {config.num_hidden_layers} layers, block {config.block_size}, vocabulary "
        f"{config.vocab_size:,}, {sum(p.numel() for p in sides[OURS].draft.parameters()):,} parameters"
    )
    seq_len, num_anchors = row.input_ids.shape[1], row.anchors.shape[1]
    print(
        f"row: {seq_len:,} tokens in {int(row.document_ids.max()) + 1} documents, {num_anchors} anchors, {slots:,} of "
        f"{num_anchors * (config.block_size - 1):,} drafted slots supervised; loss of both {losses[OURS]:.6f}"
    )
    flops = step_flops(config, row, slots)
    a, b = torch.randn(512, config.hidden_size), torch.randn(config.hidden_size, config.vocab_size)
    product = torch.empty(512, config.vocab_size)
    repeats = 1 if given.tiny else 20

    def matmuls() -> None:
        for _ in range(repeats):
            torch.mm(a, b, out=product)

    seconds = interleaved({**{name: side.step for name, side in sides.items()}, "matmuls": matmuls}, given.rounds)
    rate = 2.0 * a.numel() * config.vocab_size * repeats / median(seconds["matmuls"])
    for name in sides:
        print(f"{name}: {spread([1 / s for s in seconds[name]])} steps/s, {spread(seconds[name])} s a step")
    print(f"ratio of steps/s, median of {given.rounds} interleaved rounds: {median_ratio(seconds, OURS, OTHER):.2f}")
    own = sum(p.numel() for p in sides[DFLASH2].draft.parameters())
    print(
        f"a DFlash 2 step, {own:,} parameters, takes {1 / median_ratio(seconds, DFLASH2, OURS):.2f} times the base "
        f"draft's"
    )
    counted = ", ".join(f"{name} {value / 1e9:,.0f}" for name, value in flops.items())
    floor = sum(flops.values()) / rate
    print(
        f"floor: {counted} GFLOP at {rate / 1e9:,.0f} GFLOP/s, measured on the head's matmul between the rounds: "
        f"{floor:.3g} s; this trainer takes {median(seconds[OURS]) / floor:.2f} times that"
    )
    peaks = {name: measured_peak(name, given.tiny, given.threads) for name in sides}
    for name, peak in peaks.items():
        print(f"{name}: {peak / 2**20:,.0f} MiB peak above weights, optimizer and inputs")
    print(f"ratio of memory: 1/{peaks[OTHER] / max(peaks[OURS], 1):.1f}")
    print(f"a DFlash 2 step holds {peaks[DFLASH2] / max(peaks[OURS], 1):.2f} times the base draft's")


if __name__ == "__main__":
    main()
