"""Planning beside the bare tokenizer's batch encoding of the same text, and memory at ten times the rows; exits 1 if a
bound fails.

Two cores. The two sides take turns, each in a process of its own; figures are medians of the rounds' own ratios.
The text is real: the package's own conversations, and the functions of installed Python sources, each asked for by its
documentation. The larger tokenizer is a byte-level BPE of 32,000 tokens, trained here on such sources.
"""

import argparse
import ast
import json
import os
import random
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sides import machine, spread

SHARE = 0.6
"""Of the bare tokenizer's tokens a second that planning must reach."""
ROW_BYTES = {"plan": 64, "plan without duplicates": 256}
ROUNDS = 5
CORES = 2
BARE_BATCH = 256
"""Texts: of 16 to 4,000 the fastest for the bare tokenizer, whose batches without offsets are faster than those with,
and than transformers' own call."""
VOCABULARY = 32_000
TURNS = (1, 1, 1, 2, 2, 3, 4)
EMBEDDED = Path(__file__).parents[2] / "pipeline" / "embedded"
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role + '\n' }}{% if m.role == 'assistant' %}GENERATION{{ m.content }}"
    "<|im_end|>END{{ '\n' }}{% else %}{{ m.content }}<|im_end|>{{ '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant{{ '\n' }}{% endif %}"
)
TEMPLATES = {
    "without tags": TEMPLATE.replace("GENERATION", "").replace("END", ""),
    "with tags": TEMPLATE.replace("GENERATION", "{% generation %}").replace("END", "{% endgeneration %}"),
}


def sources() -> Iterator[Path]:
    """Yield the installed Python sources, the standard library's first."""
    library, packages = Path(sysconfig.get_path("stdlib")), Path(sysconfig.get_path("purelib"))
    yield from sorted(path for path in library.rglob("*.py") if "site-packages" not in path.parts)
    yield from sorted(packages.rglob("*.py"))


def conversations(path: Path, num_rows: int) -> None:
    """Write conversations of one to four turns: a function's documentation, and its text as the answer. There are
    fewer than `num_rows` where the installed sources give no more."""
    chance = random.Random(0)
    rows = 0
    with path.open("w") as file:
        for source in sources():
            turns = list(_functions(source))
            while turns:
                taken, turns = turns[: (count := chance.choice(TURNS))], turns[count:]
                messages = [message for turn in taken for message in turn]
                file.write(json.dumps({"messages": messages}) + "\n")
                rows += 1
                if rows == num_rows:
                    return


def _functions(source: Path) -> Iterator[list[dict[str, str]]]:
    try:
        text = source.read_text()
        tree = ast.parse(text)
    except (ValueError, SyntaxError, RecursionError):
        return
    lines = text.splitlines(keepends=True)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            answer = "".join(lines[node.lineno - 1 : node.end_lineno])
            asked = f"In {source.name}, write {node.name}. {ast.get_docstring(node) or ''}"
            if 100 < len(answer) < 6000 and "<|im_" not in answer + asked:
                yield [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]


def save_target(folder: Path, template: str, trained: Path) -> Path:
    """Save the larger tokenizer with a template, as the files of a model without weights."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_file(str(trained)), eos_token="<|im_end|>")
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    config = {"model_type": "qwen3", "vocab_size": VOCABULARY, "eos_token_id": tokenizer.eos_token_id}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def train_tokenizer(path: Path, texts: list[str]) -> None:
    """Train a byte-level BPE of the shape that today's models have."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    letters = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    others = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    split = pre_tokenizers.Split(Regex(f"{letters}|{others}"), "isolated")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(path))


def run_plan(target: str, data: str, *, drop_duplicates: bool = False) -> None:
    """Plan the data in this process and those that it starts; prints tokens, seconds, samples and peak memory."""
    from dflash_offline.schemas.settings.extract import ExtractConfig
    from dflash_offline.stages.conversations.loss_mask import ConversationEncoder
    from dflash_offline.stages.conversations.plan import make_plan
    from dflash_offline.stages.conversations.sources import Data
    from dflash_offline.stages.target.files import open_target

    settings = {"block_size": 2, "max_length": 1 << 20, "drop_duplicates": drop_duplicates}  # every row is a sample
    config = ExtractConfig(data=(Path(data),), target=target, out=Path("none"), **settings)
    encoder = ConversationEncoder(open_target(target), config)
    peak = Peak()
    with tempfile.TemporaryDirectory(dir=Path(data).parent) as folder, peak:
        began = time.perf_counter()
        plan = make_plan(config, Data(config), encoder, 40_960, Path(folder), lambda _rows: None)
        seconds = time.perf_counter() - began
    print(json.dumps({**plan.counts(), "seconds": seconds, "peak_bytes": peak.num_bytes}))


def run_bare(target: str, data: str) -> None:
    """Encode the same text, rendered before, in the tokenizer's own batches on all its threads."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(target)
    with Path(data).open() as file:
        texts = [tokenizer.apply_chat_template(json.loads(line)["messages"], tokenize=False) for line in file]
    began = time.perf_counter()
    num_tokens = 0
    for begin in range(0, len(texts), BARE_BATCH):
        batch = texts[begin : begin + BARE_BATCH]
        encoded = tokenizer.backend_tokenizer.encode_batch_fast(batch, add_special_tokens=False)
        num_tokens += sum(map(len, encoded))
    print(json.dumps({"tokens": num_tokens, "seconds": time.perf_counter() - began}))


class Peak:
    """Measures the most memory that this process and its children hold together while the context lasts: pages of
    their own, without what is mapped from files, looked at every few milliseconds in /proc."""

    def __init__(self) -> None:
        self.num_bytes = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *raised: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.01):
            held = [_own_bytes(pid) for pid in (os.getpid(), *_children())]
            self.num_bytes = max(self.num_bytes, sum(held))


def _children() -> list[int]:
    found = [int(pid) for task in Path("/proc/self/task").iterdir() for pid in _words(task / "children")]
    # One that has not begun its own program still has this one's memory, and its name.
    return [pid for pid in found if _words(Path(f"/proc/{pid}/cmdline")) != _words(Path("/proc/self/cmdline"))]


def _words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:  # it has ended meanwhile
        return []


def _own_bytes(pid: int) -> int:
    words = _words(Path(f"/proc/{pid}/status"))
    return int(words[words.index("RssAnon:") + 1]) << 10 if "RssAnon:" in words else 0


def measured(side: str, *arguments: object) -> dict[str, Any]:
    """Run one side in a process of its own on two cores; returns what it prints."""
    command = ["taskset", "-c", _cores(), sys.executable, __file__, "--side", side, *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def _cores() -> str:
    return ",".join(map(str, sorted(os.sched_getaffinity(0))[:CORES]))


def rates(name: str, target: Path, data: Path, rounds: int) -> bool:
    """Print planning's share of the bare tokenizer's rate; returns whether it is enough."""
    plans, bares = [], []
    for turn in range(rounds):
        for side in ("plan", "bare") if turn % 2 else ("bare", "plan"):
            found = measured(side, target, data)
            (plans if side == "plan" else bares).append(found)
    assert {found["tokens"] for found in plans} == {found["tokens"] for found in bares}
    share = statistics.median(b["seconds"] / p["seconds"] for p, b in zip(plans, bares, strict=True))
    tokens, samples = plans[0]["tokens"], plans[0]["samples"]
    print(f"{name}: {samples:,} samples, {tokens:,} tokens, {tokens / samples:.0f} a sample")
    for side, found in (("planning", plans), ("bare", bares)):
        print(f"  {side:<9} {spread([tokens / one['seconds'] / 1e6 for one in found])} million tokens/s")
    seconds = statistics.median(found["seconds"] for found in plans)
    print(f"  share {share:.2f}, to be at least {SHARE}; a million such rows in {seconds / samples * 1e6 / 60:.1f} min")
    return share >= SHARE


def memory(target: Path, folder: Path, num_rows: int) -> bool:
    """Print what ten times the rows take in memory; returns whether it is little enough."""
    bounds = []
    for side, most in ROW_BYTES.items():
        peaks = []
        for count in (num_rows, 10 * num_rows):
            data = folder / f"{count}.jsonl"
            if not data.exists():
                _numbered(data, count)
            peaks.append(measured(side, target, data)["peak_bytes"])
        a_row = (peaks[1] - peaks[0]) / (9 * num_rows)
        bounds.append(a_row <= most)
        first, last = (f"{peak / 2**20:.0f} MiB" for peak in peaks)
        print(
            f"{side}: {first} at {num_rows:,} rows, {last} at {10 * num_rows:,}: {a_row:.0f} bytes a row, to be at "
            f"most {most}"
        )
    return all(bounds)


def _numbered(path: Path, num_rows: int) -> None:
    """Write the package's conversations over and over, each with a number, so that no two are the same."""
    lines = (EMBEDDED / "conversations.jsonl").read_text().splitlines()
    rows = [json.loads(line)["messages"] for line in lines]
    with path.open("w") as file:
        for number in range(num_rows):
            question, *rest = rows[number % len(rows)]
            question = {**question, "content": f"{number}: {question['content']}"}
            file.write(json.dumps({"messages": [question, *rest]}) + "\n")


def main() -> None:
    """Measure the rates, then the memory."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", nargs=3, metavar=("SIDE", "TARGET", "DATA"), help="what a process of its own runs")
    parser.add_argument("--rows", type=int, default=100_000, help="conversations of the larger tokenizer")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--memory-rows", type=int, default=100_000, help="rows of which ten times as many are planned")
    arguments = parser.parse_args()
    if arguments.side:
        side, target, data = arguments.side
        run_bare(target, data) if side == "bare" else run_plan(target, data, drop_duplicates=side != "plan")
        return
    print(machine(), f"of which {CORES} are used")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        conversations(folder / "chats.jsonl", arguments.rows)
        trained = folder / "tokenizer.json"
        with (folder / "chats.jsonl").open() as file:
            train_tokenizer(trained, [json.loads(line)["messages"][1]["content"] for line in list(file)[::10]])
        enough = []
        for kind, template in TEMPLATES.items():
            target = save_target(folder / kind.replace(" ", "-"), template, trained)
            enough.append(rates(f"32k BPE, {kind}", target, folder / "chats.jsonl", arguments.rounds))
        enough.append(rates("embedded target", EMBEDDED / "target", folder / "chats.jsonl", arguments.rounds))
        _numbered(folder / "short.jsonl", arguments.rows)
        # What every row costs, however short it is, weighs more here: shown, and not held to the bound.
        rates("embedded target, its own short rows", EMBEDDED / "target", folder / "short.jsonl", arguments.rounds)
        enough.append(memory(EMBEDDED / "target", folder, arguments.memory_rows))
    raise SystemExit(not all(enough))


if __name__ == "__main__":
    main()
