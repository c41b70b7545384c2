"""What a diagnosis found."""

import json
from dataclasses import asdict, dataclass
from typing import Any

from dflash_offline.schemas.settings.diagnose import DiagnoseConfig

EACH_PROMPT, SAME_PROMPTS, OTHER_PROMPTS = "each prompt", "the same prompts", "other prompts"
"""What the served counts are compared over, from the strongest evidence to the weakest."""
HEALTHY, EXPLAINED, UNEXPLAINED = "as offline", "explained", "unexplained"


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Acceptance over some rounds."""

    length: float
    """Tokens a round."""
    shares: tuple[float, ...]
    """Of all rounds, the share that accepted at least 1, 2, ... tokens; empty where the length alone is known."""
    rounds: int | None


@dataclass(frozen=True, kw_only=True)
class Tried:
    """The draft run offline, with one thing changed or none."""

    cause: str
    title: str
    rates: Rates
    misfit: float | None = None
    """How badly it explains what was served; of one diagnosis alone."""
    same_prompts: int | None = None
    """Prompts with exactly the served counts, where each prompt's are known."""


@dataclass(frozen=True, kw_only=True)
class Cause:
    """A cause of what was served."""

    cause: str
    titles: tuple[str, ...]
    """The changes that show it; several where they give the same rounds."""
    evidence: str
    remedies: dict[str, str]
    """What to do, by client."""


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """What was served, what each change gives offline, and what explains the difference."""

    config: DiagnoseConfig
    source: str | None
    """Where what was served is known from; None if nothing was."""
    client: str | None
    scope: str | None
    """EACH_PROMPT, SAME_PROMPTS or OTHER_PROMPTS."""
    texts: int
    """Answers walked."""
    held_out: bool
    """Whether the cache's samples were held out of the draft's training."""
    served: Rates | None
    tried: tuple[Tried, ...]
    """The draft as it was trained first."""
    outcome: str | None
    """HEALTHY, EXPLAINED or UNEXPLAINED; None if nothing was served."""
    causes: tuple[Cause, ...]
    not_tried: tuple[str, ...]
    """What could not be tried, and why."""
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the diagnosis as plain JSON values."""
        document: dict[str, Any] = json.loads(json.dumps(asdict(self), default=str))
        return document
