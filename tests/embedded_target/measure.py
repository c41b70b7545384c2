"""Measures how often the target's greedy answers to held-out prompts are well formed and right.

    python -m embedded_target.measure --target DIR --num N --seed S [--card]

`--card` also writes the table into the folder's README.md, the model card.
"""

import argparse
import json
import tempfile
from collections import defaultdict
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from embedded_target.card import CARD, recipe_text
from embedded_target.conversations import Conversation, Message, check, generate
from embedded_target.train_target import encode
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from dflash_offline.pipeline.demo import TARGET
from dflash_offline.schemas.settings.regenerate import RegenerateConfig
from dflash_offline.stages.regenerate import regenerate

MAX_NEW_TOKENS = 256


@dataclass(kw_only=True)
class Tally:
    """Counts over the answers of a kind."""

    answers: int = 0
    well_formed: int = 0
    correct: int = 0
    tokens: int = 0
    nll: float = 0.0

    def row(self, kind: str) -> str:
        """Return a row of the table."""
        shares = f"{self.well_formed / self.answers:.1%} | {self.correct / self.answers:.1%}"
        return (
            f"| {kind} | {self.answers} | {shares} | {self.tokens / self.answers:.0f} | {self.nll / self.tokens:.3f} |"
        )


def answer(target: Path, conversations: list[Conversation]) -> list[list[Message] | None]:
    """Return the conversations' messages with the target's greedy answers; None where one of them does not end."""
    with tempfile.TemporaryDirectory() as name:
        asked, answered = Path(name) / "references.jsonl", Path(name) / "answers.jsonl"
        asked.write_text("".join(json.dumps(one.record()) + "\n" for one in conversations))
        settings = {"data": (asked,), "out": answered, "target": str(target), "device": "cpu"}
        regenerate(RegenerateConfig(**settings, max_new_tokens=MAX_NEW_TOKENS))
        rows = [json.loads(line) for line in answered.read_text().splitlines()]
    by_line = {int(row["source"].rpartition(":")[2]): row["messages"] for row in rows}
    return [by_line.get(line) for line, _ in enumerate(conversations, 1)]


def load(folder: Path) -> tuple[Any, Any]:
    """Return the target in float32 and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)


@torch.inference_mode()
def likelihood(model: Any, tokenizer: Any, messages: list[Message]) -> list[float]:
    """Return the negative log-likelihood of each token of the answers, ends of turn included, in nats."""
    ids, said = encode(tokenizer, tuple(messages))
    logits_SV = model(input_ids=torch.tensor([ids])).logits[0, :-1]
    losses: list[float] = cross_entropy(logits_SV, torch.tensor(ids[1:]), reduction="none").tolist()
    return [loss for loss, mine in zip(losses, said[1:], strict=True) if mine]


def tally(target: Path, conversations: list[Conversation]) -> dict[str, Tally]:
    """Return the counts by kind, and over all kinds under "all".

    Where an answer does not end, no answer of its conversation is well formed or right, nor are its tokens counted.
    """
    counts: defaultdict[str, Tally] = defaultdict(Tally)
    model, tokenizer = load(target)
    for one, messages in zip(conversations, answer(target, conversations), strict=True):
        losses = [] if messages is None else likelihood(model, tokenizer, messages)
        answers = [i for i, message in enumerate(one.messages) if message["role"] == "assistant"]
        checked = [(False, False) if messages is None else check(one, i, messages[i]["content"]) for i in answers]
        for count in (counts[one.kind], counts["all"]):
            count.tokens += len(losses)
            count.nll += sum(losses)
            count.answers += len(checked)
            count.well_formed += sum(good for good, _ in checked)
            count.correct += sum(right for _, right in checked)
    return dict(counts)


def table(counts: dict[str, Tally]) -> str:
    """Return the counts as a markdown table, all kinds together last."""
    head = ["| kind | answers | well formed | right | tokens an answer | NLL a token |", "| --- |" + " ---: |" * 5]
    return "\n".join([*head, *(counts[kind].row(kind) for kind in sorted(counts, key=lambda k: (k == "all", k)))])


def main() -> None:
    """Read the command line, measure, print the table, write the card."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=Path, default=TARGET)
    parser.add_argument("--num", type=int, default=700, help="held-out conversations")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--card", action="store_true", help="write the model card into the target folder")
    args = parser.parse_args()
    counts = tally(args.target, list(islice(generate("heldout", args.seed), args.num)))
    print(table(counts))
    if args.card:
        recipe = json.loads((args.target / "recipe.json").read_text())
        measured = {"table": table(counts), "num": args.num, "measure_seed": args.seed}
        text = CARD.substitute(recipe, **recipe_text(recipe), **measured)
        (args.target / "README.md").write_text(text)


if __name__ == "__main__":
    main()
