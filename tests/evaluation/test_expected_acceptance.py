"""What is expected where tokens are drawn, against live sampling: the same answers, round by round."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_decoding import fitted_draft, random_prompts, tiny_target
from transformers import PreTrainedModel

from dflash_offline.schemas.results.expected import TEMPERATURES
from dflash_offline.schemas.variants.dflash2 import DFlash2
from dflash_offline.stages.draft.decode import speculative_decode
from dflash_offline.stages.draft.model import DraftModel
from dflash_offline.stages.draft.sampling import Sampler, SamplingRule
from dflash_offline.stages.trainer import DFlashTrainerModule
from dflash_offline.stages.training.loader import Batch
from dflash_offline.stages.training.simulated_serving import draft_everywhere, expected_rounds

PROMPTS, LENGTH = 24, 30
CPU = torch.device("cpu")


@torch.no_grad()
def as_cached(target: PreTrainedModel, draft: DraftModel, rows: list[list[int]], first: int) -> Batch:
    """Return answers, which begin at `first`, with what a cache would hold: final states where they are read."""
    ids = torch.tensor(rows)
    states = target(ids, output_hidden_states=True).hidden_states
    mask = torch.arange(ids.shape[1]).expand(ids.shape) >= first
    is_read = torch.cat((mask[:, 1:], torch.zeros_like(mask[:, :1])), dim=1)
    return Batch(
        samples=list(range(len(rows))),
        spans=[(row, 0, ids.shape[1]) for row in range(len(rows))],
        input_ids=ids,
        hidden_states=torch.cat([states[i + 1] for i in draft.config.target_layer_ids], dim=-1),
        loss_mask=mask,
        document_ids=torch.zeros_like(ids),
        anchors=torch.full((len(rows), 1), first),
        keep_mask=torch.ones(len(rows), 1, dtype=torch.bool),
        final=states[-1].masked_fill(~is_read[..., None], torch.nan),
    )


def z_score(live: list[int], expected: np.ndarray) -> float:
    """Return how many standard errors the rounds of all answers are from those expected of the same answers."""
    apart = np.array(live) - expected
    return float(apart.mean() / (apart.std() / len(apart) ** 0.5))


@pytest.fixture(scope="module")
def target() -> PreTrainedModel:
    return tiny_target("qwen3")


@pytest.fixture(scope="module")
def plain(target: PreTrainedModel) -> DraftModel:
    return fitted_draft(target, random_prompts(12), steps=40)


def with_selector(plain: DraftModel) -> DraftModel:
    """Return the draft with a selector that changes what it drafts."""
    variant = DFlash2(conv_group_size=8, selector_rank=8, selector_top_k=12)
    draft = DraftModel(replace(plain.config, variant=variant)).eval()
    draft.load_state_dict({**draft.state_dict(), **plain.state_dict()})
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in draft.named_parameters():
            if name.startswith("candidate_selector."):
                parameter.normal_(std=0.3, generator=generator)
    return draft.requires_grad_(False)


@pytest.mark.parametrize(
    ("make", "number"),
    [pytest.param(lambda plain: plain, 0, marks=pytest.mark.slow), (with_selector, 1)],
    ids=["base at 0.6", "selector at 1"],
)
def test_the_rounds_of_live_sampling_are_those_expected_of_the_answers_it_gave(
    target: PreTrainedModel, plain: DraftModel, make: Callable[[DraftModel], DraftModel], number: int
) -> None:
    draft, prompts = make(plain), random_prompts(PROMPTS)
    rule, first = SamplingRule(temperature=TEMPERATURES[number]), len(prompts[0])
    done = [
        speculative_decode(target, draft, prompt, LENGTH, (), Sampler(rule, seed, CPU))
        for seed, prompt in enumerate(prompts)
    ]
    batch = as_cached(target, draft, [p + one.tokens for p, one in zip(prompts, done, strict=True)], first)
    head, table = target.get_output_embeddings(), target.get_input_embeddings()
    module = DFlashTrainerModule(
        *(draft, head, table, draft.config.mask_token_id), block_size=8, attention_backend="sdpa"
    )
    kept = draft_everywhere(module, batch).kept
    assert kept is not None
    expected = np.array([expected_rounds(first, first + LENGTH - 1, kept[:, row]) for row in range(PROMPTS)])
    live = [len(one.produced) for one in done]
    assert abs(z_score(live, expected[:, number])) < 3.5
    assert abs(z_score(live, expected[:, 1 - number])) > 4, "another temperature shows"
