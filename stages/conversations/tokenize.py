"""Rows read, rendered, tokenized and masked in batches, by several processes where there is much to do.

What comes of it is in the order of the data and the same whatever the number of processes. Small data is done by this
process alone: another takes a second to start, so this one goes on until others are ready.
"""

import gc
import os
import pickle
import signal
import subprocess
import sys
import traceback
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import chain
from multiprocessing.connection import Connection, Pipe
from queue import SimpleQueue
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dflash_offline.schemas.draft.anchor_rule import WHOLE, AnchorRule
from dflash_offline.schemas.errors import DflashError
from dflash_offline.schemas.samples import count_anchors
from dflash_offline.schemas.settings.extract import ExtractConfig
from dflash_offline.stages.bounds import MOST_SECONDS, OutOfBoundsError, out_of_bounds
from dflash_offline.stages.conversations.content import Content, RowFaultError, content_hash, read_content
from dflash_offline.stages.conversations.files import RawRow, parse
from dflash_offline.stages.conversations.loss_mask import ConversationEncoder, Part, Tokenized
from dflash_offline.stages.conversations.rendering import ROW_ERRORS, UnmaskableError
from dflash_offline.stages.cores import usable_cores
from dflash_offline.stages.stop import left_to_this_process

MAX_PROCESSES = 16
"""Processes that tokenize at once: one more would wait for the one that collects their results."""
BATCH_BYTES = 1 << 18
"""Bytes of content after which a batch is full: large enough to be worth sending, small enough to be many."""
BATCH_ROWS = 1024
ALONE_BYTES = 2 << 20
"""Bytes of content that this process tokenizes before it starts others: some seconds of work."""
BAD_ROW = "bad row"
NO_SUPERVISED = "no supervised token"
NOT_A_BLOCK = "shorter than one block"
TOO_NEAR_END = "supervised part too near the end"
NONE_FOLLOWS = "no supervised token within a block of another"
_AHEAD = 2
"""Batches for each process that are under way or wait for an earlier one."""
_COMMAND = "from dflash_offline.stages.conversations.tokenize import serve; serve()"


@dataclass(frozen=True)
class SampleOutcome:
    """What became of a row, or of an answer of a conversation that does not become one sample."""

    answer: int = 0
    """Counts the assistant's turns, from 1, up to the last one that is supervised here; 0 for the whole row."""
    reason: str = ""
    """Why it is no sample; empty if it is one."""
    detail: str = ""
    num_tokens: int = 0
    """Tokens of the sample, or of what has no anchor; cut to the maximum length."""
    num_supervised: int = 0
    num_anchors: int = 0
    num_supervised_cut: int = -1
    """Supervised tokens beyond the maximum length; -1 if nothing was cut."""
    dropped: tuple[str, ...] = ()
    """Kinds of parts of the row that the chat template left out of the text."""
    notes: tuple[str, ...] = ()
    """What else is to be said of the sample, by kind."""


@dataclass(frozen=True)
class RowOutcome:
    """What became of one row."""

    row_format: str = ""
    """How the row was written; empty if it could not be read."""
    digest: bytes = b""
    """Hash of the row's content, where duplicates are to be dropped."""
    samples: list[SampleOutcome] = field(default_factory=list)
    """One for the whole row; or, if some answer of the conversation is a sample, one for each sample and each answer
    that is none."""


@dataclass(frozen=True)
class BatchOutcome:
    """What became of a batch, row by row, and the tokens of all that has some, end to end."""

    rows: list[RowOutcome]
    ids: NDArray[np.uint32]
    mask: NDArray[np.bool_]


UnparsedRow = tuple[bytes, str, bool]
"""A row's content, its fault, and whether the content is JSON: what `parse` takes."""
_Answered = tuple[list[RawRow], BatchOutcome]


def num_tokenizing_processes() -> int:
    """Return how many processes tokenize large data: one for each usable core, up to `MAX_PROCESSES`."""
    return min(usable_cores(), MAX_PROCESSES)


def tokenize_rows(
    rows: Iterable[RawRow], tokenizer: "RowTokenizer", num_processes: int | None = None
) -> Generator[_Answered, None, None]:
    """Yield the rows in batches, each with what became of it, in order; the same whatever the number of processes.

    Close the iterator to end the processes. Raises `DflashError` if one of them is killed.
    """
    num_processes = num_processes or num_tokenizing_processes()
    alone = num_processes == 1 or not tokenizer.encoder.tokenizer.portable
    size = 0
    waiting = batches(rows)
    for batch in waiting:
        with _placed(batch):
            outcome = tokenizer(unparsed(batch))
        yield batch, outcome
        size += sum(len(row.content) for row in batch)
        if size >= ALONE_BYTES and not alone:
            yield from _tokenize_in_processes(waiting, tokenizer, num_processes)


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


def unparsed(batch: list[RawRow]) -> list[UnparsedRow]:
    """Return what another process needs of a batch."""
    return [(row.content, row.fault, row.source.container == "jsonl") for row in batch]


class RowTokenizer:
    """Turns batches of rows into samples. Can be sent to another process if its encoder's tokenizer can."""

    def __init__(self, config: ExtractConfig, encoder: ConversationEncoder, row_format: str | None) -> None:
        """`row_format` is how the rows are written; None finds it out for each row."""
        self.config = config
        self.encoder = encoder
        self.row_format = row_format

    def __call__(self, batch: list[UnparsedRow]) -> BatchOutcome:
        """Return what becomes of a batch."""
        read = [self._read(row) for row in batch]
        fit = [index for index, (_, content) in enumerate(read) if content is not None]
        try:
            encoded = iter(self.encoder.encode_all([content for _, content in read if content is not None]))
        except OutOfBoundsError as error:
            raise OutOfBoundsError(str(error), fit[error.row]) from None
        tokens: list[Tokenized] = []
        rows = [
            outcome if content is None else replace(outcome, samples=self._samples(next(encoded), tokens))
            for outcome, content in read
        ]
        return BatchOutcome(
            rows=rows,
            ids=np.concatenate([np.zeros(0, np.uint32), *(sample.input_ids for sample in tokens)]),
            mask=np.concatenate([np.zeros(0, np.bool_), *(sample.loss_mask for sample in tokens)]),
        )

    def _read(self, row: UnparsedRow) -> tuple[RowOutcome, Content | None]:
        """Return the row's content, or its fault."""
        raw, fault, is_json = row
        value, fault = parse(raw, fault, is_json=is_json)
        row_format = ""
        try:
            if fault:
                raise RowFaultError(fault)
            row_format, content = read_content(value, self.row_format)
            digest = content_hash(content) if self.config.drop_duplicates else b""
        except ROW_ERRORS as error:
            bad = SampleOutcome(reason=BAD_ROW, detail=_fault_text(error))
            return RowOutcome(row_format=row_format, samples=[bad]), None
        return RowOutcome(row_format=row_format, digest=digest), content

    def _samples(self, parts: list[Part], tokens: list[Tokenized]) -> list[SampleOutcome]:
        """Return what became of a row whose content was encoded; adds the tokens of what has some to the list.

        If none of its answers is a sample, the row counts once, as the first of them does.
        """
        pairs = [self._outcome(*part) for part in parts]
        if all(outcome.reason for outcome, _ in pairs):
            pairs = [(replace(outcome, answer=0), made) for outcome, made in pairs[:1]]
        tokens += (made for _, made in pairs if made is not None)
        return [outcome for outcome, _ in pairs]

    def _outcome(self, answer: int, sample: Tokenized | Exception) -> tuple[SampleOutcome, Tokenized | None]:
        """Return what became of one part of a row, and its tokens if it has some."""
        if isinstance(sample, UnmaskableError):
            return SampleOutcome(answer, *sample.args), None
        if isinstance(sample, Exception):
            return SampleOutcome(answer, BAD_ROW, _fault_text(sample)), None
        num_cut, most = -1, self.config.max_length
        num_supervised = int(np.count_nonzero(sample.loss_mask))
        if len(sample.input_ids) > most:
            sample = replace(sample, input_ids=sample.input_ids[:most], loss_mask=sample.loss_mask[:most])
            left = int(np.count_nonzero(sample.loss_mask))
            num_cut, num_supervised = num_supervised - left, left
        num_tokens, num_anchors = len(sample.input_ids), count_anchors(sample.loss_mask, self.config.anchor_rule)
        outcome = SampleOutcome(
            answer,
            reason="" if num_anchors else _why_no_anchor(sample, self.config.anchor_rule),
            detail="" if num_anchors else f"{num_tokens} tokens",
            num_tokens=num_tokens,
            num_supervised=num_supervised,
            num_anchors=num_anchors,
            num_supervised_cut=num_cut,
            dropped=sample.dropped,
            notes=sample.notes,
        )
        return outcome, sample


def _fault_text(error: Exception) -> str:
    if isinstance(error, RowFaultError):
        return str(error)
    return f"is refused by the chat template ({str(error)[:200]})"


def _why_no_anchor(sample: Tokenized, rule: AnchorRule) -> str:
    if not sample.loss_mask.any():
        return NO_SUPERVISED
    if rule.kind != WHOLE:
        return NONE_FOLLOWS
    if len(sample.input_ids) < rule.tokens:
        return NOT_A_BLOCK
    return TOO_NEAR_END


def _tokenize_in_processes(
    waiting: Iterator[list[RawRow]], tokenizer: RowTokenizer, num_processes: int
) -> Iterator[_Answered]:
    """Yield the outcomes of the batches that wait, in order: by other processes as soon as those are ready."""
    started: list[_Process] = []
    ready: SimpleQueue[_Process] = SimpleQueue()

    def prepare(process: _Process, work: bytes) -> None:
        try:
            process.ask(work)
        finally:  # a process that could not start says so again to the first batch that it gets
            ready.put(process)

    def answer(batch: list[UnparsedRow]) -> BatchOutcome:
        process = ready.get()
        try:
            return process.ask(pickle.dumps(batch))
        finally:
            ready.put(process)

    # A thread for each process: it waits for it, first to start, then for a batch at a time.
    with ThreadPoolExecutor(num_processes, thread_name_prefix="rows") as threads:
        try:
            started += (_Process() for _ in range(num_processes))
            work = pickle.dumps(tokenizer)
            starting = [threads.submit(prepare, process, work) for process in started]
            for batch in waiting:
                if any(start.done() for start in starting):
                    waiting = chain([batch], waiting)
                    break
                with _placed(batch):
                    outcome = tokenizer(unparsed(batch))
                yield batch, outcome
            pending: deque[tuple[list[RawRow], Future[BatchOutcome]]] = deque()
            for batch in waiting:
                pending.append((batch, threads.submit(answer, unparsed(batch))))
                if len(pending) > _AHEAD * num_processes:
                    yield _finished(*pending.popleft())
            for batch, future in pending:
                yield _finished(batch, future)
        finally:
            for process in started:
                process.kill()
            threads.shutdown(cancel_futures=True)
            for process in started:
                process.connection.close()


@contextmanager
def _placed(batch: list[RawRow]) -> Iterator[None]:
    """Name the row of a batch that is out of bounds."""
    try:
        yield
    except OutOfBoundsError as error:
        row = batch[error.row]
        raise error.at(f"{row.source.path}:{row.line}") from error


def _finished(batch: list[RawRow], future: "Future[BatchOutcome]") -> _Answered:
    with _placed(batch):
        return batch, future.result()


class _Process:
    """Another process with a tokenizer of its own, which answers one batch at a time."""

    def __init__(self) -> None:
        self.connection, other = Pipe()
        # A pool of one thread: as many threads as processes are enough, and none at all encodes a tenth slower.
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "true", "RAYON_NUM_THREADS": "1"}
        command = [sys.executable, "-P", "-c", _COMMAND, str(other.fileno())]
        with other, left_to_this_process():
            self.process = subprocess.Popen(
                command, pass_fds=[other.fileno()], env=environment, stdin=subprocess.DEVNULL, start_new_session=True
            )

    def ask(self, question: bytes) -> Any:
        """Return the answer; `DflashError` if the process ended instead."""
        try:
            self.connection.send_bytes(question)
            failed, answer = pickle.loads(self.connection.recv_bytes())
        except (EOFError, OSError) as error:
            code = self.process.wait()
            if code == -signal.SIGXCPU:
                raise DflashError(out_of_bounds("The chat template", f"{MOST_SECONDS} s of processor time")) from error
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            raise DflashError(
                f"A process that tokenizes {how}. If the machine ran out of memory, free some or take fewer cores "
                f"(taskset), and repeat the command."
            ) from error
        if isinstance(failed, OutOfBoundsError):
            raise failed
        if failed:
            raise RuntimeError(f"A process that tokenizes failed:\n{answer}")
        return answer

    def kill(self) -> None:
        """End the process, whatever it is doing."""
        self.process.kill()
        self.process.wait()


def serve() -> None:
    """Answer batches on the connection whose number the command line gives, until it is closed.

    The `RowTokenizer` comes first. Runs in a process of its own, which ends when the one that asks does.
    """
    with suppress(EOFError, OSError), Connection(int(sys.argv[1])) as connection:
        tokenizer: RowTokenizer = pickle.loads(connection.recv_bytes())
        connection.send_bytes(pickle.dumps((False, None)))
        gc.freeze()  # what is loaded stays
        while True:
            batch = pickle.loads(connection.recv_bytes())
            try:
                answer = pickle.dumps((False, tokenizer(batch)))
            except OutOfBoundsError as error:
                answer = pickle.dumps((error, None))
            except Exception:
                answer = pickle.dumps((True, traceback.format_exc()))
            connection.send_bytes(answer)
