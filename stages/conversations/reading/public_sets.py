"""Public sets of prompts by their names, in the form in which the reference benchmark of DFlash asks them.

Datasets, splits and words are those of z-lab's benchmark, so that acceptance lengths can be set beside published ones:
the two math sets ask for steps and a boxed answer, HumanEval's function stands in a block of code, MBPP and MT-Bench
are asked as they are, and Alpaca's input follows its instruction. MT-Bench has a second turn, which follows the first's
answer. The revisions are the datasets' commits on the hub.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dflash_offline.schemas.errors import BadInputError
from dflash_offline.schemas.files import sha256_file
from dflash_offline.stages.conversations.reading.streams import first_line

_BOXED = "\nPlease reason step by step, and put your final answer within \\boxed{}."
_CODE = "Write a solution to the following problem and make sure that it passes the tests:\n```python\n"


@dataclass(frozen=True, kw_only=True)
class PublicSet:
    """Where a set of prompts is published, and how one of its rows is asked."""

    dataset: str
    """Its id on the hub."""
    split: str
    revision: str
    file: str
    """The split's only file at that revision."""
    turns: Callable[[dict[str, Any]], list[str]]
    """What the user says in each turn."""
    columns: tuple[str, ...]
    """That `turns` reads."""
    config: str | None = None
    kind: str | None = None
    """Column that groups the figures."""


SETS = {
    "gsm8k": PublicSet(
        dataset="openai/gsm8k",
        config="main",
        split="test",
        revision="740312add88f781978c0658806c59bc2815b9866",
        file="main/test-00000-of-00001.parquet",
        columns=("question",),
        turns=lambda row: [row["question"] + _BOXED],
    ),
    "math500": PublicSet(
        dataset="HuggingFaceH4/MATH-500",
        split="test",
        revision="6e4ed1a2a79af7d8630a6b768ec859cb5af4d3be",
        file="test.jsonl",
        columns=("problem",),
        turns=lambda row: [row["problem"] + _BOXED],
        kind="subject",
    ),
    "humaneval": PublicSet(
        dataset="openai/openai_humaneval",
        split="test",
        revision="7dce6050a7d6d172f3cc5c32aa97f52fa1a2e544",
        file="openai_humaneval/test-00000-of-00001.parquet",
        columns=("prompt",),
        turns=lambda row: [f"{_CODE}{row['prompt']}\n```"],
    ),
    "mbpp": PublicSet(
        dataset="google-research-datasets/mbpp",
        config="sanitized",
        split="test",
        revision="4bb6404fdc6cacfda99d4ac4205087b89d32030c",
        file="sanitized/test-00000-of-00001.parquet",
        columns=("prompt",),
        turns=lambda row: [row["prompt"]],
    ),
    "mt-bench": PublicSet(
        dataset="HuggingFaceH4/mt_bench_prompts",
        split="train",
        revision="e3a795c5e9a82ee40611c416b8a7786c73198991",
        file="raw/question.jsonl",
        columns=("prompt",),
        turns=lambda row: list(row["prompt"]),
        kind="category",
    ),
    "alpaca": PublicSet(
        dataset="tatsu-lab/alpaca",
        split="train",
        revision="dce01c9b08f87459cf36a430d809084718273017",
        file="data/train-00000-of-00001-a09b74b3ef9c3b56.parquet",
        columns=("instruction", "input"),
        turns=lambda row: [row["instruction"] + (f"\n\nInput:\n{row['input']}" if row["input"] else "")],
    ),
}


def named_set(path: Path) -> tuple[str, Path | None] | None:
    """Return the set that `NAME` or `NAME:FILE` names, and the local copy; None for what is a file, or names none."""
    name, _, file = str(path).partition(":")
    if name not in SETS or path.exists():
        return None
    return name, Path(file).expanduser() if file else None


def fetched_rows(name: str) -> list[dict[str, Any]]:
    """Return all rows of a set as the `datasets` library fetches them; `BadInputError` says how to do without."""
    one = SETS[name]
    try:
        import datasets
    except ImportError:
        raise BadInputError(
            f"{name} is a public set of prompts, and the datasets package, which fetches it, is not installed. Install "
            f"it by pip install 'dflash-offline[hub]', or {_by_hand(name)}"
        ) from None
    arguments = (one.dataset,) if one.config is None else (one.dataset, one.config)
    try:
        return [dict(row) for row in datasets.load_dataset(*arguments, split=one.split, revision=one.revision)]
    except Exception as error:  # whatever the library and the network provoke
        raise BadInputError(
            f"{name} cannot be fetched from the hub ({one.dataset}): {first_line(error)}. Try again, or "
            f"{_by_hand(name)}"
        ) from error


def _by_hand(name: str) -> str:
    one = SETS[name]
    return (
        f"fetch its file where there is a network:\n  hf download {one.dataset} {one.file} --repo-type dataset "
        f"--revision {one.revision} --local-dir {name}-set\nand name the copy: --prompts {name}:{name}-set/{one.file}"
    )


def chosen_rows(number: int, limit: int | None, seed: int) -> list[int]:
    """Return which of so many rows are asked, in order: all, or `limit` of them, drawn by the seed."""
    order = list(range(number))
    if limit is not None and limit < number:
        random.Random(seed).shuffle(order)
    return order[:limit]


def turns_of(name: str, row: dict[str, Any], place: str) -> tuple[list[str], str | None]:
    """Return what the user says in each turn of a row, and its kind; `BadInputError` if it is no row of the set."""
    one = SETS[name]
    missing = [column for column in one.columns if column not in row]
    turns = [] if missing else one.turns(row)
    if missing or not turns or not all(isinstance(turn, str) and turn for turn in turns):
        what = f"has no {', '.join(missing)} (its columns: {', '.join(row)})" if missing else "holds no text to ask"
        raise BadInputError(
            f"{place} {what}; expected a row of {one.dataset}, {one.split}. Name the file {one.file} of its revision "
            f"{one.revision}."
        )
    kind = row.get(one.kind) if one.kind else None
    return turns, kind if isinstance(kind, str) else None


def describe_set(path: Path) -> dict[str, Any] | None:
    """Return what a result says of where its prompts came from; None of a file that is no public set."""
    if (found := named_set(path)) is None:
        return None
    name, file = found
    one = SETS[name]
    origin = {"revision": one.revision} if file is None else {"file": str(file), "sha256": sha256_file(file)}
    return {"name": name, "dataset": one.dataset, "config": one.config, "split": one.split, **origin}
