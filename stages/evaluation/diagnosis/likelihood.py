"""Which change explains what was served: tests on counts of rounds, such that a healthy draft is not accused.

Counts of rounds are a vector [1 + m]: how many rounds there were, and how many accepted at least 1, 2, ... m tokens.
Slot k was tried in the rounds that accepted k - 1, and passed in those that accepted k, so its conditional
acceptance is a binomial proportion, and a whole profile a product of m of them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Counts = NDArray[np.float64]
ERROR_RATE = 0.01
"""Of accusing a healthy draft."""
_LIKELY = math.log(20)
"""Changes whose log-likelihoods differ by less are not told apart."""
_DRAWS = 400
_ROUNDING = 0.01
"""Of a deviance a slot: what a few rounds in a thousand that differ by rounding make; less is no better fit."""
_MOST_LEFT = 0.5
"""Share of the unexplained that may be left by a change that is named."""
_NEAR = 0.1
"""The same where other prompts were served, whose own profile differs a little."""
_LEAST_LOSS = 0.05
"""Share of the accepted tokens that other prompts than the walked ones may cost without anything being wrong."""
_NORMAL = 3.3
"""Standard deviations beyond which chance is no explanation: one in a thousand."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the tests say."""

    differs: bool
    """Whether the draft as it was trained does not explain what was served."""
    named: tuple[int, ...]
    """The changes that do, by their index; several where the counts do not tell them apart. 0 is no change."""
    scores: tuple[float, ...]
    """How badly each change fits, the draft as it was trained first; comparable with each other alone."""


def accepted_a_round(counts: Counts) -> float:
    """Return how many drafted tokens a round accepts."""
    return float(counts[1:].sum() / max(counts[0], 1))


def deviance(served: Counts, walked: Counts) -> float:
    """Return twice the log-likelihood ratio of two profiles being different to their being one.

    It is summed over slots, each a table of two binomial proportions (the G statistic); chi-square with m degrees of
    freedom if rounds were independent, which those of one prompt are not.
    """
    tried = np.stack((served[:-1], walked[:-1]))
    passed = np.stack((served[1:], walked[1:]))
    rate = passed.sum(axis=0) / np.maximum(tried.sum(axis=0), 1e-12)
    return 2 * float((_plogp(passed, tried * rate) + _plogp(tried - passed, tried * (1 - rate))).sum())


def _plogp(seen: Counts, expected: Counts) -> Counts:
    is_there = seen > 0
    return np.where(is_there, seen * np.log(np.where(is_there, seen, 1) / np.maximum(expected, 1e-12)), 0)


def judge_other_prompts(served: Counts, walked: Sequence[Counts], seed: int = 0) -> Verdict:
    """Judge counts over prompts of the same kinds as the walked ones, but not the same.

    `walked` holds the counts [P, 1 + m] of each change, text by text. How much two sets of prompts differ by chance is
    drawn from the walked texts themselves, whole texts at a time.
    """
    found = [deviance(served, counts.sum(axis=0)) for counts in walked]
    chance = _chance(served, walked[0], np.random.default_rng(seed))
    scale = float(np.mean(chance)) / (len(served) - 1)
    limit = float(np.quantile(chance, 1 - ERROR_RATE))
    lost = accepted_a_round(served) < (1 - _LEAST_LOSS) * accepted_a_round(walked[0].sum(axis=0))
    differs = lost and found[0] > limit
    return Verdict(
        differs=differs,
        named=_likeliest([value / (2 * scale) for value in found], max(limit, _NEAR * found[0]) / (2 * scale))
        if differs
        else (),
        scores=tuple(value / scale for value in found),
    )


def _chance(served: Counts, walked: Counts, random: np.random.Generator) -> Counts:
    """Return deviances of as many served rounds, drawn text by text from the walked ones, to such a walk."""
    walked = walked[walked[:, 0] > 0]
    even = np.full(len(walked), 1 / len(walked))
    num_served = max(1, round(float(served[0] / walked[:, 0].mean())))
    draws = []
    for _ in range(_DRAWS):
        drawn = random.multinomial(num_served, even) @ walked
        draws.append(deviance(drawn * (served[0] / drawn[0]), random.multinomial(len(walked), even) @ walked))
    return np.array(draws)


def _likeliest(misfits: Sequence[float], most: float) -> tuple[int, ...]:
    """Return the changes as likely as the best, if that fits; `misfits` are negative log-likelihoods."""
    best = min(misfits)
    return tuple(i for i, value in enumerate(misfits) if value - best < _LIKELY) if best <= most else ()


def judge_same_prompts(served: Counts, walked: Sequence[Counts], noise: float = 0.0) -> Verdict:
    """Judge counts over the very prompts that were walked: only rounding, of unknown size, tells them from the truth.

    With the size of the rounding fitted too, the log-likelihood of a change is -m/2 times the logarithm of its
    deviance a slot. `noise` is the deviance that another data type is known to make.
    """
    slots = len(served) - 1
    found = [deviance(served, counts.sum(axis=0)) for counts in walked]
    misfits = [slots / 2 * math.log(max(value / slots, _ROUNDING)) for value in found]
    chance = math.log(len(found) / ERROR_RATE)
    better = [i for i, value in enumerate(misfits) if misfits[0] - value > chance and found[i] <= _MOST_LEFT * found[0]]
    lost = accepted_a_round(served) < accepted_a_round(walked[0].sum(axis=0))
    lost = lost and found[0] > max(slots * _ROUNDING, 2 * noise)
    return Verdict(
        differs=bool(better) or lost,
        named=tuple(i for i in better if misfits[i] - min(misfits) < _LIKELY),
        scores=tuple(found),
    )


def judge_prompt_by_prompt(served: Counts, walked: Sequence[Counts], rounding: Counts | None = None) -> Verdict:
    """Judge counts that are known for each walked prompt alone, [P, 1 + m] both.

    A change is nearer than another at the prompts where the counts under it differ less from the served ones. If both
    are wrong, or rounding alone decides, each is nearer as often as the other: a sign test. Named is what is nearer
    than no change, is not beaten by the nearest, and leaves no difference in the rounds altogether. `rounding` holds
    the counts in another data type: what was served may be as far from the first change's as these are.
    """
    distances = np.stack([np.abs(counts - served).sum(axis=1) for counts in walked])
    scores = distances.sum(axis=1)
    best = int(scores.argmin())
    net = [(served - counts)[:, 0] for counts in walked]
    too_far = rounding is not None and _nearer(np.abs(rounding - walked[0]).sum(axis=1), distances[0]) < ERROR_RATE
    allowed = ERROR_RATE / max(len(walked) - 1, 1)
    fitting = [
        i
        for i in range(1, len(walked))
        if _nearer(distances[i], distances[0]) < allowed
        and scores[i] <= _MOST_LEFT * scores[0]
        and not is_systematic(net[i])
        and (i == best or _nearer(distances[best], distances[i]) > ERROR_RATE)
    ]
    return Verdict(
        differs=bool(fitting) or bool(too_far) or (is_systematic(net[0]) and net[0].sum() > 0),
        named=tuple(fitting),
        scores=tuple(float(s) for s in scores),
    )


def _nearer(a: Counts, b: Counts) -> float:
    """Return the probability that `a` is below `b` so often by chance, where they differ."""
    wins, losses = int((a < b).sum()), int((a > b).sum())
    tried = wins + losses
    return sum(math.comb(tried, i) for i in range(wins, tried + 1)) / 2**tried


def is_systematic(differences: Counts) -> bool:
    """Say whether differences, one a prompt, have a sum that chance in their signs does not explain."""
    spread = math.sqrt(float((differences**2).sum()))
    return spread > 0 and abs(float(differences.sum())) > _NORMAL * spread
