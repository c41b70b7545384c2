"""`dflash demo`: the whole pipeline on the target that ships with the package, each command printed before it runs."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from dflash_offline.schemas.errors import DflashError, dflash_line
from dflash_offline.schemas.variants.table import RECOMMENDED
from dflash_offline.stages.stop import STOPS, Stopped, handled

_EMBEDDED = Path(__file__).resolve().parent / "embedded"
TARGET = _EMBEDDED / "target"
"""A Hugging Face model folder: Qwen3 architecture, byte-level BPE tokenizer, chat template with generation tags."""
CONVERSATIONS = _EMBEDDED / "conversations.jsonl"
"""Training conversations whose answers are the target's own greedy ones, as `dflash regenerate` made them."""
PROMPTS = _EMBEDDED / "prompts.jsonl"
"""Held-out conversations of the same kinds, none of which is in CONVERSATIONS."""
BLOCK_SIZE = 8


def demo_commands(out: Path) -> list[list[str]]:
    """Return the five commands, without the program's name."""
    cache, run, draft = (str(out / name) for name in ("cache", "run", "draft"))
    target, data, prompts = str(TARGET), str(CONVERSATIONS), str(PROMPTS)
    block = ["--block-size", str(BLOCK_SIZE)]
    extract = ["extract", data, "--target", target, "--out", cache, *block, "--shard-mib", "64"]
    train = ["train", cache, "--out", run, "--steps", "600", "--optimizer", "muon", "--lr", "6e-3"]
    train += ["--no-packing", "--batch-size", "16", "--num-anchors", "16", "--variant", RECOMMENDED.name]
    train += ["--loss", "dpace", "--draft-layers", "2", "--val-samples", "64", "--val-every", "200"]
    # One thread: a target this small decodes slower with two.
    evaluate = ["eval", draft, "--target", target, "--prompts", prompts, "--limit", "200", "--threads", "1"]
    evaluate += ["--prompt-lookup", "--save", str(out / "eval.json")]
    return [extract, ["inspect", cache], train, ["export", run, "--out", draft], evaluate]


def run_demo(out: Path, flags: list[str]) -> None:
    """Run the five commands as a user would, each with the logging options `flags`; print the results."""
    spent: list[tuple[str, float]] = []
    for command in demo_commands(out):
        print(f"\n$ {dflash_line(*command)}", flush=True)
        began = time.perf_counter()
        logged = [] if command[0] == "inspect" else flags
        code = _run([sys.executable, "-m", "dflash_offline.pipeline", *command, *logged])
        spent.append((command[0], time.perf_counter() - began))
        if code - 128 in STOPS:
            raise Stopped(code - 128)
        if code:
            raise DflashError(f"`dflash {command[0]}` ended with exit code {code}; its message stands above.")
    _print_table(json.loads((out / "eval.json").read_text()), spent)
    print(f"\n{out} holds the cache, the run, the draft and eval.json.")
    print(f"Next: {dflash_line('inspect', out / 'cache', '--sample', 0)}")


def _run(command: list[str]) -> int:
    """Return the exit code of a command, which is passed every signal to stop, so that it can save its work.

    Raises `Stopped` after such a signal.
    """
    came: list[int] = []
    waiting: list[int] = []
    process: subprocess.Popen[bytes] | None = None

    def pass_on() -> None:
        while process is not None and waiting:
            process.send_signal(waiting.pop())

    def handle(number: int, _frame: object) -> None:
        came.append(number)
        waiting.append(number)
        pass_on()

    with handled(handle):
        process = subprocess.Popen(command, process_group=0)  # what a terminal sends reaches this process alone
        pass_on()
        code = process.wait()
    if came:
        raise Stopped(came[0])
    return code


def _print_table(result: dict[str, Any], spent: list[tuple[str, float]]) -> None:
    acceptance = result["acceptance"]
    rows = [
        ("held-out prompts", f"{acceptance['prompts']}"),
        ("acceptance length", f"{acceptance['pooled']:.2f} (mean of prompts {acceptance['mean']:.2f})"),
        ("  block size, the most it could be", f"{result['block_size']}"),
        ("tokens per target call, draft", f"{result['tokens_per_call']:.2f}"),
        ("tokens per target call, prompt lookup", f"{result['prompt_lookup_tokens_per_call']:.2f}"),
        ("answers identical to the target's", f"{result['identical']} of {acceptance['prompts']}"),
        ("tokens/s, target alone", f"{result['plain_tokens_per_s']:.0f}"),
        ("tokens/s, with the draft", f"{result['speculative_tokens_per_s']:.0f} ({result['speedup']:.2f} times)"),
        ("target's NLL of its answers", f"{result['nll']:.3f} nats per token"),
        ("seconds", ", ".join(f"{name} {seconds:.0f}" for name, seconds in spent)),
    ]
    print("\nThe draft on the target's own greedy decoding")
    for name, value in rows:
        print(f"  {name:<38} {value}")
