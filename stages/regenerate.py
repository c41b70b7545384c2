"""Replaces the assistant's turns of conversations by the target's own answers, in the order of the data.

Reads top to bottom: what is asked for, what was answered before, the answers, the new file. No torch with servers.
"""

import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol, TypedDict

from dflash_offline.schemas.checked import Count, Counts, Sha256, checked
from dflash_offline.schemas.errors import BadInputError, CacheError, DflashError
from dflash_offline.schemas.files import move_synced, publish, refuse_links, remove_known, sha256_file, write_synced
from dflash_offline.schemas.identity import refuse_other_identity
from dflash_offline.schemas.locks import LOCK, locked_folder, remove_unfinished
from dflash_offline.schemas.paths import output_folder
from dflash_offline.schemas.sealed import read_sealed, sealed_bytes
from dflash_offline.schemas.settings.engine import TRANSFORMERS
from dflash_offline.schemas.settings.extract import ExtractConfig
from dflash_offline.schemas.settings.regenerate import RegenerateConfig
from dflash_offline.stages.answers import advice
from dflash_offline.stages.answers.advice import FirstAnswers
from dflash_offline.stages.answers.dialogues import BAD_ROW, Answer, Dialogue, read_dialogues
from dflash_offline.stages.answers.journal import Journal
from dflash_offline.stages.conversations.files import MOST_NAMED, refuse_bad_rows
from dflash_offline.stages.conversations.sources import Data
from dflash_offline.stages.progress import Progress, Silent

IDENTITY = "identity"
ANSWERS = "answers"
ROWS = "rows"
PROVENANCE = "provenance"
REJECTS = "rejects"
FORMAT = "dflash-regenerated"
_WORK = (LOCK, ROWS, REJECTS, ANSWERS, IDENTITY)
"""Files of the folder in which answers are kept until the new file is whole."""


class _Totals(TypedDict):
    rows: Count
    answers: Count
    left_out: Counts


class _Begun(TypedDict):
    identity: dict[str, Any]


class _Provenance(_Begun):
    counts: _Totals
    sha256: Sha256


@dataclass(frozen=True, kw_only=True)
class Regenerated:
    """What `regenerate` left."""

    out: Path
    num_rows: int
    """Rows of the new file."""
    num_answers: int
    left_out: dict[str, int]
    """Number of rows that are not in it, by reason."""
    notes: dict[str, int]
    """What else is to be known of its rows and answers, each with the number of these."""
    num_answers_now: int
    """Answers that this call got; the rest was there before."""
    seconds: float
    """Seconds that these answers took."""

    @property
    def rejects(self) -> Path:
        """The file that names each row that was left out; there is none where none was."""
        return _beside(self.out, REJECTS)


class Answerer(Protocol):
    """What gives the answers: the target itself, run by transformers or an engine, or servers."""

    def identity(self) -> dict[str, Any]:
        """Return what decides the answers, and is compared."""

    def origin(self) -> dict[str, Any]:
        """Return what is recorded of it and never compared."""

    def answer(self, dialogues: Iterable[Dialogue], note: Callable[..., None], num_open: int) -> None:
        """Answer every open turn of the dialogues, `num_open` of which have one, and note each answer once added.

        `note` takes a list of dialogues with their newest answer and, where rows are answered side by side, the number
        of the oldest one under way; it raises `DflashError` where it is of no use to go on.
        """


def regenerate(config: RegenerateConfig, progress: Progress | None = None) -> Regenerated:
    """Make `config.out` hold the conversations with the target's own answers, whole or not at all.

    Beside it stand the rejects, if there are any, and last the provenance, which says what made it. Until then the
    answers are kept in a folder beside it, from which the same call goes on. Raises `DflashError` for bad rows, for
    settings other than those it was begun with, for data that changes meanwhile, and where no server answers.
    """
    progress = progress or Silent()
    answerer = _choose_answerer(config, progress)
    data = _find_data(config)
    identity = _identity(config, data, answerer)
    finished = _finished(config.out, identity)
    if finished is not None:
        return finished
    _refuse_foreign(config.out)
    with _work_folder(config.out, identity) as folder:
        with _unchanged(data, folder) as refuse_changed, closing(Journal(folder / ANSWERS)) as journal:
            num_answers_now, seconds = _answer(config, data, answerer, journal, progress, refuse_changed)
            counts = _write_rows(config, folder, journal.replay(read_dialogues(data)))
        _publish(config, folder, identity, answerer.origin(), counts)
    return _regenerated(config.out, counts, num_answers_now, seconds)


def _choose_answerer(config: RegenerateConfig, progress: Progress) -> Answerer:
    if config.servers:
        from dflash_offline.stages.answers.servers import ServerAnswerer

        return ServerAnswerer(config, progress)
    if config.engine != TRANSFORMERS:
        from dflash_offline.stages.answers.engine import EngineAnswerer

        return EngineAnswerer(config, progress)
    if config.ray is not None:
        from dflash_offline.stages.cluster.answers import ClusterAnswerer

        return ClusterAnswerer(config, progress)
    from dflash_offline.stages.answers.local import LocalAnswerer

    return LocalAnswerer(config, progress)


def _find_data(config: RegenerateConfig) -> Data:
    chosen = {name: getattr(config, name) for name in ("data", "out", "input_format", "limit", "seed")}
    data = Data(ExtractConfig(**chosen, target=config.target or ""))
    if config.out.resolve() in (file.path.resolve() for source in data.sources for file in source.files):
        raise DflashError(f"{config.out} is itself among the data. Name an --out elsewhere.")
    return data


def _identity(config: RegenerateConfig, data: Data, answerer: Answerer) -> dict[str, Any]:
    """Return every field that decides the new file's content."""
    drawn = config.temperature > 0
    return {
        **answerer.identity(),
        "data": data.identity(),
        "weights": data.weights,
        "input_format": config.input_format,
        "limit": config.limit,
        "seed": config.seed if drawn or data.weights is not None else None,
        "temperature": config.temperature,
        "top_p": config.top_p if drawn else None,
        **({"top_k": config.top_k} if config.top_k else {}),
        **({"min_p": config.min_p} if config.min_p else {}),
        "max_new_tokens": config.max_new_tokens,
        "chat_template_kwargs": config.chat_template_kwargs,
        "skip_bad_rows": config.skip_bad_rows,
        **({"keep_rewritten": True} if config.keep_rewritten else {}),
    }


def _beside(out: Path, what: str) -> Path:
    return out.with_name(f"{out.name}.{what}")


def _finished(out: Path, identity: dict[str, Any]) -> Regenerated | None:
    """Return what an earlier call left, if it is whole; `DflashError` if `out` is something else."""
    provenance, partial = _beside(out, PROVENANCE), _beside(out, "partial")
    if out.is_dir() or (out.exists() and not provenance.exists() and not (partial / IDENTITY).is_file()):
        raise DflashError(f"{out} exists and was not made by `dflash regenerate`. Name a new file with --out.")
    if not out.exists() or not provenance.exists():
        return None
    document = checked(read_sealed(provenance), _Provenance, provenance, "Remove it to keep the file as your own.")
    refuse_other_identity(out, document["identity"], identity, "before")
    if sha256_file(out) != document["sha256"]:
        raise DflashError(
            f"{out} has changed since it was made, as {provenance} knows it. Remove {provenance} to keep the file as "
            f"your own and name another --out, or remove both to make it again."
        )
    remove_known(partial, _WORK)
    return _regenerated(out, document["counts"], 0, 0.0)


def _refuse_foreign(out: Path) -> None:
    """Raise `DflashError` if what would be replaced beside `out` cannot be shown to be of an earlier call."""
    for path, is_ours in ((_beside(out, REJECTS), _holds_rejects), (_beside(out, PROVENANCE), _holds_provenance)):
        if os.path.lexists(path) and (path.is_symlink() or not path.is_file() or not is_ours(path)):
            raise DflashError(
                f"{path} would be replaced, and was not made by `dflash regenerate`. Move it away, or name a new file "
                f"with --out."
            )


def _holds_rejects(path: Path) -> bool:
    """Say whether a file names rows that were left out, one a line."""
    with path.open("rb") as file:
        try:
            kept = [json.loads(line).keys() >= {"source", "row", "reason", "detail"} for line in file]
            return bool(kept) and all(kept)
        except (ValueError, AttributeError, RecursionError):
            return False


def _holds_provenance(path: Path) -> bool:
    try:
        return read_sealed(path).get("format") == FORMAT
    except CacheError:
        return False


def _regenerated(out: Path, counts: Mapping[str, Any], answers_now: int, seconds: float) -> Regenerated:
    return Regenerated(
        out=out,
        num_rows=counts["rows"],
        num_answers=counts["answers"],
        left_out=counts["left_out"],
        notes=counts.get("notes", {}),
        num_answers_now=answers_now,
        seconds=seconds,
    )


@contextmanager
def _work_folder(out: Path, identity: dict[str, Any]) -> Iterator[Path]:
    """Give the locked folder of what is answered so far; `MismatchError` if it was begun with other settings.

    It stays only if it holds something: what stopped before any answer may be begun anew with other settings.
    """
    partial = _beside(out, "partial")
    refuse_links(partial.parent, partial.name)
    folder = output_folder(partial, marker=IDENTITY, kind="begun regeneration", renamed=False)
    folder.mkdir(parents=True, exist_ok=True)
    with locked_folder(folder) as held:
        if not held:
            raise DflashError(f"{folder} is being worked on by another command. Wait for it, or name another --out.")
        path = folder / IDENTITY
        for written in (path, _beside(out, PROVENANCE)):
            remove_unfinished(written)
        if path.is_file():
            begun = checked(read_sealed(path), _Begun, path, f"Remove {folder} to begin anew.")
            refuse_other_identity(folder, begun["identity"], identity, "before")
        else:
            document = {"format": FORMAT, "identity": identity}
            publish([sealed_bytes(document)], path=path)
        try:
            yield folder
        finally:
            answers = folder / ANSWERS
            if answers.is_file() and not answers.stat().st_size and not (folder / REJECTS).exists():
                remove_known(folder, _WORK)


@contextmanager
def _unchanged(data: Data, folder: Path) -> Iterator[Callable[[], None]]:
    """Give what raises `BadInputError` if the data changed since it was looked up, and call it at the end.

    Where something failed, what failed is the reading of changed data if it did change.
    """

    def refuse_changed() -> None:
        data.refuse_changed(
            f"The answers in {folder} are all to what it held before: put its content back and repeat the command to "
            f"go on with them, or remove that folder to have the new content answered."
        )

    try:
        yield refuse_changed
    except Exception:
        refuse_changed()
        raise
    refuse_changed()


def _answer(
    config: RegenerateConfig,
    data: Data,
    answerer: Answerer,
    journal: Journal,
    progress: Progress,
    refuse_changed: Callable[[], None],
) -> tuple[int, float]:
    """Have every open turn answered into the journal; returns the number of answers and the seconds they took."""
    num_rows, num_open = _survey(config, data, journal, progress)
    progress.start("Answering", num_rows, "rows", done=num_rows - num_open)
    began, num_answers = time.perf_counter(), 0
    first = FirstAnswers(config.stop_after_rejected)

    def note(answered: list[tuple[Dialogue, Answer]], under_way: int | None = None) -> None:
        nonlocal num_answers
        refuse_changed()  # an answer is kept only beside the hash of the question that it answers
        journal.note(first.passed(answered, under_way))
        num_answers += len(answered)
        rate = num_answers / (time.perf_counter() - began)
        progress.advance(sum(not dialogue.is_open for dialogue, _ in answered), answers_per_s=f"{rate:.2f}")

    try:
        answerer.answer(journal.replay(read_dialogues(data)), note, num_open)
        journal.note(first.rest())
    finally:
        progress.finish()
    return num_answers, time.perf_counter() - began


def _survey(config: RegenerateConfig, data: Data, journal: Journal, progress: Progress) -> tuple[int, int]:
    """Return how many rows there are and how many are to be answered yet; `BadInputError` naming the bad ones."""
    num_rows = num_open = num_bad = 0
    faults: list[str] = []
    progress.start("Reading", None, "rows")
    for dialogue in journal.replay(read_dialogues(data)):
        num_rows += 1
        num_open += dialogue.is_open
        if dialogue.fault is not None and dialogue.fault[0] == BAD_ROW and not config.skip_bad_rows:
            num_bad += 1
            faults += [dialogue.fault[1]] if num_bad <= MOST_NAMED else []
        progress.advance(1)
    progress.finish()
    refuse_bad_rows(faults, "Mend them, or leave them out with --skip-bad-rows.", num_bad)
    return num_rows, num_open


def _write_rows(config: RegenerateConfig, folder: Path, dialogues: Iterable[Dialogue]) -> dict[str, Any]:
    """Write rows and rejects, in the order of the data, into the folder; returns the counts."""
    left_out: Counter[str] = Counter()
    notes: Counter[str] = Counter()
    num_answers = num_rows = 0

    def rows() -> Iterator[bytes]:
        nonlocal num_answers, num_rows
        with (folder / REJECTS).open("x", encoding="utf-8") as rejects:
            for dialogue in dialogues:
                assert not dialogue.is_open, "every row was answered, or has a reason"
                if dialogue.fault is None:
                    num_rows += 1
                    num_answers += len(dialogue.answers)
                    notes.update(_notes(dialogue))
                    yield (json.dumps(dialogue.record(), ensure_ascii=False) + "\n").encode()
                    continue
                reason, detail = dialogue.fault
                left_out[reason] += 1
                reject = {"source": dialogue.source, "row": dialogue.line, "reason": reason, "detail": detail}
                rejects.write(json.dumps(reject) + "\n")
            rejects.flush()
            os.fsync(rejects.fileno())

    for name in (ROWS, REJECTS):  # of a call that was stopped while it wrote them
        (folder / name).unlink(missing_ok=True)
    write_synced(folder / ROWS, rows())
    if not num_rows:
        listed = "".join(f"\n  {line}" for line in advice.left_out(left_out)) or "\n  no rows"
        raise BadInputError(
            f"No row of {', '.join(map(str, config.data))} was answered:{listed}\n"
            f"{folder / REJECTS} names each. Remove {folder} to ask again."
        )
    counts = {"rows": num_rows, "answers": num_answers, "left_out": dict(sorted(left_out.items()))}
    return counts | ({"notes": dict(sorted(notes.items()))} if notes else {})


def _notes(dialogue: Dialogue) -> Counter[str]:
    """Return what is to be known of a row and its answers, beside that it is there."""
    said: Counter[str] = Counter()
    if dialogue.num_cut:
        said["rows end at a call whose result the data does not have"] = 1
        said["answers beyond such a call, not asked for"] = dialogue.num_cut
    for answer, is_context in zip(dialogue.answers, dialogue.context, strict=False):
        said["answers are new and marked as context (weight 0), as those in the data"] += is_context
        said["answers were not compared with the tokens that were generated"] += not answer.compared
        if answer.not_taken:
            said[f"answers of a server that does not take {', '.join(answer.not_taken)}: its own values hold"] += 1
    return +said


def _publish(
    config: RegenerateConfig, folder: Path, identity: dict[str, Any], origin: dict[str, Any], counts: dict[str, Any]
) -> None:
    """Put the new file in place, then what says how it was made; then forget the answers."""
    origin = {
        **origin,
        "data": [str(argument) for argument in config.data],
        "dflash_offline": version("dflash-offline"),
    }
    document = {"format": FORMAT, "identity": identity, "origin": origin, "counts": counts}
    document["sha256"] = sha256_file(folder / ROWS)
    _refuse_foreign(config.out)
    if config.out.exists() and sha256_file(config.out) != document["sha256"]:
        raise DflashError(f"{config.out} was made by something else meanwhile. Move it away, and repeat the command.")
    if counts["left_out"]:
        move_synced(folder / REJECTS, _beside(config.out, REJECTS))
    else:
        _beside(config.out, REJECTS).unlink(missing_ok=True)
    move_synced(folder / ROWS, config.out)
    publish([sealed_bytes(document)], path=_beside(config.out, PROVENANCE))
    remove_known(folder, _WORK)
