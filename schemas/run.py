"""A run folder: run.json says what is trained from what; checkpoints and metrics lie beside it."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dflash_offline.schemas.errors import DflashError, MismatchError, mismatch_table
from dflash_offline.schemas.files import read_sealed
from dflash_offline.schemas.manifest import differences
from dflash_offline.schemas.settings.train import TrainConfig

RUN, CONFIG, METRICS, EVENTS = "run.json", "config.toml", "metrics.jsonl", "tensorboard"
FORMAT_VERSION = 3
NOT_IDENTITY = (
    "caches out init_from device keep patience save_every loader_threads attention_backend gradient_checkpointing "
    "compile report_to causal_layers"
).split()
"""Settings that change where, how fast and how far a run goes, never what it computes; a resume may change them.
Caches and the draft it starts from are identified by content instead, and causality in the draft's shape."""

IN_DRAFT = (
    "block_size layers draft_layers draft_heads draft_kv_heads draft_head_dim draft_intermediate_size "
    "draft_rope_theta draft_rms_norm_eps draft_max_position_embeddings sliding_window sliding_layers"
).split()
"""Settings that are recorded as they were asked for, None for a default; what they resolve to is in the draft."""
STEPS = ("steps", "epochs")


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
        return cls(identity=document["identity"], origin=document["origin"], checksum=document["checksum"])


def settings_identity(config: TrainConfig) -> dict[str, Any]:
    """Return the settings that decide what a run computes."""
    settings = {name: value for name, value in asdict(config).items() if name not in NOT_IDENTITY}
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
    elsewhere = {*IN_DRAFT, *(STEPS if record.origin.get("total_steps") == total_steps else ())}
    rows = differences(*(_without_settings(one, elsewhere) for one in (record.identity, identity)))
    if rows:
        raise MismatchError(
            f"{run} was started with other settings or from other caches:\n"
            f"{mismatch_table(rows, found='run', asked='now')}\n"
            f"Repeat the command that started it to go on with it, or name a new --out."
        )


def _without_settings(identity: dict[str, Any], names: set[str]) -> dict[str, Any]:
    return {**identity, "settings": {name: v for name, v in identity["settings"].items() if name not in names}}
