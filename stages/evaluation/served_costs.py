"""What a round took on live servers: of the one that is measured, and of results that were saved before."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dflash_offline.schemas.errors import BadInputError, MismatchError
from dflash_offline.schemas.evaluation import Counted, Service, read_result
from dflash_offline.schemas.results.draft_lengths import ServedCost
from dflash_offline.schemas.settings.evaluate import EvalConfig
from dflash_offline.stages.serving.stream import StreamedAnswer

_WHAT_TO_DO = "Name a result of `dflash eval --server URL --save FILE`."


def step_seconds(answers: Sequence[StreamedAnswer]) -> float | None:
    """Return the seconds of a token after the first of an answer, over all answers; None where none has a second."""
    timed = [(a.first, a.last, (a.num_tokens or 0) - 1) for a in answers]
    seconds = sum(last - first for first, last, _ in timed if first is not None and last is not None)
    tokens = sum(more for *_, more in timed if more > 0)
    return seconds / tokens if tokens and seconds > 0 else None


def round_seconds(answers: Sequence[StreamedAnswer], counted: Counted | None) -> float | None:
    """Return the seconds of a round, the prompts' own forwards left out; None where the rounds were not counted."""
    step, tokens = step_seconds(answers), sum(max((a.num_tokens or 0) - 1, 0) for a in answers)
    if step is None or counted is None or counted.is_disturbed:
        return None
    if counted.rounds:
        return step * tokens / counted.rounds
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
