"""What a round took on live servers: of the one that is measured, and of results that were saved before."""

from pathlib import Path
from typing import Any

from dflash_offline.schemas.errors import BadInputError, MismatchError
from dflash_offline.schemas.evaluation import Service, read_result
from dflash_offline.schemas.results.draft_lengths import ServedCost
from dflash_offline.schemas.settings.evaluate import EvalConfig
from dflash_offline.stages.serving.measure import Pass

_WHAT_TO_DO = "Name a result of `dflash eval --server URL --save FILE`."


def step_seconds(one: Pass, concurrency: int) -> float | None:
    """Return the seconds of a token after the first of an answer, its share of the prompts' forwards with them.

    They are of the whole pass, since what is sent together may be read late: when a token came is not exact.
    """
    tokens = one.num_tokens - len(one.answers)
    return one.seconds * min(concurrency, len(one.answers)) / tokens if tokens > 0 else None


def round_seconds(one: Pass, concurrency: int) -> float | None:
    """Return the seconds of a round likewise; None where the server did not count the rounds of these answers."""
    step, counted = step_seconds(one, concurrency), one.counted
    if step is None or counted is None or counted.is_disturbed:
        return None
    if counted.rounds:
        return step * (one.num_tokens - len(one.answers)) / counted.rounds
    return step * counted.acceptance_length if counted.acceptance_length else None


def costs_of(service: Service) -> list[ServedCost]:
    """Return what the rounds of each pass took, as far as the server tells how many there were."""
    if service.num_speculative_tokens is None:
        return []
    return [
        ServedCost(
            concurrency=one.concurrency,
            num_speculative_tokens=service.num_speculative_tokens,
            round_s=one.round_s,
            plain_step_s=one.plain_step_s,
        )
        for one in service.passes
        if one.round_s is not None
    ]


def saved_costs(config: EvalConfig, trained: dict[str, Any] | None) -> list[ServedCost]:
    """Return what the results that `--speeds` names hold; `DflashError` if one is of another draft or of no server."""
    return [cost for path in config.speeds for cost in _saved(path, config, trained)]


def _saved(path: Path, config: EvalConfig, trained: dict[str, Any] | None) -> list[ServedCost]:
    result = read_result(path, _WHAT_TO_DO)
    theirs, service = result["trained"], result.get("service")
    if trained and theirs and any(trained.get(name) != theirs.get(name) for name in ("run", "step")):
        raise MismatchError(
            f"{path} was measured with another draft: run {theirs.get('run')}, step {theirs.get('step')}; expected run "
            f"{trained.get('run')}, step {trained.get('step')}. Measure this draft, or leave the file out."
        )
    if (result["config"].get("temperature") or 0.0) != config.temperature:
        raise MismatchError(
            f"{path} was measured at temperature {result['config'].get('temperature')}; expected {config.temperature}. "
            f"Measure both alike."
        )
    number = service and service.get("num_speculative_tokens")
    passes = [one for one in (service or {}).get("passes", ()) if one.get("round_s") is not None]
    if not number or not passes:
        raise BadInputError(f"{path} holds no rounds of a live server. {_WHAT_TO_DO}")
    return [
        ServedCost(
            concurrency=one["concurrency"],
            num_speculative_tokens=number,
            round_s=one["round_s"],
            plain_step_s=one.get("plain_step_s"),
        )
        for one in passes
    ]
