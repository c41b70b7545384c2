"""One training step on a GPU at the shapes of a draft for Qwen3-8B: TFLOP/s, tokens/s, peak memory, and a floor.

Usage: python tests/benchmarks/bench_gpu.py [--rounds 10] [--tiny]

Random weights; a row of 8,192 tokens in four documents, 512 anchors each, blocks of 16; bfloat16 autocast, float32
masters, fused AdamW. Each part is printed as it is measured; a side that runs out of memory says so and is left out
of what follows. The operations counted are the matmuls that no way of computing avoids (steps.step_flops), so a
kernel that computes more than that gets no credit for it. `--tiny` runs the same code on a CPU, where its figures
mean nothing.
"""

import argparse
import gc
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import median

import torch
from sides import interleaved, machine, median_ratio, spread
from steps import packed_row, step_flops, target_ends
from torch import Tensor, nn

from dflash_offline.schemas.draft.config import AttentionRule, DraftConfig
from dflash_offline.stages.draft.attention import Blocks, attend, choose_flex_tiles, flex_mask, tiled_mask
from dflash_offline.stages.draft.model import DraftModel
from dflash_offline.stages.draft.objective import head_cross_entropy
from dflash_offline.stages.trainer import DFlashTrainerModule
from dflash_offline.stages.training.optimizer import make_optimizers

COMPILED, HALF, PLAIN, SDPA = (
    "flex_attention, compiled",
    "flex_attention, compiled, half of the activations",
    "flex_attention",
    "sdpa in tiles",
)
FLEX_ALONE, SDPA_ALONE = "one layer's attention, flex_attention", "one layer's attention, sdpa in tiles"
FLEX_NARROW = "one layer's attention, flex_attention with --flex-tiles narrow"
MASK, HEAD_ALONE = "the flex mask", "head, loss and gradient"
MLP, HEAD = "MLP's matmul", "head's matmul"
TARGET = 500.0
"""TFLOP/s on an H100."""


def setting(tiny: bool) -> tuple[DraftConfig, list[int], list[int]]:
    if tiny:
        small = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
        sizes = {**small, "intermediate_size": 96, "vocab_size": 512}
        lengths, anchors = [160, 160], [8, 8]
    else:
        large = {"hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
        sizes = {**large, "intermediate_size": 12_288, "vocab_size": 151_936}
        lengths, anchors = [2048] * 4, [512] * 4
    config = DraftConfig(
        **sizes,
        num_hidden_layers=5,
        target_layer_ids=(1, 9, 17, 25, 33),
        num_target_layers=36,
        block_size=16,
        mask_token_id=0,
    )
    return config, lengths, anchors


def ten_products(a: Tensor, b: Tensor, out: Tensor) -> None:
    for _ in range(10):
        torch.mm(a, b.t(), out=out)


class Bench:
    """The drafts, which share their weights and optimizer, the row, and everything that is timed."""

    def __init__(self, tiny: bool) -> None:
        self.device = torch.device("cpu" if tiny else "cuda")
        torch.manual_seed(0)
        self.config, lengths, anchors = setting(tiny)
        self.row = packed_row(self.config, lengths, anchors, self.device, torch.bfloat16)
        self.head, self.table = target_ends(self.config, self.device, torch.bfloat16)
        with self.device:
            self.draft = DraftModel(self.config)
        self.optimizers = make_optimizers(self.draft, "adamw", 1e-4, 0.01)

    def module(self, name: str) -> DFlashTrainerModule:
        """Return a trainer of the draft's own weights."""
        with torch.device("meta"):
            draft = DraftModel(self.config)
        draft.load_state_dict(self.draft.state_dict(keep_vars=True), assign=True)
        return DFlashTrainerModule(
            draft,
            self.head,
            self.table,
            self.config.mask_token_id,
            self.config.block_size,
            "sdpa" if name == SDPA else "flex_attention",
            loss_decay_gamma=7.0,
            compiled=name in (COMPILED, HALF),
            activation_budget=0.5 if name == HALF else 1.0,
        )

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def measured(self, sides: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
        """Return the seconds of every side that does not run out of memory, and print them, the others by name."""

        def timed(work: Callable[[], object]) -> Callable[[], None]:
            def run() -> None:
                work()
                self.wait()

            return run

        able = {}
        for name, work in sides.items():
            if self.is_able(name, work):
                able[name] = timed(work)
        seconds = interleaved(able, rounds) if able else {}
        for name, values in seconds.items():
            print(f"{name}: {spread(values)} s", flush=True)
        return seconds

    def is_able(self, name: str, work: Callable[[], object]) -> bool:
        """Run a side once; False, and said, if it runs out of memory, all of which is free again."""
        try:
            work()
            self.wait()
        except torch.OutOfMemoryError as error:
            print(f"{name}: out of memory, left out: {str(error).splitlines()[0]}", flush=True)
        else:
            return True
        for parameter in self.draft.parameters():
            parameter.grad = None
        self.free()
        return False

    def free(self) -> None:
        """Give back what nothing holds."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def step(self, module: DFlashTrainerModule) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16):
            metrics = self.row.step(module)
        metrics.loss.backward()
        nn.utils.clip_grad_norm_(self.draft.parameters(), 1.0)
        self.optimize()
        return metrics.valid_tokens

    def optimize(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def parts(self, slots: int) -> dict[str, Callable[[], object]]:
        """Return the parts of a step that are worth knowing alone."""
        config, row = self.config, self.row
        keep = torch.ones_like(row.anchors, dtype=torch.bool)
        blocks = Blocks(row.anchors, keep, row.document_ids, row.input_ids.shape[1], config.block_size)
        rule = AttentionRule()

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, device=self.device, dtype=torch.bfloat16, requires_grad=True)

        num_keys = blocks.seq_len + blocks.num_queries
        q = normal(1, config.num_attention_heads, blocks.num_queries, config.head_dim)
        k, v = (normal(1, config.num_key_value_heads, num_keys, config.head_dim) for _ in range(2))
        hidden = normal(slots, config.hidden_size)
        labels = torch.randint(config.vocab_size, (slots,), device=self.device)
        above = torch.randn_like(q)
        masks = {"flex_attention": flex_mask(blocks, rule), "sdpa": tiled_mask(blocks, rule)}

        def attention(backend: str, tiles: str = "default") -> Callable[[], object]:
            if backend == "flex_attention" and self.device.type == "cpu":  # it has no backward there
                return lambda: attend(q.detach(), k.detach(), v.detach(), masks[backend], backend)

            def both_ways() -> object:
                choose_flex_tiles(tiles)
                try:
                    return torch.autograd.grad(attend(q, k, v, masks[backend], backend), (q, k, v), above)
                finally:
                    choose_flex_tiles("default")

            return both_ways

        return {
            MASK: lambda: flex_mask(blocks, rule),
            FLEX_ALONE: attention("flex_attention"),
            FLEX_NARROW: attention("flex_attention", "narrow"),
            SDPA_ALONE: attention("sdpa"),
            HEAD_ALONE: lambda: head_cross_entropy(hidden, labels, self.head, compiled=True),
        }

    def matmuls(self) -> dict[str, tuple[Callable[[], object], float]]:
        """Return the two matmuls that make up most of a step, with their operations."""
        config = self.config
        shapes = {
            MLP: (self.row.anchors.shape[1] * config.block_size, config.hidden_size, config.intermediate_size),
            HEAD: (1024 if self.device.type == "cuda" else 128, config.hidden_size, config.vocab_size),
        }
        found = {}
        for name, (rows, inner, columns) in shapes.items():
            a = torch.randn(rows, inner, device=self.device, dtype=torch.bfloat16)
            b = torch.randn(columns, inner, device=self.device, dtype=torch.bfloat16)
            out = torch.empty(rows, columns, device=self.device, dtype=torch.bfloat16)
            found[name] = partial(ten_products, a, b, out), 20.0 * rows * inner * columns
        return found

    def copy(self) -> tuple[Callable[[], object], float]:
        """Return a large copy and the bytes it moves."""
        source = torch.empty(2**31 if self.device.type == "cuda" else 2**22, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        return lambda: target.copy_(source), 2.0 * source.numel()

    def peak(self, module: DFlashTrainerModule) -> str:
        """Return what one step allocates at its peak."""
        if self.device.type == "cpu":
            return "not measured on a CPU"
        self.wait()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        self.step(module)
        self.wait()
        whole = torch.cuda.max_memory_allocated()
        return (
            f"{whole / 2**30:.1f} GiB, {(whole - before) / 2**30:.1f} GiB of it beyond weights, optimizer and the row"
        )


def say(text: str) -> None:
    print(text, flush=True)


def measure_steps(bench: Bench, names: Sequence[str], rounds: int) -> tuple[int, dict[str, list[float]]]:
    """Time whole steps; returns the slots projected in one, 0 if none fits, and the seconds of each way that fits."""
    able, slots, row = {}, 0, bench.row
    for name in names:
        module, found = bench.module(name), []

        def first(module: DFlashTrainerModule = module, found: list[int] = found) -> None:
            found.append(int(bench.step(module)))

        if bench.is_able(name, first):
            able[name], slots = module, found[0]
    if not able:
        return 0, {}
    say(
        f"row: {row.input_ids.shape[1]:,} tokens in {int(row.document_ids.max()) + 1} documents, "
        f"{row.anchors.shape[1]:,} anchors, blocks of {bench.config.block_size}, {slots:,} slots projected"
    )
    flops = step_flops(bench.config, row, slots)
    counted = ", ".join(f"{name} {value / 1e12:.3g}" for name, value in flops.items())
    say(f"counted: {sum(flops.values()) / 1e12:.4g} TFLOP a step: {counted}")
    seconds = bench.measured({name: partial(bench.step, module) for name, module in able.items()}, rounds)
    for name, module in able.items():
        took = median(seconds[name])
        say(
            f"{name}: {sum(flops.values()) / took / 1e12:.3g} TFLOP/s, {row.input_ids.shape[1] / took:,.0f} tokens/s, "
            f"peak {bench.peak(module)}"
        )
    compare(seconds, {"compiled over not": (COMPILED, PLAIN), "flex over sdpa in tiles": (PLAIN, SDPA)})
    return slots, seconds


def compare(seconds: Mapping[str, list[float]], pairs: Mapping[str, tuple[str, str]]) -> None:
    """Print how many times faster one side is than another, of those pairs that were both measured."""
    for what, (side, other) in pairs.items():
        if side in seconds and other in seconds:
            say(f"{what}: {median_ratio(seconds, side, other):.2f}")


def measure_floor(bench: Bench, slots: int, rounds: int, best: float | None) -> None:
    """Time the two matmuls and a copy, and print what a step would take if it did nothing else."""
    matmuls, (copy, copied) = bench.matmuls(), bench.copy()
    sides: dict[str, Callable[[], object]] = {name: work for name, (work, _) in matmuls.items()}
    seconds = bench.measured(sides | {"copy": copy}, rounds)
    if seconds.keys() != {*matmuls, "copy"}:
        return
    rates = {name: count / median(seconds[name]) for name, (_, count) in matmuls.items()}
    bandwidth, flops = copied / median(seconds["copy"]), step_flops(bench.config, bench.row, slots)
    measured = ", ".join(f"{name} {rate / 1e12:.3g}" for name, rate in rates.items())
    say(f"TFLOP/s of the {measured}; copies {bandwidth / 1e9:,.3g} GB/s")
    # AdamW reads weight, gradient and two moments and writes all but the gradient; clipping reads the gradients twice
    # and writes them; autocast reads the weights and writes them in bfloat16, and casts their gradients back.
    parameters = sum(p.numel() for p in bench.draft.parameters())
    moving = parameters * (7 * 4 + 3 * 4 + 6 + 6) / bandwidth
    products = (flops["linear layers"] + flops["attention"]) / rates[MLP] + flops["head"] / rates[HEAD]
    floor, total = products + moving, sum(flops.values())
    say(
        f"floor: {products:.3g} s of matmuls at those rates and {moving:.3g} s to move weights, gradients and moments: "
        f"{floor:.3g} s, {total / floor / 1e12:.3g} TFLOP/s"
    )
    if best is not None:
        say(f"the compiled step takes {best / floor:.2f} times that")
        if bench.device.type == "cuda":
            reached = total / best / 1e12
            verdict = "reached" if reached >= TARGET else "missed"
            say(f"target on an H100: {TARGET:.0f} TFLOP/s, {verdict}: {reached:.0f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--tiny", action="store_true", help="a tiny shape on the CPU, to see that the script runs")
    given = parser.parse_args()
    if not given.tiny and not torch.cuda.is_available():
        raise SystemExit("No CUDA device is visible to torch. Run this on a GPU, or with --tiny to see that it runs.")
    bench = Bench(given.tiny)
    where = machine() if given.tiny else f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    parameters = sum(p.numel() for p in bench.draft.parameters())
    print(f"{where}, torch {torch.__version__}, bfloat16 autocast, float32 masters, {parameters:,} parameters")
    slots, seconds = measure_steps(bench, (COMPILED, PLAIN, SDPA), given.rounds)
    torch._dynamo.reset()  # or what was compiled for all activations would be run with half of them
    fewer, _ = measure_steps(bench, (HALF,), given.rounds)
    if not (slots := slots or fewer):
        raise SystemExit("No way of computing a step fits this device.")
    best = median(seconds[COMPILED]) if COMPILED in seconds else None
    bench.free()
    try:
        alone = bench.measured(bench.parts(slots), given.rounds)
        pairs = {
            "flex over sdpa in tiles": (FLEX_ALONE, SDPA_ALONE),
            "narrow over default tiles": (FLEX_NARROW, FLEX_ALONE),
        }
        compare(alone, {f"attention alone, {what}": pair for what, pair in pairs.items()})
        bench.free()
        measure_floor(bench, slots, given.rounds, best)
    except torch.OutOfMemoryError as error:  # of what the parts are made from
        raise SystemExit(f"out of memory: {str(error).splitlines()[0]}") from error


if __name__ == "__main__":
    main()
