"""DFlash 2: its parts against loops written out, training against serving, and the walk against teacher forcing."""

import itertools

import pytest
import torch
from tiny import ATTENTION, TinyBatch, tiny_batch, tiny_draft, tiny_draft_config, tiny_target_ends, tiny_trainer
from torch import Tensor, nn

from dflash_offline.schemas.variants.dflash2 import DFlash2
from dflash_offline.stages.draft.model import DraftModel
from dflash_offline.stages.draft.objective import top_candidates
from dflash_offline.stages.draft.sampling import Greedy
from dflash_offline.stages.draft.variants.dflash2 import convolve
from dflash_offline.stages.draft.variants.table import variant_of

SMALL = DFlash2(conv_kernel_size=3, conv_group_size=8, selector_rank=6, selector_top_k=5)


def loud_draft(**overrides: object) -> DraftModel:
    """Return a draft of which every part of its own matters to what it drafts."""
    return tiny_draft(variant=SMALL, **overrides)


@pytest.mark.parametrize("tokens", [1, 2, 4, 8])
def test_a_convolution_is_that_of_its_formula_and_never_mixes_blocks(tokens: int) -> None:
    size, taps, group, hidden = 4, 3, 2, 6
    generator = torch.Generator().manual_seed(0)
    values, base = torch.randn(2, tokens, hidden, generator=generator), torch.randn(taps, hidden, generator=generator)
    dynamic = torch.randn(2, tokens, taps, hidden // group, generator=generator)
    expected = torch.zeros_like(values)
    for b, t, channel, o in itertools.product(range(2), range(tokens), range(hidden), range(taps)):
        if t % size >= o:
            kernel = base[o, channel] + dynamic[b, t, o, channel // group]
            expected[b, t, channel] += kernel * values[b, t - o, channel]
    torch.testing.assert_close(convolve(values, base, dynamic, size), expected)


def served_hidden(draft: DraftModel, embed: nn.Embedding, batch: TinyBatch, row: int, anchor: int, size: int) -> Tensor:
    """Return the states [Q, H] of one block, cut to `size` tokens, computed as it is served."""
    block = torch.full((1, size), draft.config.mask_token_id)
    block[0, 0] = batch.input_ids[row, anchor]
    hidden: Tensor = draft(
        position_ids=torch.arange(anchor + size)[None],
        noise_embedding=embed(block),
        target_hidden=batch.hidden_states[row : row + 1, :anchor],
    )
    return hidden[0]


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("attention", ATTENTION)
@torch.no_grad()
def test_blocks_are_trained_as_they_are_served_with_every_window(attention: str, backend: str) -> None:
    draft = loud_draft(**ATTENTION[attention])
    trainer = tiny_trainer(draft, attention_backend=backend)
    batch = tiny_batch(draft.config, [17, 13])
    anchors = torch.tensor([[0, 3, 4, 9], [1, 2, 7, 9]])
    keep = torch.ones_like(anchors, dtype=torch.bool)
    trained = trainer._draft(batch.input_ids, batch.hidden_states, batch.document_ids, anchors, keep)
    for row, (block, anchor) in itertools.product(range(2), enumerate(range(4))):
        place = int(anchors[row, anchor])
        served = served_hidden(draft, trainer.target_embed_tokens, batch, row, place, draft.config.block_size)
        found = trained[row].unflatten(0, (4, draft.config.block_size))[block]
        torch.testing.assert_close(found, served, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_flex_attention_computes_the_same_without_gradients() -> None:
    draft = loud_draft(sliding_window=5, sliding_layers=(0, 1))
    batch = tiny_batch(draft.config, [17, 13])
    anchors = torch.tensor([[0, 3, 4, 9], [1, 2, 7, 9]])
    found = [
        tiny_trainer(draft, attention_backend=backend)(
            batch.input_ids, batch.hidden_states, batch.loss_mask, document_ids=batch.document_ids, anchors=anchors
        ).loss
        for backend in ("eager", "flex_attention")
    ]
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


def slow_walk(draft: DraftModel, head: nn.Linear, hidden: Tensor, anchor: int) -> list[int]:
    """Return the tokens [K - 1] of the greedy walk over states [K - 1, H], score by score."""
    weights = draft.state_dict()
    before, after = (weights[f"candidate_selector.{name}_codebook"] for name in ("predecessor", "successor"))
    project, previous, tokens = weights["candidate_selector.hidden_projection.weight"], anchor, []
    for state in hidden:
        logits = head(state)
        best = sorted(range(len(logits)), key=lambda token: -logits[token])[: SMALL.selector_top_k]
        code = before[previous] * (project @ state)
        previous = max(best, key=lambda token: float(logits[token] + code @ after[token]))
        tokens.append(previous)
    return tokens


@torch.no_grad()
def test_the_walk_takes_the_best_score_after_its_own_choices() -> None:
    draft = loud_draft()
    head, _ = tiny_target_ends(draft.config)
    hidden = torch.randn(1, 3, draft.config.hidden_size, generator=torch.Generator().manual_seed(5))
    plain = 0
    for anchor in range(20):
        walked = variant_of(draft.config).propose(draft, hidden, head, torch.tensor([anchor]), Greedy())
        assert walked[0].tolist() == slow_walk(draft, head, hidden[0], anchor)
        plain += walked[0].tolist() == head(hidden[0]).argmax(dim=-1).tolist()
    assert plain < 20, "the selector has to matter"


@torch.no_grad()
def test_the_accepted_prefix_under_teacher_forcing_is_that_of_the_sequential_walk() -> None:
    draft = loud_draft()
    trainer = tiny_trainer(draft)
    config, head, embed = draft.config, trainer.target_lm_head, trainer.target_embed_tokens
    batch = tiny_batch(config, [23, 19])
    documents = [slice(0, 23), slice(0, 19)]
    # After some anchors stands what the draft itself would write, as far as to its first, second, ... token.
    for row, (length, anchor) in itertools.product(range(2), enumerate((2, 6, 10, 14))):
        states = served_hidden(draft, embed, batch, row, anchor, config.block_size)
        tokens = slow_walk(draft, head, states[1:], int(batch.input_ids[row, anchor]))[:length]
        batch.input_ids[row, anchor + 1 : anchor + 1 + length] = torch.tensor(tokens, dtype=torch.long)
    anchors = torch.arange(1, 18).expand(2, -1).contiguous()
    keep = torch.ones_like(anchors, dtype=torch.bool)
    found, *_ = trainer.serve(
        batch.input_ids, batch.hidden_states, batch.loss_mask, batch.document_ids, anchors, keep, keep
    )
    seen = set()
    for row, (n, anchor) in itertools.product(range(2), enumerate(anchors[0].tolist())):
        states = served_hidden(draft, embed, batch, row, anchor, config.block_size)
        tokens = slow_walk(draft, head, states[1:], int(batch.input_ids[row, anchor]))
        text = batch.input_ids[row, documents[row]].tolist()[anchor + 1 :]
        accepted = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(tokens, text, strict=False)))
        assert found[0, row, n] == accepted
        seen.add(accepted)
    assert seen == {0, 1, 2, 3}


@torch.no_grad()
def test_a_draft_that_starts_from_a_base_draft_computes_and_drafts_exactly_what_that_does() -> None:
    base = tiny_draft()
    draft = DraftModel(tiny_draft_config(variant=SMALL))
    draft.load_state_dict({**draft.state_dict(), **base.state_dict()})
    head, embed = tiny_target_ends(base.config)
    batch = tiny_batch(base.config, [17])
    for anchor in range(1, 12):
        theirs, ours = (served_hidden(each, embed, batch, 0, anchor, 4)[None, 1:] for each in (base, draft))
        assert torch.equal(theirs, ours)
        first = batch.input_ids[0, anchor : anchor + 1]
        walked = variant_of(draft.config).propose(draft, ours, head, first, Greedy())
        assert torch.equal(walked, variant_of(base.config).propose(base, theirs, head, first, Greedy()))
    anchors = torch.tensor([[1, 4, 9]])
    metrics = [
        tiny_trainer(each)(batch.input_ids, batch.hidden_states, batch.loss_mask, anchors=anchors)
        for each in (base, draft)
    ]
    assert torch.equal(metrics[0].correct_by_slot, metrics[1].correct_by_slot)
    assert metrics[0].loss_sum == metrics[1].part_sums["draft_loss"]


def test_of_equal_scores_the_token_of_the_greedy_choice_is_taken() -> None:
    logits = torch.zeros(3, 12)
    logits[1, [4, 7, 9]] = 2.0
    values, ids = top_candidates(logits.bfloat16(), 4)
    assert ids[1].tolist() == sorted(ids[1].tolist()) and values.dtype == torch.float32
    assert ids[1, values[1].argmax()] == logits[1].argmax() == 4


def test_the_selector_leaves_the_draft_below_its_own_gradient() -> None:
    def gradients(alpha: float) -> dict[str, Tensor | None]:
        draft = loud_draft()
        batch = tiny_batch(draft.config, [17, 13])
        trainer = tiny_trainer(draft, loss_settings={"selector_loss_alpha": alpha})
        anchors = torch.tensor([[0, 3, 9], [1, 2, 7]])
        trainer(batch.input_ids, batch.hidden_states, batch.loss_mask, anchors=anchors).loss_sum.backward()
        return {name: parameter.grad for name, parameter in draft.named_parameters()}

    without, with_it = gradients(0.0), gradients(1.5)
    for name, grad in with_it.items():
        assert grad is not None and grad.abs().sum() > 0, name
        if not name.startswith("candidate_selector."):
            assert torch.equal(grad, without[name]), name
    assert all(not grad.any() for name, grad in without.items() if name.startswith("candidate_selector."))


def test_the_weight_of_the_selector_warms_up_over_its_share_of_the_steps() -> None:
    draft = loud_draft()
    batch, anchors = tiny_batch(draft.config, [17]), torch.tensor([[0, 3, 9]])
    trainer = tiny_trainer(draft, loss_settings={"selector_loss_alpha": 2.0, "selector_warmup_ratio": 0.5})
    for progress, weight in ((0.0, 0.0), (0.25, 1.0), (0.5, 2.0), (0.9, 2.0)):
        trainer.progress = progress
        metrics = trainer(batch.input_ids, batch.hidden_states, batch.loss_mask, anchors=anchors)
        parts = {name: float(value) for name, value in metrics.part_sums.items()}
        assert float(metrics.loss_sum.detach()) == pytest.approx(
            parts["draft_loss"] + weight * parts["selector_loss"], rel=1e-5
        )


def test_settings_of_another_loss_are_refused() -> None:
    with pytest.raises(ValueError, match=r"loss_settings has \['selector_loss_alpha'\].*variant: none"):
        tiny_trainer(tiny_draft(), loss_settings={"selector_loss_alpha": 1.0})
