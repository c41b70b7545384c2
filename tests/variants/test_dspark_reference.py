"""DSpark: a step, a walk and a sampled answer are what the slow reference, written from the formulas, says."""

from collections import Counter
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from reference_dspark import (
    ReferenceStep,
    anchors_of,
    biased,
    confidence,
    config_json,
    draft_block,
    random_weights,
    train_step,
    walk,
)
from tiny import TinyBatch, pack, tiny_batch, tiny_target_ends
from tiny_decoding import HIDDEN, LAYERS, MASK, SHAPE, VOCAB, random_prompts, tiny_target
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3ForCausalLM
from variant_drafts import SIZES, check_gradients, features_of, p_value, saved, sequences

from dflash_offline.schemas.draft.anchor_rule import AnchorRule
from dflash_offline.schemas.errors import DflashError
from dflash_offline.stages.draft.anchors import collate_anchors, draw_anchors
from dflash_offline.stages.draft.decode import plain_decode, speculative_decode
from dflash_offline.stages.draft.sampling import Sampler, SamplingRule
from dflash_offline.stages.trainer import DFlashTrainerModule

pytestmark = pytest.mark.usefixtures("small_tiles")
LENGTHS, STARTS = [14, 3, 9, 20], [0, 14, 17, 26]
NUM_ANCHORS = 64
SETTINGS: dict[str, dict[str, Any]] = {
    "recipe": {"gamma": 4.0},
    "flat": {},
    "other weights": {"gamma": 2.0, "alphas": (1.0, 0.25, 0.5)},
    "cross-entropy alone": {"alphas": (1.0, 0.0, 0.0)},
}


def tiny_trainer(folder: Path, **settings: Any) -> DFlashTrainerModule:
    config = config_json()
    draft = saved(folder, config, random_weights(config))
    settings = {"attention_backend": "sdpa", "num_anchors": NUM_ANCHORS, **settings}
    ce, l1, said = settings.pop("alphas", (0.1, 0.9, 1.0))
    gamma = settings.pop("gamma", None)
    alphas = {"ce_loss_alpha": ce, "l1_loss_alpha": l1, "confidence_loss_alpha": said}
    ends = tiny_target_ends(draft.config)
    return DFlashTrainerModule(draft, *ends, 39, block_size=4, loss_decay_gamma=gamma, loss_settings=alphas, **settings)


def the_batch() -> tuple[TinyBatch, Tensor]:
    """Return a padded batch, and the target's final states; those that nobody may read are not finite."""
    batch = tiny_batch(SIZES, LENGTHS)
    final = 2 * torch.randn(*batch.input_ids.shape, 32, generator=torch.Generator().manual_seed(6))
    is_read = torch.zeros_like(batch.loss_mask, dtype=torch.bool)
    is_read[:, :-1] = batch.loss_mask[:, 1:] == 1
    return batch, torch.where(is_read[..., None], final, torch.nan)


@cache
def reference_step(setting: str) -> tuple[ReferenceStep, dict[str, Tensor]]:
    """Return the slow reference's step over the batch, and its gradients."""
    config, (batch, final) = config_json(), the_batch()
    weights = {name: weight.requires_grad_() for name, weight in random_weights(config).items()}
    head, table = tiny_target_ends(SIZES)
    documents = [
        {
            "input_ids": batch.input_ids[i, :length],
            "hidden_states": batch.hidden_states[i, :length],
            "final": final[i, :length],
            "loss_mask": batch.loss_mask[i, :length],
            "anchors": torch.tensor(anchors_of(batch.loss_mask[i, :length].tolist())),
        }
        for i, length in enumerate(LENGTHS)
    ]
    step = train_step(weights, config, head.weight.detach(), table.weight.detach(), documents, **SETTINGS[setting])
    grads = torch.autograd.grad(step.loss, list(weights.values()), allow_unused=True)
    return step, {name: grad for name, grad in zip(weights, grads, strict=True) if grad is not None}


def run_step(trainer: DFlashTrainerModule, packed: bool, rows: slice = slice(None)) -> Any:
    batch, final = the_batch()
    drawn = [
        draw_anchors(mask[:length].bool().numpy(), AnchorRule(2, "partial"), NUM_ANCHORS, 0, 0, i)
        for i, (mask, length) in enumerate(zip(batch.loss_mask, LENGTHS, strict=True))
    ][rows]
    if packed:
        inputs, (anchors, keep) = pack(batch, padding=3), collate_anchors([drawn], [STARTS])
        real = torch.cat([final[i, :length] for i, length in enumerate(LENGTHS)])
        final = torch.cat((real, real.new_full((3, 32), torch.nan)))[None]
    else:
        inputs = TinyBatch(*(getattr(batch, name)[rows] for name in TinyBatch.__dataclass_fields__))
        anchors, keep = collate_anchors([[one] for one in drawn], [[0]] * len(drawn))
        final = final[rows]
    arguments = inputs.input_ids, inputs.hidden_states, inputs.loss_mask
    return trainer(*arguments, document_ids=inputs.document_ids, anchors=anchors, keep_mask=keep, final=final)


def check_metrics(step: Any, expected: ReferenceStep) -> None:
    assert step.loss.item() == pytest.approx(expected.loss.item(), rel=1e-6)
    assert step.loss_sum.item() == pytest.approx(expected.loss_sum.item(), rel=1e-6)
    assert step.loss_weight.item() == pytest.approx(expected.loss_weight, rel=1e-6)
    for name, value in expected.parts.items():
        assert step.part_sums[name].item() == pytest.approx(value, rel=1e-6), name
    assert step.valid_by_slot.tolist() == expected.valid_by_slot
    assert step.correct_by_slot.tolist() == expected.correct_by_slot
    assert step.paths["without_markov"].correct_by_slot.tolist() == expected.plain_by_slot
    assert step.accept_len_sum.item() == sum(expected.accept_lens)
    assert step.valid_blocks.item() == len(expected.accept_lens)
    assert expected.valid_by_slot[0] > expected.valid_by_slot[-1] > 0, "some blocks are to end early"


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize(
    ("setting", "backend"),
    [
        *(("recipe", backend) for backend in ("sdpa", "eager", "flex_attention")),
        *((setting, "sdpa") for setting in ("flat", "other weights", "cross-entropy alone")),
    ],
)
def test_a_step_equals_the_slow_reference(setting: str, backend: str, packed: bool, tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, attention_backend=backend, **SETTINGS[setting])
    expected, gradients = reference_step(setting)
    with torch.set_grad_enabled(backend != "flex_attention"):  # it has no backward on the CPU
        step = run_step(trainer, packed)
    check_metrics(step, expected)
    if backend != "flex_attention":
        check_gradients(step.loss, trainer, gradients)


@pytest.mark.parametrize("how", ["recomputed layers", "small chunks of the head"])
def test_a_step_that_saves_memory_equals_the_slow_reference(how: str, tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, **{"small chunks of the head": {"head_chunk_slots": 5}}.get(how, {}), gamma=4.0)
    trainer.draft_model.gradient_checkpointing = how == "recomputed layers"
    expected, gradients = reference_step("recipe")
    step = run_step(trainer, packed=True)
    check_metrics(step, expected)
    check_gradients(step.loss, trainer, gradients)


def test_numerators_and_denominators_add_up_over_micro_batches(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, gamma=4.0)
    parts = [run_step(trainer, False, rows) for rows in (slice(0, 2), slice(2, 4))]
    expected, gradients = reference_step("recipe")
    loss = sum(part.loss_sum for part in parts) / (sum(part.loss_weight for part in parts) + 1e-6)
    assert loss.item() == pytest.approx(expected.loss.item(), rel=1e-6)
    check_gradients(loss, trainer, gradients)


def test_the_trainer_draws_two_supervised_tokens_in_a_row_by_itself(tmp_path: Path) -> None:
    trainer, (batch, final) = tiny_trainer(tmp_path, gamma=4.0), the_batch()
    arguments = batch.input_ids, batch.hidden_states, batch.loss_mask
    check_metrics(trainer(*arguments, document_ids=batch.document_ids, final=final), reference_step("recipe")[0])
    with pytest.raises(DflashError, match="anchor_kind is 'whole'"):
        tiny_trainer(tmp_path, anchor_kind="whole")
    with pytest.raises(DflashError, match="final is not given"):
        trainer(*arguments, document_ids=batch.document_ids)


@torch.no_grad()
def test_the_teacher_forced_prefix_is_that_of_the_sequential_walk(tmp_path: Path) -> None:
    """A choice may depend on a wrong one only behind it; no teacher is needed for it."""
    config = config_json(vocab_size=5, mask_token_id=4)
    weights = random_weights(config)
    draft = saved(tmp_path, config, weights)
    head, table = nn.Linear(32, 5, bias=False), nn.Embedding(5, 32)
    trainer = DFlashTrainerModule(draft, head, table, 4, block_size=4, attention_backend="sdpa")
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(4, (1, 60), generator=generator)
    features = torch.randn(1, 60, 64, generator=generator)
    anchors, everywhere = torch.arange(58)[None], torch.ones_like(tokens)
    keep = torch.ones_like(anchors, dtype=torch.bool)
    lengths, _, _ = trainer.serve(tokens, features, everywhere, torch.zeros_like(tokens), anchors, keep, keep)
    prefixes, later = [], 0
    for a in range(58):
        hidden = draft_block(weights, config, features[0, :a], table(torch.tensor([tokens[0, a], 4, 4, 4])))
        unary, truth = hidden @ head.weight.double().T, tokens[0, a + 1 : a + 5].tolist()
        drafted = walk(weights, hidden, unary, int(tokens[0, a]))
        forced = [int(biased(weights, unary[k], int(tokens[0, a + k])).argmax()) for k in range(len(truth))]
        right = [one == other for one, other in zip(drafted, truth, strict=False)]
        prefixes.append(next((n for n, one in enumerate(right) if not one), len(right)))
        later += drafted[: len(forced)] != forced
    assert lengths[0, 0].tolist() == prefixes
    assert max(prefixes) > 1 and later, "some blocks are to go on, and some choices to depend on a wrong one"


# --- decoding ----------------------------------------------------------------------------------------------------


def decoding_config(**changes: Any) -> dict[str, Any]:
    sizes = {"hidden_size": HIDDEN, "head_dim": 16, "vocab_size": VOCAB, "intermediate_size": 96}
    own = {"mask_token_id": MASK, "target_layer_ids": [1, 2, 4], "num_target_layers": LAYERS, "block_size": 5}
    return config_json(**{**sizes, **own, **changes})


@torch.no_grad()
@pytest.mark.parametrize("threshold", [None, 0.5])
def test_every_block_that_is_decoded_is_the_walk_of_the_slow_reference(threshold: float | None, tmp_path: Path) -> None:
    target, config = tiny_target("qwen3"), decoding_config()
    weights = random_weights(config)
    draft = saved(tmp_path, config, weights).eval()
    head, table = target.get_output_embeddings().weight, target.get_input_embeddings().weight
    changed, lengths = 0, Counter[int]()
    for prompt in random_prompts(2):
        decoded = speculative_decode(target, draft, prompt, 14, (), keep_blocks=True, confidence_threshold=threshold)
        assert decoded.tokens == plain_decode(target, prompt, 14, ()).tokens
        text, start = [*prompt, *decoded.tokens], len(prompt)
        features = features_of(target, text, config["target_layer_ids"])
        assert decoded.blocks is not None
        for drafted, produced in zip(decoded.blocks, decoded.produced, strict=True):
            slots = min(5, len(text) - 1 - start)
            ids = torch.tensor([text[start], *[MASK] * (slots - 1)])
            hidden = draft_block(weights, config, features[:start], table[ids])
            unary = hidden @ head.double().T
            assert drafted == walk(weights, hidden, unary, text[start], threshold)
            changed += drafted != unary.argmax(dim=-1).tolist()[: len(drafted)]
            lengths[len(drafted)] += 1
            start += produced
    assert changed, "the bias is to change what is drafted"
    if threshold is not None:
        assert lengths[0] and len(lengths) > 2, "some blocks are to end at once and some later"


@torch.no_grad()
@pytest.mark.parametrize(
    ("rule", "threshold", "draws"),
    [
        pytest.param(SamplingRule(temperature=0.8), None, 200, marks=pytest.mark.slow),
        (SamplingRule(temperature=0.8), 0.5, 200),
        pytest.param(SamplingRule(temperature=1.3, top_p=0.8), None, 1000, marks=pytest.mark.slow),
        pytest.param(SamplingRule(temperature=1.3, top_p=0.8), 0.5, 1000, marks=pytest.mark.slow),
    ],
)
def test_sampled_blocks_are_the_references_walk_and_answers_the_targets_own(
    rule: SamplingRule, threshold: float | None, draws: int, tmp_path: Path
) -> None:
    torch.manual_seed(1)
    sizes: dict[str, Any] = {"vocab_size": 5, "hidden_size": 16, "head_dim": 4, "intermediate_size": 16}
    target = Qwen3ForCausalLM(Qwen3Config(**{**SHAPE, **sizes, "num_hidden_layers": 3})).eval().requires_grad_(False)
    own = {"mask_token_id": 4, "target_layer_ids": [0, 1], "num_target_layers": 3, "block_size": 2}
    config = config_json(**sizes, **own)
    weights = random_weights(config)
    draft, prompt = saved(tmp_path, config, weights).eval(), [1, 2, 0]
    sampler, answers, blocks = Sampler(rule, 8, torch.device("cpu")), Counter[tuple[int, ...]](), Counter[Any]()
    kept, proposed = Counter[int](), Counter[int]()
    for _ in range(draws):
        decoded = speculative_decode(
            target, draft, prompt, 3, (), sampler, keep_blocks=True, confidence_threshold=threshold
        )
        answers[tuple(decoded.tokens)] += 1
        assert decoded.blocks is not None
        blocks[(decoded.tokens[0], *decoded.blocks[0])] += 1
        kept.update(decoded.kept[:1])
        proposed.update(decoded.proposed[:1])

    def by_target(path: tuple[int, ...]) -> dict[int, float]:
        logits = target(torch.tensor([[*prompt, *path]]), use_cache=False).logits[0, -1]
        return dict(enumerate(rule.probabilities(logits).tolist()))

    features = features_of(target, prompt, [0, 1])
    head, table = target.get_output_embeddings().weight, target.get_input_embeddings().weight

    def by_draft(path: tuple[int, ...]) -> Mapping[int, float]:
        if not path:
            return by_target(path)
        hidden = draft_block(weights, config, features, table[torch.tensor([path[0], 4])])[len(path) - 1]
        if threshold is not None and torch.sigmoid(confidence(weights, hidden, path[-1])) < threshold:
            return {-1: 1.0}
        logits = biased(weights, head.double() @ hidden, path[-1])
        return dict(enumerate(torch.softmax(logits / rule.temperature, dim=0).tolist()))

    def until_end(path: tuple[int, ...]) -> Mapping[int, float]:
        return {-1: 1.0} if -1 in path else by_draft(path)

    wanted: Counter[tuple[int, ...]] = Counter()
    for path, share in sequences(until_end, 3).items():
        wanted[tuple(token for token in path if token >= 0)] += share
    assert p_value(answers, sequences(by_target, 3), draws) > 1e-3
    assert p_value(blocks, wanted, draws) > 1e-3
    if threshold is None:
        assert len(kept) == 3, "drafted tokens are to be kept sometimes and rejected sometimes"
    else:
        assert len(proposed) >= 2, "some blocks are to end early"
