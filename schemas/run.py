"""A run folder: run.json says what is trained from what; checkpoints and metrics lie beside it."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dflash_offline.schemas.config import TrainConfig
from dflash_offline.schemas.errors import DflashError, MismatchError, mismatch_table
from dflash_offline.schemas.files import read_sealed
from dflash_offline.schemas.manifest import differences

RUN, METRICS, EVENTS = "run.json", "metrics.jsonl", "tensorboard"
NOT_IDENTITY = ("cache", "out", "device", "keep", "save_every", "loader_threads", "attention_backend")
"""Settings that change where and how fast a run goes, never what it computes; a resume may change them."""


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """What made a run; written before its first step."""

    identity: dict[str, Any]
    """Settings, cache and draft; compared on resume."""
    origin: dict[str, Any]
    """Paths, names and software versions; recorded and shown, never compared."""

    def to_json(self) -> dict[str, Any]:
        """Return the document without its checksum."""
        return {"format": "dflash-run", "format_version": 1, **asdict(self)}

    @classmethod
    def read(cls, run: Path) -> "RunRecord":
        """Return a run folder's record; `DflashError` if the folder is no run."""
        path = run / RUN
        if not path.is_file():
            raise DflashError(f"{run} is not a training run: it has no {RUN}. Make one with `dflash train`.")
        document = read_sealed(path)
        return cls(identity=document["identity"], origin=document["origin"])


def settings_identity(config: TrainConfig) -> dict[str, Any]:
    """Return the settings that decide what a run computes."""
    settings = {name: value for name, value in asdict(config).items() if name not in NOT_IDENTITY}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}


def refuse_other_run(run: Path, have: dict[str, Any], want: dict[str, Any]) -> None:
    """Raise `MismatchError` with a table of fields if a run was started from something else than is asked for."""
    rows = differences(have, want)
    if rows:
        raise MismatchError(
            f"{run} was started with other settings or from another cache:\n"
            f"{mismatch_table(rows, found='run', asked='now')}\n"
            f"Repeat the command that started it to go on with it, or name a new --out."
        )
