"""What a user may set for `dflash verify --target`. Each default exists here and nowhere else."""

from dataclasses import dataclass

from dflash_offline.schemas.settings.shared import refuse


@dataclass(frozen=True, kw_only=True)
class RerunConfig:
    """Settings of `dflash verify --target`: how a target is run again; what is None is as the cache was made."""

    target: str
    """Hugging Face model: a folder, or a hub id."""
    samples: int = 8
    """Samples to run it on."""
    seed: int = 0
    """Draws those samples."""
    revision: str | None = None
    """Revision of a hub id."""
    trust_remote_code: bool = False
    """Run code that comes with the model."""
    attn_implementation: str | None = None
    """As transformers names it."""
    device: str = "auto"
    """cpu, cuda or cuda:N; auto takes a GPU if there is one."""
    device_map: str | None = None
    """Spread the target over several devices as transformers does."""

    def __post_init__(self) -> None:
        lows = (("samples", 1), ("seed", 0))
        refuse(
            "verify",
            [
                f"{name} is {getattr(self, name)}; expected at least {low}."
                for name, low in lows
                if getattr(self, name) < low
            ],
        )
