"""What looks wrong in a cache, told from its plan and its records: where, what was found, what to do next.

A mark is a hint for a person, not a refusal: what is certain to be wrong, extraction refuses to store. Axes: S finished
shards with features, L captured layers.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from dflash_offline.schemas.commits import Commit
from dflash_offline.schemas.errors import dflash_line
from dflash_offline.schemas.files import ABANDONED_S
from dflash_offline.schemas.manifest import TARGET, Manifest
from dflash_offline.schemas.samples import SampleTable
from dflash_offline.stages.store.leftovers import told

ZEROS = 0.01
"""Share of exact zeros. A residual stream is a sum; two summands in bfloat16, with 128 values between a number and its
double, cancel exactly about once in 500 times even if they are of one size."""
GROWTH = 1000.0
"""Standard deviation over the middle one of the other layers. Outlier channels of 1,000 times the rest, one in 500, and
first tokens of 3,000 times the rest, one in 200, raise it by 45 and by 200; nothing healthy comes near both in one
layer and in none of the others."""
NEARLY_DEAD = 1e-4
"""The same downwards. bfloat16 keeps eight bits, so that of a sum over layers such a one leaves nothing."""
SHARD_CHANGE = 100.0
"""A layer's standard deviation in one shard over its middle one, either way. Shards differ by how many first tokens
they hold: conversations of 20 tokens where others have 2,000 change it tenfold."""
LARGEST = 1e15
"""Values whose squares, summed over a token, leave float32, in which every RMSNorm computes: 3.4e38."""


@dataclass(frozen=True, kw_only=True)
class Mark:
    """One thing that looks wrong."""

    kind: str
    """Short and countable."""
    where: str
    what: str
    next: str
    """What to do about it."""
    layer_id: int | None = None
    shards: tuple[int, ...] = ()


def layer_marks(
    filled: list[Commit], statistics: NDArray[np.float64], pooled: list[dict[str, Any]], cache: str
) -> list[Mark]:
    """Return what looks wrong with the layers, from the records' statistics [S, L, 4]."""
    if not filled:
        return []
    layer_ids = [row["layer_id"] for row in pooled]
    marks = []
    for column, row in enumerate(pooled):
        others = [other["std"] for other in pooled if other is not row]
        marks += _one_layer(row, float(np.median(others)) if others else None, cache)
        marks += _odd_shards(row, statistics[:, column], filled, cache)
    for first in range(len(layer_ids)):
        for second in range(first + 1, len(layer_ids)):
            if np.array_equal(statistics[:, first], statistics[:, second]):
                marks.append(
                    Mark(
                        kind="layers too alike",
                        where=f"layers {layer_ids[first]} and {layer_ids[second]}",
                        what="have the same mean, deviation and largest value in every shard: one was stored twice",
                        next=f"{dflash_line('verify', cache, '--target', 'MODEL')} says which is which; then extract "
                        "again",
                        layer_id=layer_ids[second],
                    )
                )
    return marks


def _one_layer(row: dict[str, Any], others: float | None, cache: str) -> list[Mark]:
    where = f"layer {row['layer_id']}"
    look = f"{dflash_line('inspect', cache, '--layers', '--features', 8)} names the channels"

    def mark(kind: str, what: str, next_: str) -> list[Mark]:
        return [Mark(kind=kind, where=where, what=what, next=next_, layer_id=row["layer_id"])]

    again = f"{dflash_line('verify', cache, '--target', 'MODEL')} compares it with the target; then extract again"
    if row["std"] == 0 or (others and row["std"] < others * NEARLY_DEAD):
        return mark(
            "dead layer",
            f"carries nothing: standard deviation {row['std']:.3g}"
            + (f", where the middle one of the others is {others:.3g}" if others else ""),
            again,
        )
    if row["max_abs"] > LARGEST:
        return mark("exploding norms", f"reaches {row['max_abs']:.2g}: its square leaves float32", look)
    if others and row["std"] > others * GROWTH:
        return mark(
            "exploding norms",
            f"standard deviation {row['std']:.3g}, {row['std'] / others:,.0f} times the middle one of the others; "
            f"one channel is enough for that",
            look,
        )
    if row["zeros"] > ZEROS:
        return mark("zeros", f"{row['zeros']:.1%} of its values are exactly zero; expected under {ZEROS:.0%}", again)
    return []


def _odd_shards(row: dict[str, Any], statistics: NDArray[np.float64], filled: list[Commit], cache: str) -> list[Mark]:
    """Return what is odd in some shards alone, of one layer's statistics [S, 4]."""
    std, zeros = statistics[:, 1], statistics[:, 3]
    middle = float(np.median(std))
    found = [
        ("dead layer", std < middle / SHARD_CHANGE, f"standard deviation under a hundredth of the usual {middle:.3g}"),
        ("exploding norms", std > middle * SHARD_CHANGE, f"standard deviation over 100 times the usual {middle:.3g}"),
        ("zeros", zeros > ZEROS, f"over {ZEROS:.0%} of the values are exactly zero"),
    ]
    marks = []
    for kind, odd, what in found:
        shards = [filled[i].shard for i in np.flatnonzero(odd).tolist()]
        if shards and len(shards) <= len(filled) // 2:
            marks.append(
                Mark(
                    kind=kind,
                    where=f"layer {row['layer_id']}, {name_shards(shards)}",
                    what=what,
                    next=f"{dflash_line('inspect', cache, '--shard', shards[0])}; to redo it, remove its record in "
                    f"commits/ and repeat the dflash extract",
                    layer_id=row["layer_id"],
                    shards=tuple(shards),
                )
            )
    return marks


def name_shards(shards: list[int]) -> str:
    """Return shards as a message names them: the first few, and how many more."""
    listed = ", ".join(map(str, shards[:4])) + (f" and {len(shards) - 4:,} more" if len(shards) > 4 else "")
    return f"{'shard' if len(shards) == 1 else 'shards'} {listed}"


def half_written_marks(found: dict[str, Any]) -> list[Mark]:
    """Return a mark if workers left files half-written; those at work touch theirs all the time."""
    if found["untouched_s"] < ABANDONED_S:
        return []
    return [
        Mark(
            kind="abandoned files",
            where="tmp/",
            what=f"holds {told(found)}: of workers that died",
            next="repeat the `dflash extract` that made it, which removes what nobody can be at",
        )
    ]


def shard_marks(states: dict[int, str], faults: list[str], cache: str) -> list[Mark]:
    """Return the shards that are not what they should be: damaged, or half-finished."""
    marks = []
    by_state = {state: sorted(s for s, found in states.items() if found == state) for state in set(states.values())}
    if damaged := by_state.get("damaged"):
        marks.append(
            Mark(
                kind="damaged shard",
                where=name_shards(damaged),
                what=faults[0] if faults else "its record cannot be read",
                next=f"{dflash_line('verify', cache, '--repair')}, then the dflash extract that made it: it redoes "
                "just these",
                shards=tuple(damaged),
            )
        )
    for state, what in (
        ("half-finished", "has files but no record, and counts for nothing: its worker was stopped, or is at it now"),
        ("half-written", "was being written when its worker ended, and counts for nothing"),
    ):
        if shards := by_state.get(state):
            marks.append(
                Mark(
                    kind=f"{state} shard",
                    where=name_shards(shards),
                    what=what,
                    next="unless one is at it now, repeat the dflash extract that made it: it redoes what is left",
                    shards=tuple(shards),
                )
            )
    return marks


def plan_marks(samples: SampleTable, block_size: int, cache: str) -> list[Mark]:
    """Return what is wrong with the samples' numbers: nothing supervised, or nothing to anchor a block at."""
    marks: list[Mark] = []
    for column, kind, what in (
        (samples.num_supervised, "all-masked samples", "have no supervised token: they train nothing"),
        (
            samples.num_anchors,
            "samples without anchors",
            f"have no supervised token with {block_size - 1} more after it",
        ),
    ):
        empty = np.flatnonzero(column == 0)
        if len(empty) and not marks:
            marks.append(
                Mark(
                    kind=kind,
                    where=f"{len(empty):,} of {len(samples):,} samples, first {int(empty[0])}",
                    what=what,
                    next=f"{dflash_line('inspect', cache, '--sample', int(empty[0]))}; mend the chat template's "
                    f"generation tags or choose another --mask, and extract anew",
                )
            )
    return marks


def mask_token_marks(token: int, name: str | None, problem: str, use: dict[str, Any]) -> list[Mark]:
    """Return what is wrong with the token that fills the slots to be drafted."""
    found = [problem] if problem else []
    if use["samples"]:
        found.append(f"occurs in {use['samples']:,} of {use['samples_checked']:,} samples, first {use['first_sample']}")
    if not found:
        return []
    return [
        Mark(
            kind="wrong mask token",
            where=f"token {token}" + (f" ({name!r})" if name is not None else ""),
            what=" and ".join(found),
            next="extract anew without --mask-token-id, or with a reserved token that no sample contains",
        )
    ]


def describe_token(cache: Path, manifest: Manifest, token: int) -> tuple[str | None, str]:
    """Return a token's text, None if the tokenizer has none, and why it should not fill a slot, if so."""
    num_rows = manifest.decoder.get("vocab_size", token + 1)
    if token >= num_rows:
        return None, f"is no row of the embedding table of {num_rows}"
    try:
        tokenizer = Tokenizer.from_file(str(cache / TARGET / "tokenizer.json"))
    except Exception:  # the library raises bare Exception; the rest of a cache can be shown without
        return None, ""
    name = tokenizer.id_to_token(token)
    if name is None:
        return None, ""  # a spare row of the embedding table
    if token in manifest.identity["target"].get("end_ids", ()):
        return name, "ends an answer"
    if token not in tokenizer.get_added_tokens_decoder():
        return name, "is an ordinary token, which a prompt may contain"
    return name, ""
