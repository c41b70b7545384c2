"""DFlash 2: a step, a walk and a sampled answer are what the slow reference, written from the contract, says."""

from collections import Counter
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from reference_dflash2 import (
    ReferenceStep,
    config_json,
    draft_block,
    proposal,
    random_weights,
    train_step,
    walk,
)
from tiny import TinyBatch, pack, tiny_batch, tiny_target_ends
from tiny_decoding import HIDDEN, LAYERS, MASK, SHAPE, VOCAB, random_prompts, tiny_target
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM
from variant_drafts import SIZES, check_gradients, features_of, p_value, saved, sequences

from dflash_offline.schemas.draft.anchor_rule import AnchorRule
from dflash_offline.stages.draft.anchors import collate_anchors, draw_anchors
from dflash_offline.stages.draft.decode import plain_decode, speculative_decode
from dflash_offline.stages.draft.sampling import Sampler, SamplingRule
from dflash_offline.stages.trainer import DFlashStepMetrics, DFlashTrainerModule

pytestmark = pytest.mark.usefixtures("small_tiles")
LENGTHS = [14, 3, 9, 20]
SLIDING = {"layer_types": ["sliding_attention"] * 2, "sliding_window": 5, "use_sliding_window": True}
SHAPES: dict[str, dict[str, Any]] = {
    "full": {},
    "three taps": {"conv_kernel_size": 3, "conv_group_size": 4},
    "sliding": {"conv_group_size": 16, **SLIDING},
}
SETTINGS: dict[str, dict[str, Any]] = {
    "gamma": {"gamma": 2.0},
    "dpace": {"dpace_alpha": 0.5},
    "half": {"selector_alpha": 0.5},
    "none": {"selector_alpha": 0.0, "gamma": 2.0},
}


def tiny_trainer(folder: Path, shape: str = "full", **settings: Any) -> DFlashTrainerModule:
    config = config_json(**SHAPES[shape])
    draft = saved(folder, config, random_weights(config))
    head, table = tiny_target_ends(draft.config)
    settings = {"attention_backend": "sdpa", "num_anchors": 6, **settings}
    alpha, gamma = settings.pop("selector_alpha", 1.0), settings.pop("gamma", None)
    if (dpace := settings.pop("dpace_alpha", None)) is not None:
        settings |= {"loss_type": "dpace", "dpace_alpha": dpace}
    loss_settings = {"selector_loss_alpha": alpha}
    return DFlashTrainerModule(
        draft, head, table, 39, block_size=4, loss_decay_gamma=gamma, loss_settings=loss_settings, **settings
    )


def the_batch() -> TinyBatch:
    return tiny_batch(SIZES, LENGTHS)


def draws(batch: TinyBatch) -> list[Any]:
    return [
        draw_anchors(mask[:length].bool().numpy(), AnchorRule(4), 6, seed=0, epoch=0, sample_id=i)
        for i, (mask, length) in enumerate(zip(batch.loss_mask, LENGTHS, strict=True))
    ]


@cache
def reference_step(shape: str, setting: str) -> tuple[ReferenceStep, dict[str, Tensor]]:
    """Return the slow reference's step over the batch, and its gradients."""
    config, batch = config_json(**SHAPES[shape]), the_batch()
    weights = {name: weight.requires_grad_() for name, weight in random_weights(config).items()}
    head, table = tiny_target_ends(SIZES)
    documents = [
        {
            "input_ids": batch.input_ids[i, :length],
            "hidden_states": batch.hidden_states[i, :length],
            "loss_mask": batch.loss_mask[i, :length],
            "anchors": torch.as_tensor(anchors),
        }
        for i, (length, anchors) in enumerate(zip(LENGTHS, draws(batch), strict=True))
    ]
    step = train_step(weights, config, head.weight.detach(), table.weight.detach(), documents, **SETTINGS[setting])
    grads = torch.autograd.grad(step.loss, list(weights.values()), allow_unused=True)
    return step, {name: grad for name, grad in zip(weights, grads, strict=True) if grad is not None}


def run_step(trainer: DFlashTrainerModule, batch: TinyBatch, packed: bool, rows: slice = slice(None)) -> Any:
    drawn = draws(batch)[rows]
    if packed:
        inputs, (anchors, keep) = pack(batch, padding=3), collate_anchors([drawn], [[0, 14, 17, 26]])
    else:
        inputs = TinyBatch(*(getattr(batch, name)[rows] for name in TinyBatch.__dataclass_fields__))
        anchors, keep = collate_anchors([[one] for one in drawn], [[0]] * len(drawn))
    arguments = inputs.input_ids, inputs.hidden_states, inputs.loss_mask
    return trainer(*arguments, document_ids=inputs.document_ids, anchors=anchors, keep_mask=keep)


def check_metrics(step: DFlashStepMetrics, expected: ReferenceStep) -> None:
    assert step.loss.item() == pytest.approx(expected.loss.item(), rel=1e-6)
    assert step.loss_sum.item() == pytest.approx(expected.loss_sum.item(), rel=1e-6)
    assert step.loss_weight.item() == pytest.approx(expected.loss_weight, rel=1e-6)
    assert step.part_sums["selector_loss"].item() == pytest.approx(expected.selector_sum, rel=1e-6)
    assert step.valid_by_slot.tolist() == expected.valid_by_slot
    assert step.correct_by_slot.tolist() == expected.chosen_by_slot
    assert step.accept_len_sum.item() == sum(expected.accept_lens)
    plain, oracle = step.paths["without_selector"], step.paths["oracle"]
    assert plain.correct_by_slot.tolist() == expected.plain_by_slot
    assert plain.accept_len_sum.item() == sum(expected.plain_accept_lens)
    assert oracle.correct_by_slot.tolist() == expected.covered_by_slot
    assert oracle.accept_len_sum.item() == sum(expected.oracle_lens)
    assert 0 < sum(expected.covered_by_slot) < sum(expected.valid_by_slot), "some truths are to be no candidates"


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("backend", ["sdpa", "eager", "flex_attention"])
@pytest.mark.parametrize(
    ("shape", "setting"),
    [("full", "gamma"), ("full", "dpace"), ("full", "none"), ("three taps", "half"), ("sliding", "dpace")],
)
def test_a_step_equals_the_slow_reference(shape: str, setting: str, backend: str, packed: bool, tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, shape, attention_backend=backend, **SETTINGS[setting])
    expected, gradients = reference_step(shape, setting)
    with torch.set_grad_enabled(backend != "flex_attention"):  # it has no backward on the CPU
        step = run_step(trainer, the_batch(), packed)
    check_metrics(step, expected)
    if backend != "flex_attention":
        check_gradients(step.loss, trainer, gradients)


@pytest.mark.parametrize("how", ["recomputed layers", "small chunks of the head"])
def test_a_step_that_saves_memory_equals_the_slow_reference(how: str, tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, **{"small chunks of the head": {"head_chunk_slots": 5}}.get(how, {}), gamma=2.0)
    trainer.draft_model.gradient_checkpointing = how == "recomputed layers"
    expected, gradients = reference_step("full", "gamma")
    step = run_step(trainer, the_batch(), packed=True)
    check_metrics(step, expected)
    check_gradients(step.loss, trainer, gradients)


def test_numerators_and_denominators_add_up_over_micro_batches(tmp_path: Path) -> None:
    trainer, batch = tiny_trainer(tmp_path, gamma=2.0), the_batch()
    parts = [run_step(trainer, batch, False, rows) for rows in (slice(0, 2), slice(2, 4))]
    expected, gradients = reference_step("full", "gamma")
    loss = sum(part.loss_sum for part in parts) / (sum(part.loss_weight for part in parts) + 1e-6)
    assert loss.item() == pytest.approx(expected.loss.item(), rel=1e-6)
    check_gradients(loss, trainer, gradients)


@torch.no_grad()
def test_the_teacher_forced_prefix_is_that_of_the_sequential_walk(tmp_path: Path) -> None:
    """A choice may depend on a wrong one only behind it."""
    config = config_json(vocab_size=5, mask_token_id=4, selector_top_k=3)
    weights = random_weights(config)
    trainer_draft = saved(tmp_path, config, weights)
    head, table = torch.nn.Linear(32, 5, bias=False), torch.nn.Embedding(5, 32)
    trainer = DFlashTrainerModule(trainer_draft, head, table, 4, block_size=4, attention_backend="sdpa")
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(4, (1, 60), generator=generator)
    features = torch.randn(1, 60, 64, generator=generator)
    anchors, everywhere = torch.arange(57)[None], torch.ones_like(tokens)
    keep = torch.ones_like(anchors, dtype=torch.bool)
    lengths, *_ = trainer.serve(tokens, features, everywhere, torch.zeros_like(tokens), anchors, keep, keep)
    prefixes, later = [], 0
    for a in range(57):
        hidden = draft_block(weights, config, features[0, :a], table(torch.tensor([tokens[0, a], 4, 4, 4])))[1:]
        unary, truth = hidden @ head.weight.double().T, tokens[0, a + 1 : a + 4].tolist()
        drafted = walk(weights, hidden, unary, int(tokens[0, a]), 3)
        forced = [walk(weights, hidden[k : k + 1], unary[k : k + 1], int(tokens[0, a + k]), 3)[0] for k in range(3)]
        right = [one == other for one, other in zip(drafted, truth, strict=True)]
        prefixes.append(next((n for n, one in enumerate(right) if not one), 3))
        later += drafted != forced
    assert lengths[0, 0].tolist() == prefixes
    assert max(prefixes) > 1 and later, "some blocks are to go on, and some choices to depend on a wrong one"


# --- decoding ----------------------------------------------------------------------------------------------------


def decoding_config(**changes: Any) -> dict[str, Any]:
    sizes = {"hidden_size": HIDDEN, "head_dim": 16, "vocab_size": VOCAB, "intermediate_size": 96}
    own = {"mask_token_id": MASK, "target_layer_ids": [1, 2, 4], "num_target_layers": LAYERS, "block_size": 6}
    return config_json(**{**sizes, **own, **changes})


@torch.no_grad()
def test_every_block_that_is_decoded_is_the_walk_of_the_slow_reference(tmp_path: Path) -> None:
    target, config = tiny_target("qwen3"), decoding_config()
    weights, own = random_weights(config), config["dflash_config"]
    draft = saved(tmp_path, config, weights).eval()
    head, table = target.get_output_embeddings().weight, target.get_input_embeddings().weight
    changed = 0
    for prompt in random_prompts(2):
        decoded = speculative_decode(target, draft, prompt, 14, (), keep_blocks=True)
        assert decoded.tokens == plain_decode(target, prompt, 14, ()).tokens
        text, start = [*prompt, *decoded.tokens], len(prompt)
        features = features_of(target, text, own["target_layer_ids"])
        assert decoded.blocks is not None
        for drafted, produced in zip(decoded.blocks, decoded.produced, strict=True):
            ids = torch.tensor([text[start], *[MASK] * len(drafted)])
            hidden = draft_block(weights, config, features[:start], table[ids])[1:]
            unary = hidden @ head.double().T
            assert drafted == walk(weights, hidden, unary, text[start], own["selector_top_k"])
            changed += drafted != unary.argmax(dim=-1).tolist()
            start += produced
    assert changed, "the selector is to change what is drafted"


@torch.no_grad()
@pytest.mark.parametrize(
    ("rule", "draws"),
    [
        (SamplingRule(temperature=0.8), 200),
        pytest.param(SamplingRule(temperature=1.3, top_p=0.8), 1000, marks=pytest.mark.slow),
    ],
)
def test_sampled_blocks_are_the_references_walk_and_answers_the_targets_own(
    rule: SamplingRule, draws: int, tmp_path: Path
) -> None:
    torch.manual_seed(1)
    sizes: dict[str, Any] = {"vocab_size": 5, "hidden_size": 16, "head_dim": 4, "intermediate_size": 16}
    target = Qwen3ForCausalLM(Qwen3Config(**{**SHAPE, **sizes, "num_hidden_layers": 3})).eval().requires_grad_(False)
    own = {"mask_token_id": 4, "target_layer_ids": [0, 1], "num_target_layers": 3, "block_size": 3, "selector_top_k": 3}
    config = config_json(**sizes, **own)
    weights = random_weights(config)
    draft, prompt = saved(tmp_path, config, weights).eval(), [1, 2, 0]
    sampler, answers, blocks = Sampler(rule, 7, torch.device("cpu")), Counter[tuple[int, ...]](), Counter[Any]()
    kept = Counter[int]()
    for _ in range(draws):
        decoded = speculative_decode(target, draft, prompt, 3, (), sampler, keep_blocks=True)
        answers[tuple(decoded.tokens)] += 1
        assert decoded.blocks is not None
        blocks[(decoded.tokens[0], *decoded.blocks[0])] += 1
        kept.update(decoded.kept[:1])
    assert len(kept) == 3, "drafted tokens are to be kept sometimes and rejected sometimes"

    def by_target(path: tuple[int, ...]) -> dict[int, float]:
        logits = target(torch.tensor([[*prompt, *path]]), use_cache=False).logits[0, -1]
        return dict(enumerate(rule.probabilities(logits).tolist()))

    features = features_of(target, prompt, [0, 1])
    head, table = target.get_output_embeddings().weight, target.get_input_embeddings().weight

    def by_draft(path: tuple[int, ...]) -> Mapping[int, float]:
        if not path:
            return by_target(path)
        hidden = draft_block(weights, config, features, table[torch.tensor([path[0], 4, 4])])[len(path)]
        (slot,) = proposal(weights, hidden[None], (head.double() @ hidden)[None], [path[-1]], 3, rule.temperature)
        return slot

    assert p_value(answers, sequences(by_target, 3), draws) > 1e-3
    assert p_value(blocks, sequences(by_draft, 3), draws) > 1e-3
