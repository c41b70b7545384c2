import random

import pytest
import torch
from tiny_decoding import MASK, OracleDraft, fitted_draft, random_draft, random_prompts, tiny_target
from torch import nn
from transformers import PreTrainedModel

from dflash_offline.stages.draft.decode import plain_decode, prompt_lookup_decode, speculative_decode
from dflash_offline.stages.draft.losslessness import first_difference, token_gap

FAMILIES = ("qwen3", "llama")
NO_STOP: tuple[int, ...] = ()


@torch.inference_mode()
def slow_plain(
    target: PreTrainedModel, prompt: list[int], limit: int, stops: tuple[int, ...]
) -> tuple[list[int], list[float]]:
    """Greedy decoding that recomputes the whole text for every token."""
    text, log_probs = list(prompt), []
    while len(text) < len(prompt) + limit:
        logits = target(torch.tensor([text]), use_cache=False).logits[0, -1]
        text.append(int(logits.argmax()))
        log_probs.append(float(logits.log_softmax(-1)[text[-1]]))
        if text[-1] in stops:
            break
    return text[len(prompt) :], log_probs


@torch.inference_mode()
def slow_speculative(
    target: PreTrainedModel, draft: nn.Module, prompt: list[int], limit: int, stops: tuple[int, ...]
) -> tuple[list[int], list[int]]:
    """Rounds of draft and verification that recompute everything from the text alone."""
    end, lengths = len(prompt) + limit, []
    text = prompt + slow_plain(target, prompt, 1, stops)[0]
    while len(text) < end and text[-1] not in stops:
        start = len(text) - 1
        size = min(draft.config.block_size, end - start)
        states = target(torch.tensor([text[:start]]), output_hidden_states=True, use_cache=False).hidden_states
        block = torch.tensor([[text[-1]] + [MASK] * (size - 1)])
        hidden = draft(
            position_ids=torch.arange(start + size)[None],
            noise_embedding=target.get_input_embeddings().weight[block],
            target_hidden=torch.cat([states[i + 1] for i in draft.config.target_layer_ids], dim=-1),
        )
        drafted = target.get_output_embeddings()(hidden)[0, 1:].argmax(-1).tolist()
        chosen = target(torch.tensor([text + drafted]), use_cache=False).logits[0, start:].argmax(-1).tolist()
        length = 0
        for right, guess in zip(chosen, [*drafted, None], strict=True):
            if len(text) == end or (length and text[-1] in stops):
                break
            text.append(right)
            length += 1
            if right != guess:
                break
        lengths.append(length)
    return text[len(prompt) :], lengths


@pytest.fixture(scope="module", params=FAMILIES)
def target(request: pytest.FixtureRequest) -> PreTrainedModel:
    return tiny_target(request.param)


@pytest.fixture(scope="module")
def fitted(target: PreTrainedModel) -> nn.Module:
    return fitted_draft(target, random_prompts())


def test_plain_decode_equals_recomputing_everything(target: PreTrainedModel) -> None:
    for prompt in random_prompts(3):
        tokens, log_probs = slow_plain(target, prompt, 70, NO_STOP)
        result = plain_decode(target, prompt, 70, NO_STOP)
        assert result.tokens == tokens
        assert result.log_probs == pytest.approx(log_probs, abs=1e-4)


def test_plain_decode_stops_at_the_first_stop_token(target: PreTrainedModel) -> None:
    prompt = random_prompts(1)[0]
    whole = plain_decode(target, prompt, 80, NO_STOP).tokens
    for position in (0, 1, 5, 63, 64, 65):
        end = whole.index(whole[position]) + 1
        result = plain_decode(target, prompt, 80, [whole[position]])
        assert result.tokens == whole[:end] and len(result.log_probs) == end


def test_rounds_equal_recomputing_everything(target: PreTrainedModel, fitted: nn.Module) -> None:
    all_lengths = []
    for prompt in random_prompts():
        tokens, lengths = slow_speculative(target, fitted, prompt, 40, NO_STOP)
        result = speculative_decode(target, fitted, prompt, 40, NO_STOP)
        assert (result.tokens, result.produced) == (tokens, lengths)
        all_lengths += lengths
    assert len(set(all_lengths)) > 2, "the fitted draft is to be right sometimes and wrong sometimes"


def test_rounds_equal_recomputing_everything_with_a_stop_token(target: PreTrainedModel, fitted: nn.Module) -> None:
    for prompt in random_prompts(2):
        whole = plain_decode(target, prompt, 40, NO_STOP).tokens
        for stop in set(whole[::7]):
            expected = slow_speculative(target, fitted, prompt, 40, (stop,))
            result = speculative_decode(target, fitted, prompt, 40, [stop])
            assert (result.tokens, result.produced) == expected
            assert result.tokens == whole[: whole.index(stop) + 1]


def test_a_random_draft_changes_no_token(target: PreTrainedModel) -> None:
    draft = random_draft()
    for prompt in random_prompts(3):
        plain, speculative = plain_decode(target, prompt, 40, ()), speculative_decode(target, draft, prompt, 40, ())
        assert speculative.tokens == plain.tokens
        assert sum(speculative.produced) == len(plain.tokens) - 1


def test_a_perfect_draft_produces_k_tokens_a_round(target: PreTrainedModel) -> None:
    prompt = random_prompts(1)[0]
    whole = plain_decode(target, prompt, 60, ()).tokens
    draft = OracleDraft(target, prompt + whole)
    result = speculative_decode(target, draft, prompt, 33, NO_STOP)
    assert result.tokens == whole[:33]
    assert result.produced == [8, 8, 8, 8]
    assert (result.drafted, result.accepted) == (28, 28)
    assert draft.calls == [(12, 8), (8, 8), (8, 8), (8, 8)], "only new context is read"


@pytest.mark.parametrize("limit", range(1, 20))
def test_the_last_block_is_shortened_to_the_limit(target: PreTrainedModel, limit: int) -> None:
    prompt = random_prompts(1)[0]
    whole = plain_decode(target, prompt, 40, ()).tokens
    draft = OracleDraft(target, prompt + whole)
    result = speculative_decode(target, draft, prompt, limit, NO_STOP)
    assert result.tokens == whole[:limit]
    assert result.produced == slow_speculative(target, draft, prompt, limit, NO_STOP)[1]
    assert all(size <= limit for _, size in draft.calls)


def test_a_stop_token_inside_a_block_ends_the_answer(target: PreTrainedModel) -> None:
    prompt = random_prompts(1)[0]
    whole = plain_decode(target, prompt, 40, ()).tokens
    draft = OracleDraft(target, prompt + whole)
    firsts = [i for i, token in enumerate(whole) if token not in whole[:i]]
    for position in firsts:
        result = speculative_decode(target, draft, prompt, 40, [whole[position]])
        assert result.tokens == whole[: position + 1]
        full, rest = divmod(position, 8)
        assert result.produced == [8] * full + [rest] * (rest > 0)
        assert result.accepted == 7 * full + rest


def test_accepted_counts_the_drafted_tokens_of_the_answer(target: PreTrainedModel) -> None:
    prompt = random_prompts(1)[0]
    whole = plain_decode(target, prompt, 60, ()).tokens
    # The third drafted token of the first round is wrong, and the first of the second.
    draft = OracleDraft(target, prompt + whole, spoiled=frozenset({12 + 3, 12 + 4}))
    result = speculative_decode(target, draft, prompt, 12, NO_STOP)
    assert result.tokens == whole[:12]
    assert result.produced == [3, 1, 7]
    assert (result.drafted, result.accepted) == (7 + 7 + 7, 2 + 0 + 7)


def test_a_sliding_window_is_taken_back_with_rejected_tokens() -> None:
    target = tiny_target("mistral")
    for seed, prompt in enumerate([*random_prompts(2, 12), *random_prompts(2, 40)]):
        whole = plain_decode(target, prompt, 60, ()).tokens
        draw = random.Random(seed)
        spoiled = frozenset(draw.sample(range(len(prompt), len(prompt) + 60), 20))
        draft = OracleDraft(target, prompt + whole, spoiled=spoiled)
        result = speculative_decode(target, draft, prompt, 60, NO_STOP)
        assert result.tokens == whole == slow_plain(target, prompt, 60, NO_STOP)[0]
        assert result.produced == slow_speculative(target, draft, prompt, 60, NO_STOP)[1]


def test_a_target_is_left_as_it_was(target: PreTrainedModel) -> None:
    def hooks() -> int:
        return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in target.modules())

    prompt, own, before = random_prompts(1)[0], target.generation_config, hooks()
    speculative_decode(target, random_draft(), prompt, 8, NO_STOP)
    prompt_lookup_decode(target, prompt, 8, NO_STOP, 7)
    assert target.generation_config is own
    assert hooks() == before


def test_prompt_lookup_gives_the_targets_answer_and_counts_its_calls(target: PreTrainedModel) -> None:
    prompt = random_prompts(1)[0]
    whole = plain_decode(target, prompt, 40, ()).tokens
    # The prompt repeats itself, so that the looked-up tokens are often right.
    repeated = prompt + whole + prompt
    plain = plain_decode(target, repeated, 30, ())
    calls = 0

    def count(module: nn.Module, args: object) -> None:
        nonlocal calls
        calls += 1

    handle = target.register_forward_pre_hook(count)
    result = prompt_lookup_decode(target, repeated, 30, NO_STOP, 7)
    handle.remove()
    assert result.tokens == plain.tokens
    assert result.target_calls == calls <= 30


def test_prompt_lookup_ignores_the_targets_own_sampling_settings(target: PreTrainedModel) -> None:
    prompt = random_prompts(1)[0]
    plain = plain_decode(target, prompt, 20, ())
    stop = plain.tokens[10]
    target.generation_config.repetition_penalty = 5.0
    try:
        result = prompt_lookup_decode(target, prompt, 20, [stop], 7)
    finally:
        target.generation_config.repetition_penalty = None
    assert result.tokens == plain.tokens[: plain.tokens.index(stop) + 1]


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [([], [], None), ([1, 2], [1, 2], None), ([1, 2], [1, 3], 1), ([1], [1, 2], 1), ([], [4], 0), ([5, 1], [4], 0)],
)
def test_first_difference_is_the_first_unequal_index(a: list[int], b: list[int], expected: int | None) -> None:
    assert first_difference(a, b) == expected


def test_token_gap_tells_a_tie_from_another_choice(target: PreTrainedModel) -> None:
    prompt = random_prompts(1)[0]
    with torch.inference_mode():
        logits = target(torch.tensor([prompt])).logits[0, -1]
    order = logits.argsort(descending=True).tolist()
    measured = token_gap(target, prompt, order[0], order[1])
    assert measured.gap == pytest.approx(float(logits[order[0]] - logits[order[1]]), abs=1e-5)
    assert not measured.tie
    assert token_gap(target, prompt, order[0], order[0]).tie
    # Two equal rows of the head are told apart by nothing but rounding.
    head = target.get_output_embeddings().weight
    saved = head[order[1]].clone()
    head[order[1]] = head[order[0]]
    try:
        assert token_gap(target, prompt, order[0], order[1]).tie
    finally:
        head[order[1]] = saved
