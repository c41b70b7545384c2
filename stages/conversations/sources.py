"""What the data arguments name: files, folders, globs, saved datasets and hub ids, each with its share of rows."""

import json
import os
import random
import re
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

from dflash_offline.schemas.errors import BadInputError
from dflash_offline.schemas.files import sha256_file
from dflash_offline.schemas.settings.extract import ExtractConfig
from dflash_offline.stages.conversations.content import ROW_FORMATS
from dflash_offline.stages.conversations.files import (
    COMPRESSED,
    CONTAINERS,
    ENDINGS,
    DataFile,
    RawRow,
    Row,
    identify,
    read_raw_rows,
)
from dflash_offline.stages.conversations.reading.apart import num_arrow_rows
from dflash_offline.stages.conversations.reading.streams import first_line


@dataclass(frozen=True)
class Source:
    """One data argument: its files in the order they are read, and the share of its rows that is taken."""

    argument: str
    files: tuple[DataFile, ...]
    weight: float | None
    """None where no weight was given: all rows."""


@dataclass(frozen=True)
class InputFormat:
    """The format of the data as the user names it; None where it is found out."""

    container: str | None = None
    row_format: str | None = None

    @classmethod
    def parse(cls, text: str | None) -> "InputFormat":
        """Return what --input-format says: a container, a row format, or both with a comma between."""
        words = [word.strip() for word in (text or "").split(",") if word.strip()]
        containers = [word for word in words if word in CONTAINERS]
        row_formats = [word for word in words if word in ROW_FORMATS]
        if len(containers) > 1 or len(row_formats) > 1 or len(containers) + len(row_formats) < len(words):
            raise BadInputError(
                f"--input-format is {text!r}; expected one of {', '.join(CONTAINERS)}, one of "
                f"{', '.join(ROW_FORMATS)}, or one of each with a comma between, as in parquet,messages."
            )
        return cls(next(iter(containers), None), next(iter(row_formats), None))


class Data:
    """All rows that a plan reads, drawn by weight and seed; `rows` can be read again and gives the same."""

    def __init__(self, config: ExtractConfig) -> None:
        self.config = config
        self.format = InputFormat.parse(config.input_format)
        self.sources = [_source(str(argument), self.format.container) for argument in config.data]
        self.num_not_drawn = 0
        """Rows that weights left out, once `rows` has been read."""
        self._files = [file for source in self.sources for file in source.files]
        self._states = [_state(file.path) for file in self._files]

    def identity(self) -> dict[str, str]:
        """Return the hash of each file's bytes, and which of its rows are taken where it is not all."""
        hashes = {f"file_{i}_sha256": sha256_file(file.path) for i, file in enumerate(self._files)}
        cuts = [(i, file.rows) for i, file in enumerate(self._files) if file.rows is not None]
        return hashes | {f"file_{i}_rows": f"{rows.start}:{rows.stop}" for i, rows in cuts}

    def refuse_changed(
        self, advice: str = "Nothing was kept of it. Repeat the command when nobody writes there any more."
    ) -> None:
        """Raise `BadInputError`, with the advice, if a file is another than when it was looked up: its hash and its
        rows, read one after the other, may then be of different content."""
        before = zip(self._files, self._states, strict=True)
        changed = [file.path for file, state in before if _state(file.path) != state]
        if changed:
            raise BadInputError(f"{', '.join(map(str, changed))} changed while being read. {advice}")

    @property
    def weights(self) -> list[float] | None:
        """The share of each argument's rows; None if none is given."""
        given = [source.weight for source in self.sources]
        return None if all(weight is None for weight in given) else [1.0 if w is None else w for w in given]

    def rows(self) -> Iterator[Row]:
        """Yield the rows in order; with weights, the arguments mixed at rates in proportion to them."""
        return (row.parsed() for row in self.raw_rows())

    def raw_rows(self) -> Iterator[RawRow]:
        """Yield the rows of `rows` unparsed."""
        self.num_not_drawn = 0
        readers = [self._drawn(index) for index in range(len(self.sources))]
        weights = self.weights
        mixed = (row for reader in readers for row in reader) if weights is None else self._mixed(readers, weights)
        return islice(mixed, self.config.limit)

    def _drawn(self, index: int) -> Iterator[RawRow]:
        source = self.sources[index]
        chance = random.Random(f"{self.config.seed} {index}")
        for file in source.files:
            for row in read_raw_rows(file):
                if source.weight is None or chance.random() < source.weight:
                    yield row
                else:
                    self.num_not_drawn += 1

    def _mixed(self, readers: list[Iterator[RawRow]], weights: Sequence[float]) -> Iterator[RawRow]:
        chance = random.Random(f"{self.config.seed} mix")
        unread = list(range(len(readers)))
        while unread:
            chosen = chance.choices(unread, [weights[i] for i in unread])[0]
            row = next(readers[chosen], None)
            if row is None:
                unread.remove(chosen)
            else:
                yield row


def _state(path: Path) -> tuple[int, ...] | None:
    """Return what differs after a file was written to or replaced; None if there is none."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _source(argument: str, container: str | None) -> Source:
    place, weight = _weighted(argument)
    try:
        return Source(argument, tuple(_files(place, container)), weight)
    except PermissionError as error:
        _refuse_missing(error)
        raise


def _files(place: str, container: str | None) -> list[DataFile]:
    """Return the files that an argument without its weight names, in the order in which they are read."""
    path = Path(place).expanduser()
    is_glob = any(sign in place for sign in "*?[")
    if path.is_dir():
        files = _folder(path, container)
    elif path.is_file():  # a pipe could be read only once
        files = [identify(path, container=container)]
    elif matches := _glob(path) if is_glob else []:
        files = [file for match in matches for file in _matched(match, container)]
    elif not is_glob or _HUB_SPLIT.fullmatch(place):
        files = _hub(place)
    else:
        files = []
    if not files:
        raise BadInputError(f"{place} names no data file. Expected files ending in {', '.join(ENDINGS)}.")
    return files


def _weighted(argument: str) -> tuple[str, float | None]:
    """Split `a.jsonl:0.3` into the path and its weight, unless a file has that very name."""
    place, colon, number = argument.rpartition(":")
    if not colon or Path(argument).exists():
        return argument, None
    try:
        weight = float(number)
    except ValueError:
        return argument, None
    if not 0 < weight <= 1:
        raise BadInputError(
            f"{argument} has weight {number}; expected more than 0 and at most 1: the share of its rows that is taken. "
            f"To have one file's rows more often, name it twice. If {number} is a config of a dataset, name a split of "
            f"it too, as in {argument}@train."
        )
    return place, weight


def _glob(pattern: Path) -> list[Path]:
    """Return what a pattern matches; `BadInputError` naming a folder on its way that cannot be listed."""
    parts = pattern.parts
    first = next(i for i, part in enumerate(parts) if any(sign in part for sign in "*?["))
    base, deepest = Path(*parts[:first]), len(parts) - first
    for place, folders, _ in os.walk(base, onerror=_refuse_missing) if base.is_dir() else ():
        if "**" not in parts and len(Path(place).parts) - len(base.parts) + 1 >= deepest:
            folders.clear()
    return sorted(Path(pattern.anchor).glob(str(pattern.relative_to(pattern.anchor))))


def _refuse_missing(error: OSError) -> None:
    raise BadInputError(
        f"{error.filename} cannot be read: {error.strerror}. What it holds would be missing: make it readable, remove "
        f"it, or name the files that are meant."
    ) from error


def _is_file(path: Path) -> bool:
    """Say whether a path is a plain file; `BadInputError` if that cannot be told, as of a link to nothing."""
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except OSError as error:
        _refuse_missing(error)
        raise


def _matched(path: Path, container: str | None) -> list[DataFile]:
    if path.is_dir():
        return _folder(path, container)
    return [identify(path, container=container)] if _is_file(path) else []


def _paths(folder: Path) -> Iterator[Path]:
    """Yield what lies in a folder and its folders, linked ones too, but for hidden ones; `BadInputError` if some of it
    cannot be listed."""
    for place, folders, names in os.walk(folder, onerror=_refuse_missing, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for linked in (Path(place, name) for name in folders if Path(place, name).is_symlink()):
            if Path(place).resolve().is_relative_to(linked.resolve()):
                raise BadInputError(f"{linked} leads back to a folder that it lies in. Remove the link.")
        yield from (Path(place, name) for name in names if not name.startswith("."))


def _folder(folder: Path, container: str | None) -> list[DataFile]:
    """Return the data files of a folder, in the order of their paths, or those of the dataset saved there."""
    if (folder / "dataset_dict.json").is_file():
        splits = sorted(path.parent.name for path in folder.glob("*/state.json"))
        if len(splits) != 1:
            raise BadInputError(
                f"{folder} is a saved dataset of the splits {', '.join(splits) or '(none)'}. Name the folder of one, "
                f"as in {folder / (splits[0] if splits else 'train')}."
            )
        folder = folder / splits[0]
    if (folder / "state.json").is_file():
        return _saved_dataset(folder)
    paths = sorted(_paths(folder), key=lambda path: path.relative_to(folder).as_posix())
    return [
        identify(path, name=path.relative_to(folder).as_posix(), container=container)
        for path in paths
        if (_is_data(path) or path.is_symlink()) and _is_file(path) and _is_data(path)
    ]


def _is_data(path: Path) -> bool:
    endings = [ending for ending in path.suffixes if ending not in COMPRESSED]
    return bool(endings) and endings[-1] in ENDINGS


def _saved_dataset(folder: Path) -> list[DataFile]:
    """Return the Arrow files of a dataset saved to disk by the `datasets` library, in the order of its rows."""
    path = folder / "state.json"
    try:
        state: Any = json.loads(path.read_bytes())
        names = [entry["filename"] for entry in state["_data_files"]]
    except (ValueError, KeyError, TypeError) as error:
        raise BadInputError(
            f"{path} does not list a saved dataset's files ({error!r}). Save the dataset again."
        ) from error
    if state.get("_indices_data_files"):
        raise BadInputError(f"{folder} keeps a selection of its rows as indices. Save it after flatten_indices().")
    return [identify(folder / name, container="arrow") for name in names]


_SLICE = r"\w+(?:\.\w+)*(?:\[(?:-?[\d_]+%?)?:(?:-?[\d_]+%?)?\])?(?:\(\w+\))?"
_HUB_SPLIT = re.compile(rf"[\w.-]+(?:/[\w.-]+)?(?::[\w.-]+)?@{_SLICE}(?: *\+ *{_SLICE})*")
"""A hub id with splits or slices of them, as in owner/name@train[:10%]+test: no glob, though it has brackets."""


class _SeveralError(Exception):
    """A dataset has several configs or splits, and none was named."""

    def __init__(self, what: str, names: Iterable[str], example: str) -> None:
        super().__init__(f"has the {what} {', '.join(names)}, and none is named. Name one, as in {example}")


def _hub(place: str) -> list[DataFile]:
    """Return the Arrow files that the `datasets` library makes of `owner/name`, `owner/name@split` or, where it has
    several configs, `owner/name:config@split`."""
    whole, _, split = place.partition("@")
    name, _, config = whole.partition(":")
    is_id = name.count("/") == 1 or ("/" not in name and split)
    if not is_id or name.startswith((".", "/", "~")) or _is_data(Path(name)):
        raise BadInputError(
            f"{place} is not a file or a folder. Name JSONL, JSON, Parquet or Arrow files, or a hub id."
        )
    if find_spec("datasets") is None:
        raise BadInputError(
            f"{place} is not a file or a folder here. If it is a dataset's hub id, the datasets package is needed: "
            f"pip install 'dflash-offline[hub]'."
        )
    import datasets

    try:
        configs = [] if config else datasets.get_dataset_config_names(name)
        if len(configs) > 1:
            raise _SeveralError("configs", configs, f"{name}:{configs[0]}" + (f"@{split}" if split else ""))
        named = (name, config) if config else (name,)
        if not split:
            splits = datasets.load_dataset(*named)
            if len(splits) > 1:
                raise _SeveralError("splits", splits, f"{whole}@{next(iter(splits))}")
            return [file for dataset in splits.values() for file in _arrow_files(dataset)]
        dataset = datasets.load_dataset(*named, split=split)
        if "[" not in split:
            return _arrow_files(dataset)
        lengths = {part: info.num_examples for part, info in dataset.info.splits.items()}
        slices = datasets.ReadInstruction.from_spec(split).to_absolute(lengths)
        # The library gives a slice the files of its whole split, so that the rows have to be counted off here.
        wholes = {part.splitname: _arrow_files(datasets.load_dataset(*named, split=part.splitname)) for part in slices}
        files = [file for part in slices for file in _cut(wholes[part.splitname], range(part.from_, part.to))]
        if sum(len(file.rows or ()) for file in files) != len(dataset):
            raise ValueError("its Arrow files hold other rows than the slice")
    except _SeveralError as several:
        raise BadInputError(f"The dataset {place} {several}.") from None
    except Exception as error:  # whatever the library and the dataset provoke
        raise BadInputError(
            f"The dataset {place} cannot be loaded: {first_line(error)}. Check the id, or give files."
        ) from error
    return files


def _arrow_files(dataset: Any) -> list[DataFile]:
    return [identify(Path(entry["filename"]), container="arrow") for entry in dataset.cache_files]


def _cut(files: list[DataFile], rows: range) -> list[DataFile]:
    """Return the files that hold some of the rows, counted from 0 through all of them, each with its own."""
    begin, held = 0, []
    for file in files:
        end = begin + num_arrow_rows(file.path)
        own = range(max(rows.start, begin) - begin, min(rows.stop, end) - begin)
        held += [replace(file, rows=own)] if own else []
        begin = end
    return held
