"""Measures how often the target's greedy answers to held-out prompts are well formed and right.

    python -m embedded_target.measure --target DIR --num N --seed S [--card]

`--card` also writes the table into the folder's README.md, the model card.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from embedded_target.answer import Answered, answer, load
from embedded_target.card import CARD, recipe_text
from embedded_target.conversations import check, generate

from dflash_offline.pipeline.demo import TARGET


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


def tally(everything: Iterable[Answered]) -> dict[str, Tally]:
    """Return the counts by kind, and over all kinds under "all". An unfinished answer is neither well formed nor right.

    The turns that follow an unfinished answer are not asked and not counted.
    """
    counts: defaultdict[str, Tally] = defaultdict(Tally)
    for one in everything:
        indices = [i for i, message in enumerate(one.messages) if message["role"] == "assistant"]
        for name in (one.conversation.kind, "all"):
            count = counts[name]
            count.tokens += len(one.nll)
            count.nll += sum(one.nll)
            for i in indices:
                unfinished = one.failure is not None and i == indices[-1]
                good, right = check(one.conversation, i, one.messages[i]["content"])
                count.answers += 1
                count.well_formed += good and not unfinished
                count.correct += right and not unfinished
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
    model, tokenizer = load(args.target)
    counts = tally(answer(model, tokenizer, islice(generate("heldout", args.seed), args.num)))
    print(table(counts))
    if args.card:
        recipe = json.loads((args.target / "recipe.json").read_text())
        measured = {"table": table(counts), "num": args.num, "measure_seed": args.seed}
        text = CARD.substitute(recipe, **recipe_text(recipe), **measured)
        (args.target / "README.md").write_text(text)


if __name__ == "__main__":
    main()
