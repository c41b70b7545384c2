"""Seeded conversations with reference answers, split by what they say into training and held-out ones.

    python -m embedded_target.conversations --out FILE --num N --split train --seed S

writes the first N of them, one JSON object a line: {"messages": [...], "kind": ...}.
"""

import argparse
import hashlib
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

from embedded_target.arithmetic_kinds import ARITHMETIC
from embedded_target.copying_kinds import COPYING
from embedded_target.kind import Draft, Kind
from embedded_target.writing_kinds import WRITING

Message = dict[str, str]
Split = Literal["train", "heldout"]

KINDS: dict[str, Kind] = {**ARITHMETIC, **COPYING, **WRITING}
HELD_OUT_OF = 20
"""One in this many contents is held out."""
SYSTEM = (
    "You are a helpful assistant.",
    "You answer briefly and exactly.",
    "You are a small model and do your best.",
)
SYSTEM_SHARE = 0.2


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """A drawn conversation whose assistant turns are the reference answers."""

    kind: str
    messages: tuple[Message, ...]
    required: tuple[str, ...]
    """What the answer of a free kind has to mention; empty for the kinds that have one right answer."""

    def record(self) -> dict[str, object]:
        """Return what one line of a conversations file holds."""
        return {"messages": list(self.messages), "kind": self.kind}


def split_of(kind: str, draft: Draft) -> Split:
    """Return the split of a draft: a hash of its content, so that wording and system message do not matter."""
    digest = hashlib.sha256(repr((kind, draft.content)).encode()).digest()
    return "heldout" if int.from_bytes(digest[:4], "big") % HELD_OUT_OF == 0 else "train"


def generate(split: Split, seed: int) -> Iterator[Conversation]:
    """Yield the endless conversations of a split, all kinds equally often; the same seed yields the same ones."""
    rng = random.Random(f"{split} {seed}")
    names = tuple(KINDS)
    while True:
        kind = rng.choice(names)
        draft = KINDS[kind].draw(rng)
        while split_of(kind, draft) != split:
            draft = KINDS[kind].draw(rng)
        messages: list[Message] = []
        if rng.random() < SYSTEM_SHARE:
            messages.append({"role": "system", "content": rng.choice(SYSTEM)})
        for said, answer in draft.turns:
            messages += [{"role": "user", "content": said}, {"role": "assistant", "content": answer}]
        yield Conversation(kind=kind, messages=tuple(messages), required=draft.required)


def check(conversation: Conversation, index: int, answer: str) -> tuple[bool, bool]:
    """Return whether an answer in place of message `index` is well formed, and whether it is right.

    Right means equal to the reference, or, for the kinds that have no single right answer, well formed and
    mentioning everything that the prompt asks for.
    """
    well_formed = KINDS[conversation.kind].well_formed(answer)
    if conversation.required:
        return well_formed, well_formed and all(part in answer for part in conversation.required)
    return well_formed, answer == conversation.messages[index]["content"]


def main() -> None:
    """Read the command line and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--num", type=int, required=True, help="conversations to write")
    parser.add_argument("--split", choices=("train", "heldout"), default="train")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    drawn = islice(generate(args.split, args.seed), args.num)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text("".join(json.dumps(one.record()) + "\n" for one in drawn))


if __name__ == "__main__":
    main()
