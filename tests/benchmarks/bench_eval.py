"""How fast a draft decodes: against z-lab's client on the same prompts, and against the target alone.

Four sides decode the same held-out prompts in turn, each with one thread and with two: our rounds, the reference client
(a process of its own, told when to start), our cached plain loop, and transformers' `generate`. Whole calls are timed,
prompts included. Run by `make bench-eval`, on the draft that `make demo` leaves.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from sides import interleaved, machine, median_ratio, spread
from transformers import GenerationConfig

from dflash_offline.pipeline.demo import PROMPTS, TARGET
from dflash_offline.stages.conversations.prompts import encode_prompt, read_prompts
from dflash_offline.stages.draft.decode import plain_decode, speculative_decode
from dflash_offline.stages.draft.weights import load_draft
from dflash_offline.stages.evaluate import stop_ids
from dflash_offline.stages.target.files import open_target
from dflash_offline.stages.target.model import load_model

CLIENT = Path(__file__).parent.parent / "clients" / "zlab_timed.py"
LIMIT = 256
THREADS = (1, 2)


class Client:
    """The reference client, loaded once in a process of its own."""

    def __init__(self, draft: Path) -> None:
        command = [sys.executable, str(CLIENT), str(draft), str(TARGET)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def decode(self, **job: object) -> list[list[int]]:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise SystemExit("z-lab's client ended; its message stands above.")
        return json.loads(answer)["tokens"]

    def close(self) -> None:
        self._process.communicate()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draft", type=Path, default=Path("demo/draft"))
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    if "DFLASH_ZLAB" not in os.environ or not (given.draft / "config.json").is_file():
        raise SystemExit(f"This needs DFLASH_ZLAB and a draft in {given.draft}. Run it by `make bench-eval`.")
    files = open_target(str(TARGET))
    target = load_model(files, dtype=torch.float32, device=torch.device("cpu"))
    draft = load_draft(given.draft)
    every = read_prompts(PROMPTS)
    chosen = every[:: len(every) // given.prompts][: given.prompts]
    prompts = [encode_prompt(prompt, files.tokenizer, {}) for prompt in chosen]
    stops = sorted(stop_ids(target, files.tokenizer))
    target.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=LIMIT, eos_token_id=stops, pad_token_id=0
    )
    client = Client(given.draft)

    def ours() -> list[list[int]]:
        return [speculative_decode(target, draft, ids, LIMIT, stops).tokens for ids in prompts]

    def plain() -> list[list[int]]:
        return [plain_decode(target, ids, LIMIT, stops).tokens for ids in prompts]

    def generate() -> list[list[int]]:
        rows = [torch.tensor([ids]) for ids in prompts]
        answers = [target.generate(row, attention_mask=torch.ones_like(row)) for row in rows]
        return [answer[0, row.shape[1] :].tolist() for row, answer in zip(rows, answers, strict=True)]

    def theirs(threads: int) -> list[list[int]]:
        return client.decode(prompts=prompts, max_new_tokens=LIMIT, stop_ids=stops, threads=threads)

    def with_threads(decode: Callable[[], list[list[int]]], threads: int) -> Callable[[], None]:
        def run() -> None:
            torch.set_num_threads(threads)
            if decode() != expected:
                raise SystemExit("A side gave other tokens than the target alone.")

        return run

    expected = plain()
    tokens = sum(map(len, expected))
    sides: dict[str, Callable[[], object]] = {}
    for n in THREADS:
        sides[f"with the draft, {n} threads"] = with_threads(ours, n)
        sides[f"z-lab's client, {n} threads"] = with_threads(lambda n=n: theirs(n), n)
        sides[f"plain loop, {n} threads"] = with_threads(plain, n)
        sides[f"generate, {n} threads"] = with_threads(generate, n)
    print(f"{machine()}, torch {torch.__version__}, float32")
    print(f"{len(prompts)} prompts, {tokens} tokens, {given.rounds} rounds")
    seconds = interleaved(sides, given.rounds)
    client.close()
    for name, values in seconds.items():
        print(f"  {name:<24} {spread([tokens / s for s in values])} tokens/s")

    def best(name: str) -> str:
        return min((side for side in sides if side.startswith(name)), key=lambda side: statistics.median(seconds[side]))

    draft_side, client_side = best("with the draft"), best("z-lab's client")
    alone = min((best("plain loop"), best("generate")), key=lambda side: statistics.median(seconds[side]))
    print(f"{draft_side} against {client_side}: {median_ratio(seconds, draft_side, client_side):.2f} times as fast")
    print(f"{draft_side} against {alone}: {median_ratio(seconds, draft_side, alone):.2f} times as fast")


if __name__ == "__main__":
    main()
