"""From rows to samples: what is kept, cut or left out and why, and the place of each sample in the cache.

Memory does not grow with the data but for a few numbers of each sample: tokens and rejects go to files as they come.
"""

import os
from array import array
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from dflash_offline.schemas.errors import BadInputError, DflashError
from dflash_offline.schemas.manifest import REJECTS, SAMPLES
from dflash_offline.schemas.samples import (
    Numbers,
    Reject,
    RejectWriter,
    SampleTable,
    Tokens,
    read_rejects,
    write_samples,
)
from dflash_offline.schemas.settings.extract import ExtractConfig
from dflash_offline.stages.conversations.advice import DUPLICATE, left_out, not_in_text, noted, split_up
from dflash_offline.stages.conversations.files import MOST_NAMED, RawRow, refuse_bad_rows
from dflash_offline.stages.conversations.loss_mask import ConversationEncoder
from dflash_offline.stages.conversations.places import ordered, places, shard_slots
from dflash_offline.stages.conversations.sources import Data
from dflash_offline.stages.conversations.tokenize import (
    BAD_ROW,
    BatchOutcome,
    RowOutcome,
    RowTokenizer,
    SampleOutcome,
    tokenize_rows,
)
from dflash_offline.stages.target.files import TargetFiles

_SPOOLED_IDS, _SPOOLED_MASK = "input_ids.tmp", "loss_mask.tmp"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All samples, where they go, and what did not become a sample."""

    folder: Path
    """Holds samples.parquet and rejects.parquet."""
    samples: SampleTable
    num_shards: int
    shard_tokens: int
    first_uses: NDArray[np.int64]
    """For each row of the target's embedding table the first sample that holds its token; -1 where none does."""
    beyond: tuple[int, int] | None
    """The first sample that holds a token beyond that table, and the token; None if none does."""
    formats: Counter[str]
    """Rows that could be read, by how they were written."""
    reasons: Counter[str]
    """Rows that were drawn and are no sample, by reason."""
    answer_reasons: Counter[str]
    """Answers that are in none of the samples of their conversation, by reason."""
    split: Counter[str]
    """Conversations that became several samples, these samples, and the tokens that they have more than the longest of
    each conversation alone."""
    num_not_drawn: int
    num_truncated: int
    num_supervised_cut: int
    dropped: Counter[str]
    """Samples some part of which the chat template left out of the text, by its kind."""
    notes: Counter[str]
    """Samples of which something else is to be said, by its kind."""

    @property
    def rejects(self) -> list[Reject]:
        """Rows that were drawn and are no sample, and answers that are in none, read from their file."""
        return read_rejects(self.folder / REJECTS)

    def counts(self) -> dict[str, Any]:
        """Return the totals that the manifest keeps."""
        return {
            "formats": dict(sorted(self.formats.items())),
            "not_drawn": self.num_not_drawn,
            "samples": len(self.samples),
            "tokens": int(self.samples.num_tokens.sum()),
            "supervised": int(self.samples.num_supervised.sum()),
            "anchors": int(self.samples.num_anchors.sum()),
            "truncated": self.num_truncated,
            "truncated_supervised": self.num_supervised_cut,
            "rejects": dict(sorted(self.reasons.items())),
            **{name: dict(sorted(counts.items())) for name, counts in self._where_there_are_some().items() if counts},
        }

    def _where_there_are_some(self) -> dict[str, Counter[str]]:
        return {
            "split": self.split,
            "answers_left_out": self.answer_reasons,
            "dropped": self.dropped,
            "notes": self.notes,
        }

    def facts(self) -> list[tuple[str, str]]:
        """Return what became of the rows, a name and a text each; a text that goes on has no name."""
        counts = self.counts()
        samples, tokens = counts["samples"], counts["tokens"]
        rows = [("Data", f"{number:,} rows of {kind}") for kind, number in counts["formats"].items()]
        if counts["not_drawn"]:
            rows.append(("", f"not drawn: {counts['not_drawn']:,} rows, by weight"))
        rows.append(("Samples", f"{samples:,}, {tokens / samples:,.0f} tokens each on average"))
        if counts["truncated"]:
            rows.append(("", f"cut: {counts['truncated']:,}, by {counts['truncated_supervised']:,} supervised tokens"))
        if self.split:
            rows.append(("", f"split: {split_up(self.split, tokens)}"))
        rows += [("", f"left out: {left_out(reason, number)}") for reason, number in counts["rejects"].items()]
        for reason, number in counts.get("answers_left_out", {}).items():
            rows.append(("", f"left out: {left_out(reason, number, 'answers')}"))
        if self.dropped:
            rows.append(("", f"not in the text: {not_in_text(counts['dropped'])}"))
        rows += [("", f"noted: {noted(kind, number)}") for kind, number in counts.get("notes", {}).items()]
        supervised = f"supervised {counts['supervised'] / tokens:.0%}"
        return [*rows, ("Tokens", f"{tokens:,}; {supervised}; {counts['anchors']:,} anchors")]


def make_plan(
    config: ExtractConfig,
    data: Data,
    encoder: ConversationEncoder,
    slot_bytes: int,
    folder: Path,
    progress: Callable[[int], None],
    num_processes: int | None = None,
    *,
    by_length: bool = True,
) -> Plan:
    """Return the plan for all rows of the data, its samples and rejects in files of `folder`; a pure function of data
    and settings, whatever the number of processes that tokenize (None for one a core).

    `slot_bytes` is the size of one token's raw features; `progress` is called with the rows read since the last
    call; `by_length` is false for a plan of an older version, in the order of the rows. Raises `BadInputError` naming
    unusable rows, unless they are to be skipped, and if nothing remains.
    """
    tokenizer = RowTokenizer(config, encoder, data.format.row_format)
    with _Collected(folder, encoder.vocab_size) as collected:
        with closing(tokenize_rows(data.raw_rows(), tokenizer, num_processes)) as tokenized:
            for batch, outcome in tokenized:
                collected.add(batch, outcome)
                progress(len(batch))
        if not config.skip_bad_rows:
            num_bad = collected.reasons[BAD_ROW] + collected.answer_reasons[BAD_ROW]
            refuse_bad_rows(collected.faults, "Mend them, or leave them out with --skip-bad-rows.", num_bad)
        if not collected.num_tokens:
            raise BadInputError(_nothing_left(config, collected.reasons, encoder.mask_rule))
        num_shards, shard_tokens = collected.write(config, slot_bytes, by_length=by_length)
    return Plan(
        folder=folder,
        samples=SampleTable.read(folder / SAMPLES),
        num_shards=num_shards,
        shard_tokens=shard_tokens,
        first_uses=collected.first_uses,
        beyond=collected.beyond,
        formats=collected.formats,
        reasons=collected.reasons,
        answer_reasons=collected.answer_reasons,
        split=collected.split,
        num_not_drawn=data.num_not_drawn,
        num_truncated=collected.num_truncated,
        num_supervised_cut=collected.num_supervised_cut,
        dropped=collected.dropped,
        notes=collected.notes,
    )


def _nothing_left(config: ExtractConfig, reasons: Counter[str], rule: str) -> str:
    listed = "".join(f"\n  {left_out(*one)}" for one in reasons.most_common()) or "\n  no rows"
    return (
        f"No row of {', '.join(map(str, config.data))} gives a sample to train on:{listed}\n"
        f"A sample needs a supervised token with {config.anchor_rule.wanted}, at blocks of {config.block_size}, within "
        f"its first {config.max_length:,} tokens (--max-length); the mask rule was '{rule}'."
    )


class _Collected:
    """What became of the rows so far: numbers in arrays, tokens and rejects in files of a folder, open while used."""

    def __init__(self, folder: Path, vocab_size: int) -> None:
        self.folder = folder
        self.formats: Counter[str] = Counter()
        self.reasons: Counter[str] = Counter()
        self.answer_reasons: Counter[str] = Counter()
        self.split: Counter[str] = Counter()
        self.dropped: Counter[str] = Counter()
        self.notes: Counter[str] = Counter()
        self.faults: list[str] = []
        """Of the first bad rows, with their places."""
        self.num_truncated = 0
        self.num_supervised_cut = 0
        self.first_uses = np.full(vocab_size, -1, np.int64)
        self.beyond: tuple[int, int] | None = None
        self.sources: dict[str, int] = {}
        self.source_index, self.row, self.answer = array("i"), array("q"), array("i")
        self.num_tokens, self.num_supervised, self.num_anchors = array("i"), array("i"), array("i")
        self._seen: set[bytes] = set()
        """Digests of the rows so far, where duplicates are dropped."""
        self._files = ExitStack()

    def __enter__(self) -> "_Collected":
        with ExitStack() as files:
            self._ids = files.enter_context((self.folder / _SPOOLED_IDS).open("x+b"))
            self._mask = files.enter_context((self.folder / _SPOOLED_MASK).open("x+b"))
            self._rejects = files.enter_context(RejectWriter(self.folder / REJECTS))
            self._files = files.pop_all()
        return self

    def __exit__(self, *raised: object) -> None:
        self._files.close()
        for name in (_SPOOLED_IDS, _SPOOLED_MASK):
            (self.folder / name).unlink()

    def add(self, batch: list[RawRow], outcome: BatchOutcome) -> None:
        """Take a batch's samples, and count the rows that are none."""
        first = len(self.num_tokens)
        made = [one for pair in zip(batch, outcome.rows, strict=True) for one in self._add_row(*pair)]
        ids, mask = outcome.ids, outcome.mask
        if len(ids) > sum(self.num_tokens[first:]):  # duplicates, and what has no anchor
            taken = np.repeat([is_kept for is_kept, _ in made], [sample.num_tokens for _, sample in made])
            ids, mask = ids[taken], mask[taken]
        self._ids.write(ids.tobytes())
        self._mask.write(mask.tobytes())
        self._note_uses(first, ids)

    def _add_row(self, row: RawRow, outcome: RowOutcome) -> list[tuple[bool, SampleOutcome]]:
        """Count a row; returns what became of it, and whether that is a sample."""
        if outcome.row_format:
            self.formats[f"{row.source.container}, {outcome.row_format}"] += 1
        if outcome.digest in self._seen:
            self._reject(row, SampleOutcome(reason=DUPLICATE, detail="says exactly what an earlier row says"))
            return [(False, sample) for sample in outcome.samples]
        if outcome.digest:
            self._seen.add(outcome.digest)
        made = [(self._add_sample(row, sample), sample) for sample in outcome.samples]
        lengths = [sample.num_tokens for is_kept, sample in made if is_kept]
        if len(lengths) > 1:
            more = sum(lengths) - max(lengths)
            self.split.update(conversations=1, samples=len(lengths), more_tokens=more)
        return made

    def _add_sample(self, row: RawRow, sample: SampleOutcome) -> bool:
        """Count what is a sample, or is none; returns which."""
        if sample.num_supervised_cut >= 0:
            self.num_truncated += 1
            self.num_supervised_cut += sample.num_supervised_cut
        if sample.reason:
            self._reject(row, sample)
            return False
        self.dropped.update(sample.dropped)
        self.notes.update(sample.notes)
        self.source_index.append(self.sources.setdefault(row.source.name, len(self.sources)))
        self.row.append(row.line)
        self.answer.append(sample.answer)
        self.num_tokens.append(sample.num_tokens)
        self.num_supervised.append(sample.num_supervised)
        self.num_anchors.append(sample.num_anchors)
        return True

    def _reject(self, row: RawRow, sample: SampleOutcome) -> None:
        reason, detail, answer = sample.reason, sample.detail, sample.answer
        (self.answer_reasons if answer else self.reasons)[reason] += 1
        self._rejects.add(Reject(source=row.source.name, row=row.line, reason=reason, detail=detail, answer=answer))
        if reason == BAD_ROW and len(self.faults) < MOST_NAMED:
            self.faults.append(f"{row.source.path}:{row.line} {detail}")

    def _note_uses(self, first: int, ids: NDArray[np.uint32]) -> None:
        """Note the tokens that occur for the first time in the samples from `first` on, whose ids these are."""
        known = ids < len(self.first_uses)
        fresh = np.flatnonzero(self.first_uses[np.where(known, ids, 0)] < 0)
        fresh = fresh[known[fresh]][::-1]  # backwards, so that the first place of each is what remains
        ends = np.cumsum(np.array(self.num_tokens[first:], np.int64))
        self.first_uses[ids[fresh]] = first + np.searchsorted(ends, fresh, "right")
        if self.beyond is None and not known.all():
            place = int(np.argmin(known))
            self.beyond = first + int(np.searchsorted(ends, place, "right")), int(ids[place])

    def write(self, config: ExtractConfig, slot_bytes: int, *, by_length: bool) -> tuple[int, int]:
        """Write samples.parquet; returns the number of shards and the slots of each."""
        self._seen.clear()  # its memory is needed now
        num_tokens = np.frombuffer(self.num_tokens, np.int32)
        shard_tokens = shard_slots(num_tokens, config.chunk_tokens, (config.shard_mib << 20) // slot_bytes)
        order = ordered(num_tokens, config.chunk_tokens, shard_tokens if by_length else None)
        shard, start = places(num_tokens[order], config.chunk_tokens, shard_tokens)
        numbers: dict[str, Numbers] = {
            "row": np.frombuffer(self.row, np.int64)[order],
            "answer": np.frombuffer(self.answer, np.int32)[order],
            "num_tokens": num_tokens[order],
            "num_supervised": np.frombuffer(self.num_supervised, np.int32)[order],
            "num_anchors": np.frombuffer(self.num_anchors, np.int32)[order],
            "shard": shard,
            "start": start,
        }
        write_samples(
            self.folder / SAMPLES,
            sources=list(self.sources),
            source_index=np.frombuffer(self.source_index, np.int32)[order],
            numbers=numbers,
            read=self._spooled(num_tokens, order),
        )
        self._renumber(order)
        self.source_index, self.row, self.answer = array("i"), array("q"), array("i")  # they are in the file now
        self.num_tokens, self.num_supervised, self.num_anchors = array("i"), array("i"), array("i")
        return int(shard[-1]) + 1, shard_tokens

    def _renumber(self, order: NDArray[np.int64]) -> None:
        """Let the uses of tokens name samples by their place in `order`."""
        place = np.empty(len(order) + 1, np.int64)
        place[order], place[-1] = np.arange(len(order)), -1  # -1 stays -1
        self.first_uses = place[self.first_uses]
        if self.beyond is not None:
            self.beyond = int(place[self.beyond[0]]), self.beyond[1]

    def _spooled(self, num_tokens: NDArray[np.int32], order: NDArray[np.int64]) -> Callable[[int, int], Tokens]:
        """Return what reads tokens of the samples laid end to end in `order`, whole samples at a time."""
        lengths = num_tokens[order].astype(np.int64)
        ends, begins = lengths.cumsum(), (num_tokens.cumsum(dtype=np.int64) - num_tokens)[order]
        self._ids.flush()
        self._mask.flush()

        def parts(file: BinaryIO, item_bytes: int, some: slice) -> bytearray:
            found = bytearray(int(lengths[some].sum()) * item_bytes)
            rest = memoryview(found)
            for sample in range(some.start, some.stop):  # a list of parts would take more than they do
                size = int(lengths[sample]) * item_bytes
                os.preadv(file.fileno(), [rest[:size]], int(begins[sample]) * item_bytes)
                rest = rest[size:]
            return found

        def read(begin: int, end: int) -> Tokens:
            some = slice(*np.searchsorted(ends, [begin, end], "right").tolist())
            return np.frombuffer(parts(self._ids, 4, some), np.uint32), np.frombuffer(
                parts(self._mask, 1, some), np.bool_
            )

        return read


def refuse_ids_beyond_table(target: TargetFiles, plan: Plan) -> None:
    """Raise `DflashError` if the tokenizer wrote a token that the target has no embedding for."""
    if plan.beyond is not None:
        sample, token = plan.beyond
        raise DflashError(
            f"{plan.samples.place(sample)} holds token {token}, but the target's embedding table has "
            f"{len(plan.first_uses)} rows. The tokenizer in {target.folder} belongs to another model; put the right "
            f"one there."
        )
