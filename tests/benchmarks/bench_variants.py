"""What variants and losses are worth: drafts of each, trained alike on two targets, by several seeds.

Usage: python tests/benchmarks/bench_variants.py --out variants [--seeds 5]

The first target is the embedded one with the demo's conversations, the second is trained here by `second_target`. Each
has caches of its own answers, greedy and drawn at temperature 1, and of the answers that the corpus has; every draft
trains on one of them with the demo's settings, half its batch and equally many steps, but those that start from a
trained base draft, which take a quarter. What is compared is the serving walk over held-out prompts answered by the
target greedily, which is what live decoding gives at temperature 0, and the acceptance length to expect along answers
that it drew at temperature 1. Sides that name no loss take dpace; kl and soft-ce have one gradient, so what lies
between them is rounding. DFlash 2 is also walked by its logits alone, over held-out samples of its cache: the selector
learns from detached values, so that is the draft without it. A run that is there is not made again, so that more seeds
go on where fewer ended. `--table` only prints what is there.
"""

import argparse
import json
import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from embedded_target.conversations import generate  # type: ignore[import-not-found]
from second_target.rows import write
from second_target.train import train as train_second_target
from sides import interleaved, machine, median_ratio
from steps import packed_row, target_ends

from dflash_offline.pipeline.demo import BLOCK_SIZE, CONVERSATIONS, TARGET
from dflash_offline.schemas.run import CHECKPOINTS, METRICS
from dflash_offline.schemas.settings.extract import ExtractConfig
from dflash_offline.schemas.settings.regenerate import RegenerateConfig
from dflash_offline.schemas.settings.train import TrainConfig
from dflash_offline.stages.draft.decode import speculative_decode
from dflash_offline.stages.draft.weights import load_draft
from dflash_offline.stages.evaluation.samples import choose_samples, walk_samples
from dflash_offline.stages.extract import extract
from dflash_offline.stages.progress import Silent
from dflash_offline.stages.regenerate import regenerate
from dflash_offline.stages.store.cache import Cache
from dflash_offline.stages.target.files import open_target
from dflash_offline.stages.target.model import load_model
from dflash_offline.stages.train import train
from dflash_offline.stages.trainer import DFlashTrainerModule
from dflash_offline.stages.training.checkpoint import list_checkpoints
from dflash_offline.stages.training.optimizer import make_optimizers

CPU = torch.device("cpu")
STEPS = {"embedded": 400, "second": 200}
"""Of a draft of each target."""
LAYERS = 2
RANK, TAPS, GROUP = 64, 2, 16
HELD_OUT = 250
ROWS = 2100
PROMPTS = 240
SECOND_STEPS = 1000


@dataclass(frozen=True, kw_only=True)
class Bench:
    """One target's caches and the runs on them."""

    folder: Path
    steps: int

    def cache(self, name: str) -> Path:
        return self.folder / f"cache-{name}"

    @property
    def target(self) -> Path:
        return TARGET if self.folder.name == "embedded" else self.folder / "target"

    def run(self, side: str, seed: int) -> Path:
        return self.folder / f"runs-{self.steps}" / f"{side}-{seed}"

    def settings(self, side: str, seed: int) -> TrainConfig:
        shared: dict[str, Any] = {
            "caches": (self.cache("own"),),
            "out": self.run(side, seed),
            "seed": seed,
            "steps": self.steps,
            "val_every": self.steps,
            "val_samples": HELD_OUT,
            "save_every": self.steps,
            "optimizer": "muon",
            "learning_rate": 6e-3,
            "packing": False,
            "batch_size": 8,
            "num_anchors": 16,
            "loss": "dpace",
            "draft_layers": LAYERS,
        }
        return TrainConfig(**{**shared, **SIDES[side](self, seed)})

    def base_draft(self, seed: int) -> Path:
        """Return the last checkpoint of a base run."""
        return self.run("base", seed) / CHECKPOINTS / f"step-{self.steps:07}"


def embedded_rows(folder: Path) -> None:
    """Write the demo's conversations as their generator wrote them and as the target answers them, and its prompts."""
    for name, num, split, seed in (("written", 3000, "train", 1), ("prompts", PROMPTS, "heldout", 2)):
        rows = (one.record() for one in islice(generate(split, seed), num))
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shutil.copyfile(CONVERSATIONS, folder / "own.jsonl")


def second_rows(folder: Path) -> None:
    """Train the second target, and write rows of a stream that it was not trained on, and prompts."""
    if not (folder / "target/model.safetensors").is_file():
        train_second_target(folder / "target", SECOND_STEPS, 0)
    write(folder / "written.jsonl", ROWS, "train", 1_000_000)
    write(folder / "prompts.jsonl", PROMPTS, "heldout", 1)


CACHES = ("own", "sampled", "written", "greedy", "drawn")
"""Answers: the target's own and the corpus's to train on, the target's to held-out prompts to measure on."""
TARGETS: dict[str, Callable[[Path], None]] = {"embedded": embedded_rows, "second": second_rows}


def prepare(bench: Bench) -> None:
    """Make what is missing of a target's rows, its own answers and its caches."""
    folder = bench.folder
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "prompts.jsonl").is_file():
        TARGETS[folder.name](folder)
    answer(bench, "written", "own", 0)
    answer(bench, "written", "sampled", 1)
    answer(bench, "prompts", "greedy", 0)
    answer(bench, "prompts", "drawn", 1)
    taps = {} if folder.name == "embedded" else {"num_layers": 3}
    for name in CACHES:
        shared: dict[str, Any] = {"block_size": BLOCK_SIZE, "shard_mib": 64, "final": True, **taps}
        data = (folder / f"{name}.jsonl",)
        extract(ExtractConfig(data=data, target=str(bench.target), out=bench.cache(name), **shared), Silent())


def answer(bench: Bench, source: str, name: str, temperature: float) -> None:
    """Let the target answer rows, unless that is done."""
    data, out = (bench.folder / f"{source}.jsonl",), bench.folder / f"{name}.jsonl"
    settings: dict[str, Any] = {"temperature": temperature, "max_new_tokens": 256}
    if not out.is_file():
        regenerate(RegenerateConfig(data=data, target=str(bench.target), out=out, **settings), Silent())


def dflash2(anchors: str = "whole", **changes: Any) -> dict[str, Any]:
    shape = {"selector_rank": RANK, "conv_kernel_size": TAPS, "conv_group_size": GROUP}
    return {"variant": "dflash2", "anchors": anchors, **shape, **changes}


def wide(bench: Bench, seed: int) -> dict[str, Any]:
    """Return a feed-forward so much wider that the base draft has as many parameters as DFlash 2."""
    decoder = Cache.open(bench.cache("own")).manifest.decoder
    hidden = decoder["hidden_size"]
    convolutions = LAYERS * 2 * (2 * TAPS * hidden + 2 * TAPS * (hidden // GROUP) * hidden)
    extra = 2 * decoder["vocab_size"] * RANK + hidden * RANK + convolutions
    return {"draft_intermediate_size": decoder["intermediate_size"] + round(extra / (3 * hidden * LAYERS))}


def from_base(bench: Bench, seed: int) -> dict[str, Any]:
    steps = bench.steps // 4
    return dflash2(init_from=bench.base_draft(seed), steps=steps, val_every=steps, save_every=steps)


def continued(bench: Bench, seed: int) -> dict[str, Any]:
    """Return the base draft, trained for as many further steps as `from_base`: that it gains by them alone."""
    steps = bench.steps // 4
    return {"init_from": bench.base_draft(seed), "steps": steps, "val_every": steps, "save_every": steps}


def trained_on(bench: Bench, seed: int, cache: str, side: str) -> dict[str, Any]:
    """Return a side's settings for other answers than the target's greedy ones."""
    return {**SIDES[side](bench, seed), "caches": (bench.cache(cache),)}


LOSSES = {
    "hard": "dflash",
    **{name: name for name in ("kl", "tv", "lk", "soft-ce")},
    "kl-hard": "kl:0.9,dflash:0.1",
    "kl-dpace": "kl:0.5,dpace:0.5",
    "lk-dpace": "lk:0.5,dpace:0.5",
}
"""Losses that are tried beside dpace, by the names of their sides; dpace in a mixture weighs every loss of it."""


def base(bench: Bench, seed: int, **changes: Any) -> dict[str, Any]:
    return changes


def dspark(bench: Bench, seed: int) -> dict[str, Any]:
    """Return DSpark that drafts as many tokens; its loss is its own."""
    return {"variant": "dspark", "block_size": BLOCK_SIZE - 1, "markov_rank": RANK}


SIDES: dict[str, Callable[[Bench, int], dict[str, Any]]] = {
    "base": base,
    "wide": wide,
    "dflash2": lambda bench, seed: dflash2(),
    "dspark": dspark,
    "continued": continued,
    "from-base": from_base,
    "partial": partial(base, anchors="partial"),
    "partial-kl-dpace": partial(base, anchors="partial", loss=LOSSES["kl-dpace"]),
    "dflash2-partial": lambda bench, seed: dflash2(anchors="partial"),
    **{f"base-{name}": partial(base, loss=loss) for name, loss in LOSSES.items()},
    **{f"dflash2-{name}": lambda bench, seed, loss=loss: dflash2(loss=loss) for name, loss in LOSSES.items()},
    **{
        f"dflash2-partial-{name}": lambda bench, seed, loss=loss: dflash2(anchors="partial", loss=loss)
        for name, loss in LOSSES.items()
    },
    **{
        f"{cache}-{side}": partial(trained_on, cache=cache, side=side)
        for cache in ("sampled", "written")
        for side in ("base", "base-kl-dpace", "dflash2-partial", "dflash2-partial-kl-dpace")
    },
}
"""Settings by which a side's runs differ."""


def some_prompts(cache: Path, num: int, length: int) -> list[list[int]]:
    """Return the first tokens of samples of all lengths."""
    samples = Cache.open(cache).samples
    return [samples.input_ids(i * len(samples) // num)[:length].tolist() for i in range(num)]


def last_validation(run: Path) -> dict[str, Any] | None:
    """Return the last row of metrics with a validation; None if the run is not there."""
    if not (run / METRICS).is_file():
        return None
    rows = [json.loads(line) for line in (run / METRICS).read_text().splitlines()]
    return next((row for row in reversed(rows) if "val_serving_walk" in row), None)


def served(bench: Bench, run: Path) -> dict[str, float]:
    """Return a run's acceptance length on held-out prompts: at temperature 0, and to expect at temperature 1."""
    saved = run / "served.json"
    if not saved.is_file():
        draft, walks = load_draft(list_checkpoints(run)[-1]), {}
        for name in ("greedy", "drawn"):
            (walks[name],) = walk_samples(choose_samples(bench.cache(name), None, None), [draft], Silent())
        produced = [tokens for rounds in walks["greedy"].rounds for tokens in rounds.produced]
        drawn = next(one.pooled for one in walks["drawn"].expected if one.temperature == 1)
        saved.write_text(json.dumps({"greedy": statistics.mean(produced), "drawn": drawn}))
    found: dict[str, float] = json.loads(saved.read_text())
    return found


def finished(config: TrainConfig) -> dict[str, Any] | None:
    """Return the last validation of a run; None if the run has not come to its end."""
    row = last_validation(config.out)
    return row if row is not None and row["step"] == config.steps else None


def do_run(bench: Bench, side: str, seed: int) -> None:
    """Train one draft to its end, unless that is done."""
    config = bench.settings(side, seed)
    if finished(config):
        return
    began = time.process_time()
    trained = train(config, Silent())
    row = finished(config)
    assert row is not None
    seconds = time.process_time() - began
    print(
        f"{time.strftime('%H:%M:%S')} {bench.folder.name} {side} {seed}: {row['val_serving_walk']:.3f} held out, "
        f"{', '.join(f'{name} {length:.3f}' for name, length in served(bench, config.out).items())}, "
        f"{trained.parameters:,} parameters, {seconds:.0f} s of CPU",
        flush=True,
    )


def spread_of(values: list[float]) -> str:
    """Return mean and standard deviation."""
    deviation = f"{statistics.stdev(values):.2f}" if len(values) > 1 else "-"
    return f"{statistics.mean(values):.2f} ({deviation})"


def table(bench: Bench, seeds: int) -> list[str]:
    """Return a line a side: what its runs of the seeds that are there come to."""
    lines = [
        f"{bench.folder.name}, {bench.steps} steps: acceptance length at temperature 0 and expected at 1, on held-out "
        f"prompts; mean (standard deviation of seeds), each"
    ]
    for side in SIDES:
        configs = [bench.settings(side, seed) for seed in range(seeds)]
        done = [(row, served(bench, config.out)) for config in configs if (row := finished(config)) is not None]
        if not done:
            continue
        greedy, drawn = ([lengths[name] for _, lengths in done] for name in ("greedy", "drawn"))
        each = ", ".join(f"{walk:.2f}" for walk in greedy)
        line = f"  {side:<22} {spread_of(greedy):<13}{spread_of(drawn):<13}{each:<32}"
        held_out = [row["val_serving_walk"] for row, _ in done]
        line += f" of its cache {spread_of(held_out)}"
        if "val_serving_walk_without_selector" in done[0][0]:
            plain, oracle = (
                [row[f"val_serving_walk_{path}"] for row, _ in done] for path in ("without_selector", "oracle")
            )
            line += f", by the logits alone {spread_of(plain)}, best of the candidates {spread_of(oracle)}"
        lines.append(line)
    return lines


class Timed:
    """A trained draft of one side: a training step on a row of its shapes, and decoding with it."""

    def __init__(self, bench: Bench, side: str) -> None:
        folder = list_checkpoints(bench.run(side, 0))[-1]
        self.draft, trained = load_draft(folder), load_draft(folder).train()
        config = trained.config
        self.parameters = sum(p.numel() for p in trained.parameters())
        self._row = packed_row(config, (100,) * 8, (16,) * 8, CPU, torch.float32)
        head, embedding = target_ends(config, CPU, torch.float32)
        size = config.block_size
        self._module = DFlashTrainerModule(
            trained, head, embedding, config.mask_token_id, size, "sdpa", loss_type="dpace"
        )
        self._optimizers = make_optimizers(trained, "muon", 1e-6, 0.01)

    def step(self) -> None:
        self._row.step(self._module).loss.backward()
        for optimizer in self._optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


def print_costs(bench: Bench, rounds: int) -> None:
    """Print what a training step and a round of decoding take on each side, timed in turn, and the base's beside it."""
    sides = {side: Timed(bench, side) for side in ("base", "wide", "dflash2") if finished(bench.settings(side, 0))}
    files = open_target(str(bench.target))
    target = load_model(files, dtype=torch.float32, device=CPU)
    prompts = some_prompts(bench.cache("own"), 6, 40)
    num: dict[str, int] = {}

    def decode(side: str) -> None:
        runs = [speculative_decode(target, sides[side].draft, prompt, 64, ()) for prompt in prompts]
        num[side] = sum(len(run.produced) for run in runs)

    steps = interleaved({side: timed.step for side, timed in sides.items()}, rounds)
    decoding = interleaved({side: partial(decode, side) for side in sides}, rounds)
    by_round = {side: [seconds / num[side] for seconds in decoding[side]] for side in sides}
    print(f"{bench.folder.name}: medians of {rounds} rounds, one thread; ratios to the base draft's in the same round")
    for side, timed in sides.items():
        step, each = statistics.median(steps[side]), statistics.median(by_round[side])
        print(
            f"  {side:<13} {timed.parameters:>9,} parameters; a step {1e3 * step:.0f} ms, "
            f"{median_ratio(steps, 'base', side):.2f} times; a round, draft and verification, {1e3 * each:.2f} ms, "
            f"{median_ratio(by_round, 'base', side):.2f} times"
        )


def main() -> None:
    """Read the command line, do the runs that are missing, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("variants"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--targets", nargs="+", choices=tuple(TARGETS), default=list(TARGETS))
    parser.add_argument("--sides", nargs="+", choices=tuple(SIDES), default=list(SIDES))
    parser.add_argument("--steps", type=int, help="of a draft, in place of each target's own number")
    parser.add_argument("--table", action="store_true", help="only print what is there")
    parser.add_argument("--rounds", type=int, default=5, help="of timing; 0 leaves it out")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(machine(), flush=True)
    benches = [Bench(folder=args.out / name, steps=args.steps or STEPS[name]) for name in args.targets]
    for bench in benches if not args.table else ():
        prepare(bench)
    for seed in range(args.seeds) if not args.table else ():
        for bench in benches:
            for side in args.sides:
                do_run(bench, side, seed)
    for bench in benches:
        print("\n".join(table(bench, args.seeds)))
        if args.rounds:
            print_costs(bench, args.rounds)


if __name__ == "__main__":
    main()
