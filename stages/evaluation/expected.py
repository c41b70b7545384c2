"""The speed to expect of each number of drafted tokens, from what is accepted and what a round costs."""

import statistics
from collections import defaultdict
from collections.abc import Sequence

from dflash_offline.schemas.results.draft_lengths import DraftLength, ExpectedSpeeds, ServedCost, StepCosts
from dflash_offline.schemas.results.rounds import Acceptance

HERE = "the steps timed here"
SCALED = "the steps timed here, as many times as long as the server's round is"
FITTED = "a line through the server's rounds"


def expected_speeds(
    lengths: Sequence[DraftLength], costs: Sequence[StepCosts], served: Sequence[ServedCost]
) -> tuple[ExpectedSpeeds, ...]:
    """Return the speeds to expect at each concurrency; a server's own costs go before those measured here.

    A server's rounds at two or more numbers of drafted tokens give their line; at one, the steps timed here are taken
    as many times as long as that round shows them to be, if there are any.
    """
    local = {cost.concurrency: cost for cost in costs}
    by_concurrency: dict[int, list[ServedCost]] = defaultdict(list)
    for cost in served:
        by_concurrency[cost.concurrency].append(cost)
    found = []
    for concurrency in dict.fromkeys([*local, *by_concurrency]):
        seconds = _round_seconds(local.get(concurrency), by_concurrency[concurrency], len(lengths))
        if seconds is not None:
            found.append(_speeds(lengths, concurrency, *seconds))
    return tuple(found)


def _round_seconds(
    local: StepCosts | None, served: Sequence[ServedCost], num_lengths: int
) -> tuple[str, tuple[float, ...], float | None] | None:
    """Return what the costs follow from, the seconds of a round of each length, and of a plain step, if it is known."""
    rounds: dict[int, list[float]] = defaultdict(list)
    for cost in served:
        rounds[cost.num_speculative_tokens].append(cost.round_s)
    points = {number: statistics.median(seconds) for number, seconds in rounds.items()}
    steps = [cost.plain_step_s for cost in served if cost.plain_step_s is not None]
    plain = statistics.median(steps) if steps else None
    if len(points) >= 2:
        return FITTED, _line(points, num_lengths), plain
    if local is None:
        return None
    if not points:
        return HERE, local.round_s, local.plain_s
    ((number, seconds),) = points.items()
    if number > num_lengths:
        return None
    scale = seconds / local.round_s[number - 1]
    return SCALED, tuple(scale * each for each in local.round_s), plain


def _line(points: dict[int, float], num_lengths: int) -> tuple[float, ...]:
    """Return the values at 1, 2, ... of the least-squares line through some points; a longer block is never cheaper."""
    mean_x, mean_y = statistics.fmean(points), statistics.fmean(points.values())
    spread = sum((x - mean_x) ** 2 for x in points)
    slope = max(sum((x - mean_x) * (y - mean_y) for x, y in points.items()) / spread, 0.0)
    # Of a steep line the start could lie below nothing; a round takes at least half of the shortest that was seen.
    return tuple(max(mean_y + slope * (x - mean_x), min(points.values()) / 2) for x in range(1, num_lengths + 1))


def _speeds(
    lengths: Sequence[DraftLength], concurrency: int, costs: str, round_s: tuple[float, ...], plain_s: float | None
) -> ExpectedSpeeds:
    speeds = _tokens_per_s([one.acceptance for one in lengths], concurrency, round_s)
    kinds = lengths[0].acceptance_by_kind
    by_kind = {
        kind: _best(_tokens_per_s([one.acceptance_by_kind[kind] for one in lengths], concurrency, round_s))
        for kind in kinds
    }
    return ExpectedSpeeds(
        concurrency=concurrency,
        costs=costs,
        round_s=round_s,
        tokens_per_s=speeds,
        speedup=None if plain_s is None else tuple(speed * plain_s / concurrency for speed in speeds),
        num_speculative_tokens=_best(speeds),
        by_kind=by_kind,
    )


def _tokens_per_s(acceptances: Sequence[Acceptance], concurrency: int, round_s: Sequence[float]) -> tuple[float, ...]:
    pairs = zip(acceptances, round_s, strict=True)
    return tuple(concurrency * (one.pooled or 0.0) / seconds for one, seconds in pairs)


def _best(speeds: Sequence[float]) -> int:
    """Return the number of drafted tokens that is fastest; of equally fast ones the smallest."""
    return 1 + max(range(len(speeds)), key=speeds.__getitem__)
