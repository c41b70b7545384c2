"""A run folder: run.json says what is trained from what; checkpoints and metrics lie beside it."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypedDict

from msgspec import Meta

from dflash_offline.schemas.checked import Count, FilePath, PathWithin, Sha256, checked
from dflash_offline.schemas.draft.config import DraftConfig
from dflash_offline.schemas.errors import DflashError
from dflash_offline.schemas.identity import differences, refuse_differences
from dflash_offline.schemas.sealed import read_sealed
from dflash_offline.schemas.settings.option import Role, options
from dflash_offline.schemas.settings.train import TrainConfig

RUN, CONFIG, METRICS, EVENTS = "run.json", "config.toml", "metrics.jsonl", "tensorboard"
CHECKPOINTS, STATE = "checkpoints", "state.json"
CHECKPOINT = re.compile(r"step-\d{7,}")
"""Name of a checkpoint's folder in there."""
FORMAT_VERSION = 3
STEPS = ("steps", "epochs")


class _Settings(TypedDict):
    steps: Count | None
    weights: list[float]
    val_samples: Count
    val_every: Count
    epochs: NotRequired[float | None]


class _Identity(TypedDict):
    settings: _Settings
    caches: Annotated[list[Sha256], Meta(min_length=1)]
    draft: dict[str, Any]
    init_from: NotRequired[str | None]


class _Target(TypedDict):
    config_sha256: Sha256


class _Origin(TypedDict):
    target: str
    target_identity: _Target
    caches: Annotated[list[FilePath], Meta(min_length=1)]
    software: dict[str, str]
    total_steps: NotRequired[Count | None]
    target_architectures: NotRequired[list[str] | None]


@dataclass(frozen=True, kw_only=True)
class _Document:
    """What is read of a run's record, which holds more."""

    identity: _Identity
    origin: _Origin

    def __post_init__(self) -> None:
        if len(self.identity["caches"]) != len(self.origin["caches"]):
            raise ValueError("origin.caches are not as many as identity.caches")


class SavedState(TypedDict):
    """What is read of a checkpoint's state without torch."""

    step: Count
    """Finished optimizer steps."""
    files: dict[PathWithin, Sha256]
    best_step: NotRequired[Count]
    """Step of the best validation so far; 0 for none."""
    best_walk: NotRequired[float]
    tokens: NotRequired[Count]


def read_saved_state(checkpoint: Path) -> tuple[SavedState, dict[str, Any]]:
    """Return a checkpoint's state, as far as it is read without torch, and whole; `CacheError` if it is none."""
    path = checkpoint / STATE
    document = read_sealed(path)
    return checked(document, SavedState, path), document


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """What made a run; written before its first step."""

    identity: dict[str, Any]
    """Settings, caches and draft; compared on resume."""
    origin: dict[str, Any]
    """Paths, names and software versions; recorded and shown, never compared."""
    checksum: str = ""
    """Of the document as it was read."""

    def to_json(self) -> dict[str, Any]:
        """Return the document without its checksum."""
        return {
            "format": "dflash-run",
            "format_version": FORMAT_VERSION,
            "identity": self.identity,
            "origin": self.origin,
        }

    @classmethod
    def read(cls, run: Path) -> "RunRecord":
        """Return a run folder's record; `DflashError` if the folder is no run."""
        path = run / RUN
        if not path.is_file():
            raise DflashError(f"{run} is not a training run: it has no {RUN}. Make one with `dflash train`.")
        document = read_sealed(path)
        if document.get("format_version") != FORMAT_VERSION:
            raise DflashError(
                f"{path} has format version {document.get('format_version')!r}; this program reads version "
                f"{FORMAT_VERSION}. Go on with the version that wrote it, or name a new --out."
            )
        checked(document, _Document, path)
        DraftConfig.from_record(document["identity"]["draft"], path)
        return cls(identity=document["identity"], origin=document["origin"], checksum=document["checksum"])


def begun_settings(run: Path) -> dict[str, Any] | None:
    """Return the settings on a run folder's record; None without a record that can be read, which is refused later."""
    try:
        settings: dict[str, Any] = RunRecord.read(run).identity["settings"]
    except DflashError:
        return None
    return settings


def _of_roles(*roles: Role) -> set[str]:
    return {name for name, option in options(TrainConfig).items() if option.role in roles}


def settings_identity(config: TrainConfig) -> dict[str, Any]:
    """Return the settings in a run's record; what else decides what it computes is there as what it comes to."""
    names = _of_roles("identity", "recorded")
    settings = {name: value for name, value in vars(config).items() if name in names}
    if config.steps:
        settings["epochs"] = None
    settings["weights"] = [float(weight) for weight in config.weights or [1.0] * len(config.caches)]
    return {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}


def refuse_other_run(run: Path, identity: dict[str, Any], total_steps: int) -> None:
    """Raise `MismatchError` with a table of fields if a run was started from something else than is asked for.

    Compared is what settings resolve to, so that a default may be said explicitly. Draft settings are compared in the
    draft's config, and `steps` with `epochs` by the number of steps that they give.
    """
    record = RunRecord.read(run)
    elsewhere = {*_of_roles("recorded"), *(STEPS if record.origin.get("total_steps") == total_steps else ())}
    refuse_differences(
        f"{run} was started with other settings or from other caches",
        differences(_without_settings(record.identity, elsewhere), _without_settings(identity, elsewhere)),
        ("run", "now"),
        "Repeat the command that started it to go on with it, or name a new --out.",
    )


def _without_settings(identity: dict[str, Any], names: set[str]) -> dict[str, Any]:
    return {**identity, "settings": {name: v for name, v in identity["settings"].items() if name not in names}}
