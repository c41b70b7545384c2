"""checksums.json of an exported draft: the sha256 of its files, compared wherever the draft is read.

No client reads a file of this name. A draft without one, older or another's, is read as it is.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dflash_offline.schemas.errors import CacheError, DflashError
from dflash_offline.schemas.files import sha256_file
from dflash_offline.schemas.run import CHECKPOINT, STATE
from dflash_offline.schemas.sealed import read_sealed, sealed_bytes

CHECKSUMS, CARD = "checksums.json", "README.md"
_FORMAT = "dflash-draft-checksums"


def checksums_bytes(files: Mapping[str, str]) -> bytes:
    """Return the file's content, sealed with a checksum of its own; `files` maps names to sha256."""
    return sealed_bytes({"format": _FORMAT, "files": dict(files)})


def checksum_faults(folder: Path) -> list[tuple[str, str, str]]:
    """Return rule, file and what is wrong, for every file whose content is not the recorded one.

    A checkpoint of a run has its record in state.json. Of a folder without a record there is nothing to say.
    """
    record = folder / CHECKSUMS
    if not record.exists():
        record = folder / STATE
        if not (CHECKPOINT.fullmatch(folder.name) and record.exists()):
            return []
    try:
        expected = _files(read_sealed(record))
    except CacheError as error:
        return [("checksum", record.name, f"does not hold: {error}")]
    if expected is None:
        return [("checksum", record.name, "does not map names of files beside it to their sha256")]
    faults = []
    for name, sha256 in expected.items():
        path = folder / name
        found = f"has sha256 {sha256_file(path)}" if path.is_file() else "is missing"
        if found != f"has sha256 {sha256}":
            faults.append(("card" if name == CARD else "checksum", name, f"{found}; {record.name} says {sha256}"))
    return faults


def refuse_changed(folder: Path) -> None:
    """Raise `DflashError` naming every file of a draft that is not as it was written; its card may be another."""
    if faults := [f"{name} {what}" for rule, name, what in checksum_faults(folder) if rule != "card"]:
        listed, record = "\n  ".join(faults), folder / CHECKSUMS
        way_out = f" If the change is yours, remove {record} to have it read as it is." if record.exists() else ""
        raise DflashError(
            f"{folder} was damaged or changed since it was written:\n  {listed}\nExport the draft again.{way_out}"
        )


def _files(document: dict[str, Any]) -> dict[str, str] | None:
    files = document.get("files")
    if not isinstance(files, dict) or not all(isinstance(sha256, str) for sha256 in files.values()):
        return None
    return files if all(Path(name).name == name for name in files) else None
