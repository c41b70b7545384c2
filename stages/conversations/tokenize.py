"""What becomes of each row of a batch: read, rendered, encoded, masked; the same wherever the batch is worked on."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dflash_offline.schemas.samples import count_anchors
from dflash_offline.schemas.settings.extract import ExtractConfig
from dflash_offline.stages.conversations.content import Content, RowFaultError, content_hash, read_content
from dflash_offline.stages.conversations.files import RawRow, parse
from dflash_offline.stages.conversations.loss_mask import ROW_ERRORS, Masker, Tokenized, UnmaskableError

BATCH_BYTES = 1 << 18
"""Of content, after which a batch is full: large enough to be worth a journey, small enough to be many."""
BATCH_ROWS = 1024
BAD_ROW = "bad row"


@dataclass(frozen=True)
class RowOutcome:
    """What became of one row."""

    layout: str = ""
    """How it was written; empty if it could not be read."""
    digest: bytes = b""
    """Of what it says, where duplicates are to be found."""
    reason: str = ""
    """Why it is no sample; empty if it is one."""
    detail: str = ""
    num_tokens: int = 0
    """Of the sample, or of the row that has no anchor; cut to the greatest length."""
    num_supervised: int = 0
    num_anchors: int = 0
    num_supervised_cut: int = -1
    """Supervised tokens beyond the greatest length; -1 if nothing was cut."""


@dataclass(frozen=True)
class BatchOutcome:
    """What became of a batch, row by row, and the tokens of all its rows end to end."""

    rows: list[RowOutcome]
    ids: NDArray[np.uint32]
    mask: NDArray[np.bool_]


Unread = tuple[bytes, str, bool]
"""A row's content, its fault, and whether the content is JSON: what `parse` takes."""


def batches(rows: Iterable[RawRow]) -> Iterator[list[RawRow]]:
    """Yield the rows in order, in batches that depend on the rows alone."""
    batch: list[RawRow] = []
    size = 0
    for row in rows:
        if batch and (size + len(row.content) > BATCH_BYTES or len(batch) == BATCH_ROWS):
            yield batch
            batch, size = [], 0
        batch.append(row)
        size += len(row.content)
    if batch:
        yield batch


def unread(batch: list[RawRow]) -> list[Unread]:
    """Return what another process needs of a batch."""
    return [(row.content, row.fault, row.source.container == "jsonl") for row in batch]


class RowWorker:
    """Turns batches of rows into samples. Can be sent to another process if its masker's tokenizer can."""

    def __init__(self, config: ExtractConfig, masker: Masker, layout: str | None) -> None:
        """`layout` is how rows are written, None to find out."""
        self.config = config
        self.masker = masker
        self.layout = layout

    def __call__(self, batch: list[Unread]) -> BatchOutcome:
        """Return what becomes of a batch."""
        read = [self._read(row) for row in batch]
        made = iter(self.masker.tokenize_all([content for _, content in read if content is not None]))
        pairs = [self._outcome(found, next(made) if content is not None else None) for found, content in read]
        tokenized = [sample for _, sample in pairs if sample is not None]
        return BatchOutcome(
            rows=[found for found, _ in pairs],
            ids=np.concatenate([np.zeros(0, np.uint32), *(sample.input_ids for sample in tokenized)]),
            mask=np.concatenate([np.zeros(0, np.bool_), *(sample.loss_mask for sample in tokenized)]),
        )

    def _read(self, row: Unread) -> tuple[RowOutcome, Content | None]:
        """Return the row's content, or its fault."""
        content, fault, is_json = row
        value, fault = parse(content, fault, is_json=is_json)
        layout = ""
        try:
            if fault:
                raise RowFaultError(fault)
            layout, said = read_content(value, self.layout)
            digest = content_hash(said) if self.config.drop_duplicates else b""
        except ROW_ERRORS as error:
            return RowOutcome(layout=layout, reason=BAD_ROW, detail=_fault_text(error)), None
        return RowOutcome(layout=layout, digest=digest), said

    def _outcome(self, found: RowOutcome, made: Tokenized | Exception | None) -> tuple[RowOutcome, Tokenized | None]:
        """Return what became of a row whose content was tokenized, and its tokens if it has some."""
        if made is None:
            return found, None
        layout, digest = found.layout, found.digest
        if isinstance(made, UnmaskableError):
            return RowOutcome(layout, digest, *made.args), None
        if isinstance(made, Exception):
            return RowOutcome(layout, digest, BAD_ROW, _fault_text(made)), None
        num_cut, most = -1, self.config.max_length
        num_supervised = int(np.count_nonzero(made.loss_mask))
        if len(made.input_ids) > most:
            made = Tokenized(made.input_ids[:most], made.loss_mask[:most])
            left = int(np.count_nonzero(made.loss_mask))
            num_cut, num_supervised = num_supervised - left, left
        num_anchors = count_anchors(made.loss_mask, self.config.block_size)
        reason = "" if num_anchors else _why_not(made, self.config.block_size)
        detail = f"{len(made.input_ids)} tokens" if reason else ""
        outcome = RowOutcome(layout, digest, reason, detail, len(made.input_ids), num_supervised, num_anchors, num_cut)
        return outcome, made


def _fault_text(error: Exception) -> str:
    if isinstance(error, RowFaultError):
        return str(error)
    return f"is refused by the chat template ({str(error)[:200]})"


def _why_not(sample: Tokenized, block_size: int) -> str:
    if not sample.loss_mask.any():
        return "no supervised token"
    if len(sample.input_ids) < block_size:
        return "shorter than one block"
    return "supervised part too near the end"
