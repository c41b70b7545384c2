"""The tests that name a cause: what they find, and that chance and rounding accuse nobody."""

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from dflash_offline.stages.evaluation.diagnosis.known_text import count_rounds
from dflash_offline.stages.evaluation.diagnosis.likelihood import (
    deviance,
    judge_other_prompts,
    judge_prompt_by_prompt,
    judge_same_prompts,
)

SLOTS, PROMPTS, TOKENS = 7, 80, 60


def prompts(random: np.random.Generator, skill: float, count: int = PROMPTS) -> NDArray[np.float64]:
    """Return the counts of prompts that differ in how easy they are, as real ones do; `skill` shifts all of them."""
    rows = []
    for ease in random.normal(skill, 0.5, count):
        rate = 1 / (1 + math.exp(-ease))
        left, accepted = TOKENS, []
        while left > 0:
            accepted.append(min(int(random.geometric(1 - rate)) - 1, SLOTS))
            left -= accepted[-1] + 1
        rows.append(count_rounds(accepted, SLOTS))
    return np.stack(rows)


def test_rounds_are_counted_by_how_many_tokens_they_accept_at_least() -> None:
    assert count_rounds([0, 3, 1, 3], 4).tolist() == [4, 3, 2, 2, 0]
    assert count_rounds([], 2).tolist() == [0, 0, 0]


def test_the_deviance_is_that_of_two_by_two_tables() -> None:
    served, walked = np.array([100.0, 80.0, 20.0]), np.array([50.0, 30.0, 15.0])
    by_hand = 0.0
    for table in ([[80, 20], [30, 20]], [[20, 60], [15, 15]]):
        seen = np.array(table, dtype=float)
        expected = seen.sum(axis=1, keepdims=True) * seen.sum(axis=0) / seen.sum()
        by_hand += 2 * float((seen * np.log(seen / expected)).sum())
    assert deviance(served, walked) == pytest.approx(by_hand)
    assert deviance(served, 7 * served) == pytest.approx(0)
    assert math.isfinite(deviance(np.array([10.0, 0.0, 0.0]), np.array([10.0, 10.0, 10.0])))


def test_other_prompts_of_a_healthy_draft_are_seldom_accused() -> None:
    random = np.random.default_rng(0)
    verdicts = []
    for _ in range(60):
        walked = [prompts(random, 1.0), prompts(random, 0.8), prompts(random, 0.6)]
        verdicts.append(judge_other_prompts(prompts(random, 1.0).sum(axis=0), walked))
    assert sum(verdict.differs for verdict in verdicts) <= 3


def test_other_prompts_name_the_change_with_their_profile_and_what_cannot_be_told_from_it() -> None:
    random = np.random.default_rng(1)
    served = prompts(random, -1.0, 200).sum(axis=0)
    walked = [prompts(random, skill) for skill in (1.0, 0.0, -1.0, -3.0)]
    assert judge_other_prompts(served, walked).named == (2,)
    twin = judge_other_prompts(served, [*walked, walked[2]])
    assert twin.differs and twin.named == (2, 4)
    nothing = judge_other_prompts(served, [walked[0], prompts(random, 2.0)])
    assert nothing.differs and nothing.named == ()


def test_a_served_profile_that_is_better_is_no_fault() -> None:
    random = np.random.default_rng(2)
    assert not judge_other_prompts(prompts(random, 2.0).sum(axis=0), [prompts(random, 0.0)] * 2).differs


def disturbed(random: np.random.Generator, counts: NDArray[np.float64], share: float) -> NDArray[np.float64]:
    """Return the counts with a share of the prompts decoded anew, as rounding does it; no worse on average."""
    again = prompts(random, 1.0, len(counts))
    return np.where(random.random((len(counts), 1)) < share, again, counts)


def test_prompt_by_prompt_rounding_accuses_nobody() -> None:
    random = np.random.default_rng(3)
    named = 0
    for _ in range(100):
        base = prompts(random, 1.0)
        walked = [base, *(disturbed(random, base, share) for share in (0.2, 0.5, 0.8, 0.5, 0.5))]
        verdict = judge_prompt_by_prompt(disturbed(random, base, 0.3), walked)
        named += verdict.differs
    assert named <= 2


def test_prompt_by_prompt_the_nearest_change_is_named_through_rounding() -> None:
    random = np.random.default_rng(4)
    base = prompts(random, 1.0)
    walked = [base, *(disturbed(random, base, 0.6) for _ in range(4))]
    for rounding in (0.0, 0.2):
        verdict = judge_prompt_by_prompt(disturbed(random, walked[3], rounding), walked)
        assert verdict.differs and verdict.named == (3,)
    assert judge_prompt_by_prompt(walked[3], [*walked, walked[3]]).named == (3, 5)


def test_prompt_by_prompt_a_loss_that_no_change_explains_is_said() -> None:
    random = np.random.default_rng(5)
    base = prompts(random, 1.0)
    verdict = judge_prompt_by_prompt(prompts(random, 0.0), [base, disturbed(random, base, 0.5)])
    assert verdict.differs and verdict.named == ()


def test_prompt_by_prompt_what_is_further_away_than_rounding_is_said() -> None:
    random = np.random.default_rng(7)
    base = prompts(random, 1.0)
    rounding, walked = disturbed(random, base, 0.15), [base, disturbed(random, base, 0.5)]
    served = disturbed(random, base, 0.6)
    assert judge_prompt_by_prompt(served, walked, rounding).differs
    assert not judge_prompt_by_prompt(disturbed(random, base, 0.15), walked, rounding).differs


def test_of_the_same_prompts_totals_alone_suffice() -> None:
    random = np.random.default_rng(6)
    base = prompts(random, 1.0)
    walked = [base, *(disturbed(random, base, 0.5) for _ in range(6))]
    assert judge_same_prompts(base.sum(axis=0), walked).differs is False
    verdict = judge_same_prompts(walked[2].sum(axis=0), walked)
    assert verdict.differs and verdict.named == (2,)
    assert judge_same_prompts(disturbed(random, base, 0.02).sum(axis=0), walked).named == ()
    worse = judge_same_prompts(prompts(random, 0.0).sum(axis=0), walked)
    assert worse.differs and worse.named == ()
