"""A run as the terminal, the page, `--json` and the warnings read it."""

from dataclasses import dataclass, field
from typing import Any

from dflash_offline.pipeline.terminal import named

Rows = list[dict[str, Any]]
"""Rows of metrics.jsonl, oldest first; a number that is not finite is None."""


@dataclass(frozen=True)
class RunCache:
    """A cache that a run reads."""

    path: str
    manifest: str
    """Checksum of the manifest that the run was started with."""
    fault: str | None
    """What is wrong with what lies there now."""


@dataclass(frozen=True, kw_only=True)
class RunView:
    """A run's state, settings, rows of metrics and what looks wrong."""

    run: str
    target: str
    step: int
    total_steps: int | None
    epochs: float | None
    patience: int | None
    tokens_at_checkpoint: int | None
    checkpoints: list[int]
    """Steps that are saved."""
    best_step: int | None
    best_serving_walk: float | None
    last_training: dict[str, Any] | None
    last_validation: dict[str, Any] | None
    written_s_ago: float | None
    """Age of metrics.jsonl."""
    parameters: int
    draft: dict[str, Any]
    settings: dict[str, Any]
    init_from: Any
    caches: list[RunCache]
    evaluation: dict[str, Any] | None
    """The result of `dflash eval --save` beside the run."""
    software: dict[str, str]
    unreadable_rows: int
    training: Rows
    validation: Rows
    state: str
    warnings: list[str] = field(default_factory=list, metadata=named("faults"))


@dataclass(frozen=True)
class Comparison:
    """Several runs and in what they differ."""

    runs: list[RunView]
    differing_settings: dict[str, list[Any]]
    """Each setting that differs, with every run's value."""
