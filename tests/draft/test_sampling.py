"""Sampling: what comes out with a draft is distributed as the target alone is, and the test would notice if not."""

import itertools
import math
import re
from collections import Counter

import pytest
import torch
from running import some_slow
from tiny_decoding import SHAPE, random_prompts, tiny_draft_config, tiny_target
from torch import Tensor
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from dflash_offline.schemas.draft.config import DraftConfig
from dflash_offline.schemas.variants.dflash import DFlash
from dflash_offline.schemas.variants.dflash2 import DFlash2
from dflash_offline.schemas.variants.dspark import DSpark
from dflash_offline.schemas.variants.variant import Variant
from dflash_offline.stages.draft.decode import plain_decode, speculative_decode
from dflash_offline.stages.draft.model import DraftModel
from dflash_offline.stages.draft.sampling import Greedy, Proposal, Sampler, SamplingRule, Steps

CPU = torch.device("cpu")
PROPOSALS: tuple[Proposal, ...] = ("greedy", "drawn")


def p_value(counts: Tensor, expected: Tensor) -> float:
    """Return how probable so large a chi-square is if `counts` were drawn as `expected` says; rare cells are merged."""
    order = expected.argsort()
    counts, expected = counts[order].double(), expected[order].double()
    assert counts[expected == 0].sum() == 0, "something was drawn that cannot be"
    rare = int((expected.cumsum(0) < 8).sum()) + 1
    counts = torch.cat((counts[:rare].sum()[None], counts[rare:]))
    expected = torch.cat((expected[:rare].sum()[None], expected[rare:]))
    statistic = ((counts - expected) ** 2 / expected).sum()
    return float(torch.special.gammaincc(torch.tensor((len(counts) - 1) / 2).double(), statistic / 2))


class Careless(Sampler):
    """Keeps drafted tokens rightly, but replaces a rejected one by a draw from p instead of from what is left of it."""

    def verify(self, block: Tensor, logits: Tensor) -> tuple[int, list[int]]:
        agreed, answer = super().verify(block, logits)
        answer[-1] = int(self._draw(self._rule.probabilities(logits[0, agreed])[None]))
        return agreed, answer


def first_tokens(sampler: Sampler, target: Tensor, draft: Tensor, draws: int, top_k: int) -> Tensor:
    """Return how often each token came out first, one round of one drafted token each; logits are [V].

    With `top_k` it is drafted by a walk over so many candidates, or over all tokens if they are as many.
    """
    values, ids = draft[None].topk(top_k) if top_k < len(draft) else (draft[None], None)
    steps, anchor = Steps(scores=lambda *_: values, count=1, ids=ids), torch.zeros(1, dtype=torch.long)
    counts = torch.zeros(len(target))
    logits = torch.stack((target, torch.zeros_like(target)))[None]
    for _ in range(draws):
        drafted = sampler.walk(steps, anchor) if top_k else sampler.draft(draft[None, None])
        _, answer = sampler.verify(torch.cat((torch.zeros_like(drafted), drafted), dim=1), logits)
        counts[answer[0]] += 1
    return counts


def plain_rule(logits: list[float], temperature: float, top_p: float, top_k: int, min_p: float) -> list[float]:
    """Return the distribution that a token is drawn from, token by token as it is written down."""
    weights = [math.exp(logit / temperature) for logit in logits]
    kept = [token for token, weight in enumerate(weights) if weight >= min_p * max(weights)]
    kept = sorted(kept, key=lambda token: -weights[token])[: top_k or None]
    whole, before, chosen = sum(weights[token] for token in kept), 0.0, []
    for token in kept:
        if before < top_p:
            chosen.append(token)
        before += weights[token] / whole
    total = sum(weights[token] for token in chosen)
    return [weights[token] / total if token in chosen else 0.0 for token in range(len(weights))]


@pytest.mark.parametrize("top_p", [1.0, 0.8])
@pytest.mark.parametrize("top_k", [0, 1, 5, 40])
@pytest.mark.parametrize("min_p", [0.0, 0.2])
def test_the_tokens_that_may_be_drawn_are_those_of_the_plain_rule(top_p: float, top_k: int, min_p: float) -> None:
    logits = 2 * torch.randn(6, 30, generator=torch.Generator().manual_seed(0))
    rule = SamplingRule(temperature=0.7, top_p=top_p, top_k=top_k, min_p=min_p)
    wanted = torch.tensor([plain_rule(row, 0.7, top_p, top_k, min_p) for row in logits.tolist()])
    torch.testing.assert_close(rule.probabilities(logits), wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("top_k", [0, 4, pytest.param(10, marks=pytest.mark.slow)])
@pytest.mark.parametrize("proposal", PROPOSALS)
@pytest.mark.parametrize("rule", [SamplingRule(temperature=1.0), SamplingRule(temperature=1.3, top_p=0.8)])
def test_a_round_gives_the_targets_distribution_and_a_careless_one_does_not(
    rule: SamplingRule, proposal: Proposal, top_k: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    target, draft = torch.randn(2, 10, generator=generator) * 1.5
    expected = 3000 * rule.probabilities(target)
    right, careless = (kind(rule, 3, CPU, proposal=proposal) for kind in (Sampler, Careless))
    assert p_value(first_tokens(right, target, draft, 3000, top_k), expected) > 1e-3
    assert p_value(first_tokens(careless, target, draft, 3000, top_k), expected) < 1e-4


def test_a_greedy_draft_proposes_its_best_token_which_stays_as_often_as_the_target_would_draw_it() -> None:
    rule = SamplingRule(temperature=0.8)
    target, draft = torch.randn(2, 10, generator=torch.Generator().manual_seed(4))
    best, draws = int(draft.argmax()), 3000
    sampler = Sampler(rule, 5, CPU, proposal="greedy")
    logits, kept = torch.stack((target, target))[None], 0
    for _ in range(draws):
        drafted = sampler.draft(draft[None, None])
        assert int(drafted) == best
        agreed, answer = sampler.verify(torch.cat((torch.zeros_like(drafted), drafted), dim=1), logits)
        assert agreed == int(answer[0] == best), "a rejected token is never drawn again in its place"
        kept += agreed
    p = float(rule.probabilities(target)[best])
    assert abs(kept - draws * p) < 4 * (draws * p * (1 - p)) ** 0.5


def test_a_draft_equal_to_the_target_is_always_kept() -> None:
    rule = SamplingRule(temperature=0.9)
    logits = torch.randn(1, 5, 12, generator=torch.Generator().manual_seed(1))
    sampler = Sampler(rule, 0, CPU)
    for _ in range(200):
        drafted = sampler.draft(logits[:, :4])
        agreed, answer = sampler.verify(torch.cat((torch.zeros(1, 1, dtype=torch.long), drafted), dim=1), logits)
        assert agreed == 4 and answer[:4] == drafted[0].tolist() and len(answer) == 5


def test_top_p_keeps_the_likeliest_tokens_that_reach_it() -> None:
    logits = torch.tensor([[0.1, 0.5, 0.3, 0.1]]).log()
    for top_p, kept in ((0.4, [1]), (0.5, [1]), (0.6, [1, 2]), (0.85, None), (1.0, [0, 1, 2, 3])):
        probabilities = SamplingRule(temperature=1.0, top_p=top_p).probabilities(logits)[0]
        if kept is not None:
            assert probabilities.nonzero()[:, 0].tolist() == kept
        assert probabilities.sum() == pytest.approx(1.0)
    sharp = SamplingRule(temperature=0.5).probabilities(logits)[0]
    assert sharp == pytest.approx([0.01 / 0.36, 0.25 / 0.36, 0.09 / 0.36, 0.01 / 0.36])


VOCAB = 5


def small_pair(variant: Variant) -> tuple[PreTrainedModel, DraftModel]:
    """Return a random target of five tokens and a random draft of blocks of three, of which every part matters."""
    torch.manual_seed(1)
    shape = {**SHAPE, "vocab_size": VOCAB, "hidden_size": 16, "head_dim": 4, "intermediate_size": 16}
    target = Qwen3ForCausalLM(Qwen3Config(**{**shape, "num_hidden_layers": 3})).eval().requires_grad_(False)
    changes = {"vocab_size": VOCAB, "hidden_size": 16, "head_dim": 4, "intermediate_size": 16, "num_hidden_layers": 1}
    changes |= {"target_layer_ids": (0, 1), "num_target_layers": 3, "mask_token_id": 4}
    draft = DraftModel(DraftConfig(**{**vars(tiny_draft_config(3)), **changes, "variant": variant})).eval()
    for parameter in (p for name, p in draft.named_parameters() if re.search("_conv|selector|markov", name)):
        torch.nn.init.normal_(parameter, std=0.7)
    return target, draft


@torch.inference_mode()
def exact(target: PreTrainedModel, prompt: list[int], length: int, rule: SamplingRule) -> dict[tuple[int, ...], float]:
    """Return the probability of every answer, by running the target on all of them without a cache."""
    answers = list(itertools.product(range(VOCAB), repeat=length))
    rows = torch.tensor([[*prompt, *answer] for answer in answers])
    each = rule.probabilities(target(rows, use_cache=False).logits[:, len(prompt) - 1 : -1])
    joint = each.gather(-1, rows[:, len(prompt) :, None])[..., 0].prod(dim=1)
    return dict(zip(answers, joint.tolist(), strict=True))


@pytest.mark.parametrize(
    "variant",
    [
        DFlash(),
        pytest.param(DFlash2(conv_group_size=4, selector_rank=3, selector_top_k=3), marks=pytest.mark.slow),
        pytest.param(DSpark(markov_rank=3), marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("proposal", some_slow(PROPOSALS, "greedy"))
@pytest.mark.parametrize(
    ("rule", "draws"),
    [
        (SamplingRule(temperature=0.8), 500),
        pytest.param(SamplingRule(temperature=0.7, top_p=0.9), 3000, marks=pytest.mark.slow),
    ],
)
def test_whole_answers_are_distributed_as_the_targets_own(
    rule: SamplingRule, draws: int, proposal: Proposal, variant: Variant
) -> None:
    target, draft = small_pair(variant)
    prompt, length = [1, 2, 0], 3
    wanted = exact(target, prompt, length, rule)
    expected = draws * torch.tensor(list(wanted.values()))
    sampler, careless = (kind(rule, 7, CPU, proposal=proposal) for kind in (Sampler, Careless))
    found, kept = Counter[tuple[int, ...]](), Counter[int]()
    for _ in range(draws):
        decoded = speculative_decode(target, draft, prompt, length, (), sampler)
        found[tuple(decoded.tokens)] += 1
        kept.update(decoded.kept)
    assert len(kept) == 3, "drafted tokens are to be kept sometimes and rejected sometimes"
    assert p_value(torch.tensor([found[answer] for answer in wanted]), expected) > 1e-3
    faulty = Counter[tuple[int, ...]]()
    for _ in range(draws):
        faulty[tuple(speculative_decode(target, draft, prompt, length, (), careless).tokens)] += 1
    assert p_value(torch.tensor([faulty[answer] for answer in wanted]), expected) < 1e-6


def test_the_same_seed_gives_the_same_answer_and_another_seed_another() -> None:
    target = tiny_target("qwen3")
    draft = DraftModel(tiny_draft_config()).eval()
    rule, prompt = SamplingRule(temperature=1.0), random_prompts(1)[0]

    def answer(seed: int) -> list[int]:
        return speculative_decode(target, draft, prompt, 30, (), Sampler(rule, seed, CPU)).tokens

    def plain(seed: int) -> list[int]:
        return plain_decode(target, prompt, 30, (), Sampler(rule, seed, CPU)).tokens

    assert answer(1) == answer(1) != answer(2)
    assert plain(1) == plain(1) != plain(2)


def test_a_temperature_near_zero_is_greedy() -> None:
    target = tiny_target("qwen3")
    draft = DraftModel(tiny_draft_config()).eval()
    rule = SamplingRule(temperature=1e-4)
    for prompt, proposal in itertools.product(random_prompts(2), PROPOSALS):
        greedy = speculative_decode(target, draft, prompt, 24, (), Greedy())
        cold = speculative_decode(target, draft, prompt, 24, (), Sampler(rule, 0, CPU, proposal=proposal))
        assert (cold.tokens, cold.produced) == (greedy.tokens, greedy.produced)
