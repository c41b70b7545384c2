"""The training step: against the slow reference, packed against unpacked, and against the draft as it is served."""

import logging
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from reference import ReferenceStep, anchors_by_brute_force, train_step
from serving import MISTAKES, check_training_equals_serving, served_by_own_draft, short_rows
from tiny import ATTENTION, TinyBatch, pack, tiny_batch, tiny_draft, tiny_target_ends, tiny_trainer
from torch import Tensor, nn

from dflash_offline.schemas.draft.anchor_rule import AnchorRule
from dflash_offline.schemas.errors import DflashError, NoValidAnchorsError
from dflash_offline.schemas.variants.dflash import DFlash
from dflash_offline.schemas.variants.dflash2 import DFlash2
from dflash_offline.schemas.variants.variant import Variant
from dflash_offline.stages.draft import attention
from dflash_offline.stages.draft.anchors import collate_anchors, draw_anchors
from dflash_offline.stages.trainer import DFlashStepMetrics, DFlashTrainerModule

LENGTHS = [14, 3, 9, 20]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give tiny batches several tiles of sdpa."""
    monkeypatch.setattr(attention, "TILE_QUERIES", 11)


def document_draws(batch: TinyBatch, lengths: list[int], num_anchors: int = 6) -> list[Any]:
    return [
        draw_anchors(mask[:length].bool().numpy(), AnchorRule(4), num_anchors, seed=0, epoch=0, sample_id=i)
        for i, (mask, length) in enumerate(zip(batch.loss_mask, lengths, strict=True))
    ]


def arguments(batch: TinyBatch) -> tuple[Tensor, Tensor, Tensor]:
    return batch.input_ids, batch.hidden_states, batch.loss_mask


def reference_step(trainer: DFlashTrainerModule, batch: TinyBatch, lengths: list[int]) -> ReferenceStep:
    documents = [
        {
            "input_ids": batch.input_ids[i, :length],
            "hidden_states": batch.hidden_states[i, :length],
            "loss_mask": batch.loss_mask[i, :length],
            "anchors": anchors,
        }
        for i, (length, anchors) in enumerate(zip(lengths, document_draws(batch, lengths), strict=True))
    ]
    alpha = trainer.dpace_alpha if trainer.loss_type == "dpace" else None
    return train_step(
        dict(trainer.draft_model.named_parameters()),
        trainer.draft_model.config,
        trainer.target_lm_head,
        trainer.target_embed_tokens,
        documents,
        trainer.loss_decay_gamma,
        alpha,
    )


def gradients(loss: Tensor, trainer: DFlashTrainerModule) -> dict[str, Tensor]:
    names, weights = zip(*trainer.draft_model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, weights), strict=True))


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"loss_decay_gamma": 2.0}, {"loss_type": "dpace"}, {"head_chunk_slots": 5, "bias": True}],
    ids=["flat", "gamma", "dpace", "chunks"],
)
def test_step_equals_the_slow_reference(settings: dict[str, Any], backend: str, packed: bool) -> None:
    check_step(tiny_trainer(attention_backend=backend, **settings), packed)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("backend", ["sdpa", "eager", "flex_attention"])
@pytest.mark.parametrize("attention", ATTENTION)
def test_step_with_windows_and_causal_layers_equals_the_slow_reference(
    attention: str, backend: str, packed: bool
) -> None:
    trainer = tiny_trainer(tiny_draft(**ATTENTION[attention]), attention_backend=backend)
    with torch.set_grad_enabled(backend != "flex_attention"):  # it has no backward on the CPU
        check_step(trainer, packed)


def check_step(trainer: DFlashTrainerModule, packed: bool) -> None:
    """Fail unless loss, sums and gradients of a step are the slow reference's."""
    batch = tiny_batch(trainer.draft_model.config, LENGTHS)
    draws = document_draws(batch, LENGTHS)
    if packed:
        inputs, (anchors, keep) = pack(batch, padding=3), collate_anchors([draws], [[0, 14, 17, 26]])
    else:
        inputs, (anchors, keep) = batch, collate_anchors([[d] for d in draws], [[0]] * 4)
    step = trainer(*arguments(inputs), document_ids=inputs.document_ids, anchors=anchors, keep_mask=keep)
    expected = reference_step(trainer, batch, LENGTHS)

    assert step.loss.item() == pytest.approx(expected.loss.item(), rel=1e-6)
    assert step.loss_sum.item() == pytest.approx(expected.loss_sum.item(), rel=1e-6)
    assert step.loss_weight.item() == pytest.approx(expected.loss_weight, rel=1e-6)
    assert step.valid_tokens.item() == expected.valid_tokens > 0
    assert step.correct_tokens.item() == expected.correct_tokens
    assert step.accuracy.item() == pytest.approx(expected.correct_tokens / expected.valid_tokens)
    assert step.valid_blocks.item() == len(expected.accept_lens)
    assert step.accept_len_sum.item() == sum(expected.accept_lens)
    assert step.accept_len.item() == pytest.approx(sum(expected.accept_lens) / len(expected.accept_lens))
    assert step.correct_by_slot.tolist() == expected.correct_by_slot
    assert step.valid_by_slot.tolist() == expected.valid_by_slot
    if not torch.is_grad_enabled():
        return
    found, wanted = gradients(step.loss, trainer), gradients(expected.loss, trainer)
    for name, grad in wanted.items():
        assert (found[name] - grad).norm() <= 1e-5 * grad.norm(), name


@pytest.mark.parametrize("rule", ["document, padded", "document, packed", "bare"])
@pytest.mark.parametrize("backend", ["sdpa", "flex_attention"])
def test_a_step_of_partial_blocks_equals_the_slow_reference(backend: str, rule: str) -> None:
    """Down to the last two tokens of every document, of which one is only three long; all that may anchor is drawn."""
    settings: dict[str, Any] = {"loss_decay_gamma": 2.0, "num_anchors": 64, "anchor_kind": "partial"}
    trainer = tiny_trainer(attention_backend=backend, **settings)
    batch = tiny_batch(trainer.draft_model.config, LENGTHS)
    if rule == "bare":
        batch = TinyBatch(*(getattr(batch, name)[:1] for name in TinyBatch.__dataclass_fields__))
        batch = TinyBatch(*(getattr(batch, name)[:, : LENGTHS[0]] for name in TinyBatch.__dataclass_fields__))
    lengths = LENGTHS[: len(batch.input_ids)]
    documents: list[dict[str, Any]] = []
    for i, length in enumerate(lengths):
        names = ("input_ids", "hidden_states", "loss_mask")
        documents.append({name: getattr(batch, name)[i, :length] for name in names})
        found = anchors_by_brute_force(documents[-1]["loss_mask"].tolist(), 4, partial=True)
        documents[-1]["anchors"] = torch.tensor(found)
    assert min(len(one["input_ids"]) - int(one["anchors"].max()) for one in documents) < 4, "there are partial blocks"
    inputs = pack(batch, padding=3) if rule.endswith("packed") else batch
    ids = None if rule == "bare" else inputs.document_ids
    with torch.set_grad_enabled(backend != "flex_attention"):
        step = trainer(*arguments(inputs), document_ids=ids)
    weights, config = dict(trainer.draft_model.named_parameters()), trainer.draft_model.config
    expected = train_step(weights, config, trainer.target_lm_head, trainer.target_embed_tokens, documents, 2.0)
    assert step.loss_sum.item() == pytest.approx(expected.loss_sum.item(), rel=1e-6)
    assert step.loss_weight.item() == pytest.approx(expected.loss_weight, rel=1e-6)
    assert step.valid_by_slot.tolist() == expected.valid_by_slot
    assert step.accept_len_sum.item() == sum(expected.accept_lens)
    assert step.valid_blocks.item() == sum(len(one["anchors"]) for one in documents), "no block trains nothing"
    if backend != "flex_attention":
        found, wanted = gradients(step.loss, trainer), gradients(expected.loss, trainer)
        for name, grad in wanted.items():
            assert (found[name] - grad).norm() <= 1e-5 * grad.norm(), name


def test_gradients_of_the_numerator_add_up_over_micro_batches() -> None:
    trainer = tiny_trainer(loss_decay_gamma=3.0)
    batch = tiny_batch(trainer.draft_model.config, LENGTHS)
    draws = document_draws(batch, LENGTHS)

    def step(rows: slice) -> DFlashStepMetrics:
        part = TinyBatch(*(getattr(batch, f)[rows] for f in TinyBatch.__dataclass_fields__))
        anchors, keep = collate_anchors([[d] for d in draws[rows]], [[0]] * len(draws[rows]))
        return trainer(*arguments(part), document_ids=part.document_ids, anchors=anchors, keep_mask=keep)

    whole, parts = step(slice(0, 4)), [step(slice(0, 2)), step(slice(2, 4))]
    total = sum(p.loss_sum for p in parts) / sum(p.loss_weight for p in parts)
    assert total.item() == pytest.approx(whole.loss.item(), rel=1e-6)
    found, wanted = gradients(total, trainer), gradients(whole.loss, trainer)
    for name, grad in wanted.items():
        assert (found[name] - grad).norm() <= 1e-5 * grad.norm(), name


# --- training equals serving -------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("backend", ["sdpa", "eager", "flex_attention"])
def test_training_equals_serving_at_every_anchor(backend: str, attention: str) -> None:
    trainer = tiny_trainer(tiny_draft(**ATTENTION[attention]), attention_backend=backend)
    rows = short_rows(trainer.draft_model.config)
    check_training_equals_serving(trainer, rows, served_by_own_draft(trainer, rows))


@pytest.mark.parametrize("trained", ATTENTION)
def test_a_draft_served_with_another_mask_fails_the_serving_check(trained: str) -> None:
    trainer = tiny_trainer(tiny_draft(**ATTENTION[trained]))
    rows = short_rows(trainer.draft_model.config)
    for other in ATTENTION.keys() - {trained}:
        served = served_by_own_draft(trainer, rows, tiny_draft(**ATTENTION[other]))
        with pytest.raises(AssertionError, match="not close"):
            check_training_equals_serving(trainer, rows, served)


@pytest.mark.parametrize("plant", MISTAKES)
def test_a_planted_mistake_fails_the_serving_check(
    plant: Callable[[DFlashTrainerModule, pytest.MonkeyPatch], dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = tiny_trainer()
    rows = short_rows(trainer.draft_model.config)
    served = served_by_own_draft(trainer, rows)
    with pytest.raises(AssertionError, match="not close"):
        check_training_equals_serving(trainer, rows, served, **plant(trainer, monkeypatch))


# --- documents, draws and backends -------------------------------------------------------------------------------


@pytest.mark.parametrize("same_batch", [True, False])
def test_a_document_trains_alike_whatever_stands_beside_it(same_batch: bool) -> None:
    trainer = tiny_trainer()
    batch = tiny_batch(trainer.draft_model.config, LENGTHS)
    draws = document_draws(batch, LENGTHS)
    total = torch.zeros(())
    for i, length in enumerate(LENGTHS):
        if len(draws[i]) == 0:
            continue
        anchors, keep = collate_anchors([[draws[i]]], [[0]])
        row = [x[i : i + 1, :length] for x in arguments(batch)]
        total = total + trainer(*row, anchors=anchors, keep_mask=keep).loss_sum.detach()
    if same_batch:
        inputs, (anchors, keep) = batch, collate_anchors([[d] for d in draws], [[0]] * 4)
    else:
        inputs, (anchors, keep) = pack(batch, padding=9), collate_anchors([draws], [[0, 14, 17, 26]])
    together = trainer(*arguments(inputs), document_ids=inputs.document_ids, anchors=anchors, keep_mask=keep)
    assert together.loss_sum.item() == pytest.approx(total.item(), rel=1e-6)


def test_flex_forward_equals_sdpa() -> None:
    steps = []
    for backend in ("sdpa", "flex_attention"):
        trainer = tiny_trainer(attention_backend=backend)
        batch = pack(tiny_batch(trainer.draft_model.config, LENGTHS))
        with torch.no_grad():
            generator = torch.Generator().manual_seed(0)
            steps.append(trainer(*arguments(batch), document_ids=batch.document_ids, generator=generator))
    assert steps[1].loss.item() == pytest.approx(steps[0].loss.item(), rel=1e-6)
    assert steps[1].correct_by_slot.tolist() == steps[0].correct_by_slot.tolist()


def test_flex_on_the_cpu_trains_with_sdpa_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    trainer = tiny_trainer(attention_backend="flex_attention")
    batch = tiny_batch(trainer.draft_model.config, LENGTHS)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            trainer(*arguments(batch)).loss.backward()
    assert [r.message for r in caplog.records] == [
        "Flex attention has no backward on the CPU: training with sdpa instead."
    ]


def test_a_generator_makes_the_bare_call_reproducible_and_without_one_draws_are_fresh() -> None:
    trainer = tiny_trainer()
    batch = tiny_batch(trainer.draft_model.config, [40, 40])

    def loss(seed: int | None) -> float:
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        with torch.no_grad():
            return trainer(*arguments(batch), generator=generator).loss.item()

    assert loss(3) == loss(3) != loss(4)
    assert loss(None) != loss(None)


def test_a_batch_without_a_supervised_successor_has_no_loss_and_does_not_raise() -> None:
    trainer = tiny_trainer()
    batch = tiny_batch(trainer.draft_model.config, [12])
    batch.loss_mask.zero_()[0, 2] = 1
    for settings in ({}, {"document_ids": batch.document_ids}):
        step = trainer(*arguments(batch), **settings)
        assert (step.loss.item(), step.valid_tokens.item(), step.valid_blocks.item()) == (0.0, 0, 0)
        assert (step.accuracy.item(), step.accept_len.item()) == (0.0, 0.0)
        step.loss.backward()
        assert all(not p.grad.any() for p in trainer.draft_model.parameters() if p.grad is not None)


def test_a_row_without_anchors_beside_one_with_them_stays_finite() -> None:
    trainer = tiny_trainer()
    batch = tiny_batch(trainer.draft_model.config, [14, 14])
    batch.loss_mask[1] = 0
    step = trainer(*arguments(batch))
    step.loss.backward()
    assert all(bool(p.grad.isfinite().all()) for p in trainer.draft_model.parameters() if p.grad is not None)


def test_no_valid_anchors_is_an_error_with_the_lengths() -> None:
    trainer = tiny_trainer()
    batch = tiny_batch(trainer.draft_model.config, [12])
    with pytest.raises(NoValidAnchorsError, match=r"whole block after it.*S = 12.*K = 4"):
        trainer(batch.input_ids, batch.hidden_states, torch.zeros_like(batch.loss_mask))
    with pytest.raises(NoValidAnchorsError, match=r"whole block after it.*S = 12.*K = 4"):
        trainer(*arguments(batch), anchors=torch.zeros(1, 0, dtype=torch.long))


# --- the module's surface ----------------------------------------------------------------------------------------


def test_block_inputs_are_the_anchor_token_then_masks_and_all_masks_where_not_kept() -> None:
    trainer = tiny_trainer()
    tokens = torch.arange(10)[None]
    embedded = trainer._create_noise_embed(tokens, torch.tensor([[2, 7, 0]]), torch.tensor([[True, True, False]]))
    expected = torch.tensor([[2, 39, 39, 39, 7, 39, 39, 39, 39, 39, 39, 39]])
    assert torch.equal(embedded, trainer.target_embed_tokens(expected))
    positions = trainer._create_position_ids(torch.tensor([[2, 7]]))
    assert positions.tolist() == [[2, 3, 4, 5, 7, 8, 9, 10]]


class RecordingDraft(nn.Module):
    """Stands for another project's draft: keeps how it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.call: dict[str, Tensor] = {}

    def forward(self, **call: Tensor) -> Tensor:
        self.call = call
        return call["noise_embedding"]


def test_another_draft_is_called_as_the_reference_client_is_and_gets_a_dense_mask() -> None:
    own = tiny_trainer()
    draft = RecordingDraft()
    trainer = DFlashTrainerModule(draft, own.target_lm_head, own.target_embed_tokens, 39, 4, num_anchors=5)
    batch = tiny_batch(own.draft_model.config, [20, 20])
    trainer(*arguments(batch))
    shapes = {name: tuple(x.shape) for name, x in draft.call.items()}
    assert shapes == {
        "position_ids": (2, 40),
        "noise_embedding": (2, 20, 32),
        "target_hidden": (2, 20, 64),
        "attention_mask": (2, 1, 20, 40),
    }
    assert draft.call["attention_mask"].dtype == torch.bool


@pytest.mark.parametrize("said", [{"layer_types": ["sliding_attention"] * 2}, {"is_causal": True}])
def test_another_draft_with_windows_or_causal_layers_is_refused(said: dict[str, Any]) -> None:
    own, draft = tiny_trainer(), RecordingDraft()
    draft.config = SimpleNamespace(**said)
    with pytest.raises(DflashError, match=r"expected full attention that is not causal.*load_draft"):
        DFlashTrainerModule(draft, own.target_lm_head, own.target_embed_tokens, 39, 4)


def test_the_readmes_library_example_runs_as_written() -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    (example,) = re.findall(r"## As a library\n```python\n(.*?)```", readme, re.DOTALL)
    draft = tiny_draft(block_size=16)
    head, table = tiny_target_ends(draft.config)
    batch = tiny_batch(draft.config, [60, 40])
    names = {
        "draft_model": draft,
        "target_lm_head": head,
        "target_embed_tokens": table,
        "mask_token_id": draft.config.mask_token_id,
        **{field: getattr(batch, field) for field in TinyBatch.__dataclass_fields__},
    }
    exec(example, names)
    assert names["metrics"].valid_tokens > 0
    assert all(p.grad is not None for p in draft.parameters())


@pytest.mark.parametrize("attention", ["full", "one causal sliding"])
def test_the_last_layer_computes_the_rows_that_a_loss_reads_and_no_other(attention: str) -> None:
    trainer = tiny_trainer(tiny_draft(**ATTENTION[attention]))
    batch, seen = tiny_batch(trainer.draft_model.config, [30, 12]), list[Tensor]()
    whole, asked = trainer.draft_model.forward, []
    trainer.draft_model.layers[-1].mlp.register_forward_hook(lambda _m, _a, output: seen.append(output))
    step = trainer(*arguments(batch), generator=torch.Generator().manual_seed(0))
    assert seen[0].shape == (int(step.valid_tokens), 32) and seen[0].shape[0] < 0.7 * 2 * 6 * 4

    def all_rows(*, rows: Tensor, **inputs: Any) -> Tensor:
        asked.append(rows)
        return whole(**inputs).flatten(0, 1).index_select(0, rows)

    wanted = gradients(step.loss, trainer)
    trainer.draft_model.forward = all_rows
    other = trainer(*arguments(batch), generator=torch.Generator().manual_seed(0))
    assert len(asked) == 1 and other.loss.item() == pytest.approx(step.loss.item(), rel=1e-6)
    for name, grad in gradients(other.loss, trainer).items():
        torch.testing.assert_close(grad, wanted[name], rtol=1e-5, atol=1e-6, msg=name)


def test_only_the_draft_is_trained() -> None:
    trainer = tiny_trainer(bias=True)
    trainable = {id(p) for p in trainer.parameters() if p.requires_grad}
    assert trainable == {id(p) for p in trainer.trainable_parameters()}
    assert trainable == {id(p) for p in trainer.draft_model.parameters()}


@pytest.mark.parametrize("loss_type", ["dflash", "dpace"])
def test_a_step_under_bfloat16_autocast_is_near_the_float32_step(loss_type: str) -> None:
    trainer = tiny_trainer(loss_type=loss_type)
    batch = tiny_batch(trainer.draft_model.config, [20, 20])
    run: Callable[[], DFlashStepMetrics] = lambda: trainer(  # noqa: E731
        *arguments(batch), generator=torch.Generator().manual_seed(0)
    )
    exact = run().loss.item()
    with torch.autocast("cpu", torch.bfloat16):
        rough = run()
    rough.loss.backward()
    assert rough.loss.dtype == torch.float32
    assert rough.loss.item() == pytest.approx(exact, rel=0.05)


def test_gradient_checkpointing_changes_nothing_but_what_is_kept() -> None:
    kept: dict[bool, int] = {}
    losses, grads = [], []
    for checkpointing in (False, True):
        trainer = tiny_trainer()
        trainer.draft_model.gradient_checkpointing = checkpointing
        batch = tiny_batch(trainer.draft_model.config, [40, 40])
        kept[checkpointing] = 0

        def note(x: Tensor, on: bool = checkpointing) -> Tensor:
            kept[on] += x.numel()
            return x

        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            loss = trainer(*arguments(batch), generator=torch.Generator().manual_seed(0)).loss
        losses.append(loss)
        grads.append(gradients(loss, trainer))
    assert torch.equal(*losses) and kept[True] < 0.5 * kept[False]
    for name, grad in grads[0].items():
        assert torch.equal(grad, grads[1][name]), name


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch warns itself while it traces, and hides that only from users
@pytest.mark.parametrize("variant", [DFlash(), DFlash2(conv_group_size=8, selector_rank=6, selector_top_k=5)])
@pytest.mark.parametrize("backend", ["sdpa", "flex_attention"])
def test_a_compiled_step_equals_an_uncompiled_one(backend: str, variant: Variant) -> None:
    steps = []
    for compiled in (False, True):
        draft = tiny_draft(variant=variant)
        trainer = tiny_trainer(draft, attention_backend=backend, compiled=compiled, head_chunk_slots=16)
        batch = tiny_batch(trainer.draft_model.config, LENGTHS)
        with torch.set_grad_enabled(backend != "flex_attention"):  # it has no backward on the CPU
            step = trainer(*arguments(batch), generator=torch.Generator().manual_seed(0))
        steps.append((step, gradients(step.loss, trainer) if step.loss.requires_grad else {}))
    (plain, wanted), (compiled_step, found) = steps
    assert compiled_step.loss.item() == pytest.approx(plain.loss.item(), rel=1e-6)
    assert compiled_step.correct_by_slot.tolist() == plain.correct_by_slot.tolist()
    for name, grad in wanted.items():
        assert (found[name] - grad).norm() <= 1e-5 * grad.norm(), name


def test_bfloat16_features_train_a_float32_draft() -> None:
    trainer = tiny_trainer()
    batch = tiny_batch(trainer.draft_model.config, [20])
    trainer(batch.input_ids, batch.hidden_states.bfloat16(), batch.loss_mask).loss.backward()


def test_trainer_lists_every_bad_setting_at_once() -> None:
    with pytest.raises(DflashError) as error:
        tiny_trainer(num_anchors=0, attention_backend="flash", loss_type="mean", loss_decay_gamma=0.0, dpace_alpha=2.0)
    for name in ("num_anchors", "attention_backend", "loss_type", "loss_decay_gamma", "dpace_alpha"):
        assert name in str(error.value)


def test_trainer_refuses_a_block_size_the_draft_is_not_served_with() -> None:
    own = tiny_trainer()
    with pytest.raises(DflashError, match="block_size is 16, but the draft's config, which is served, says 4"):
        DFlashTrainerModule(tiny_draft(), own.target_lm_head, own.target_embed_tokens, 39)


def test_trainer_refuses_inputs_of_different_lengths() -> None:
    trainer = tiny_trainer()
    batch = tiny_batch(trainer.draft_model.config, [20])
    with pytest.raises(DflashError, match=r"expected \[B, S\], \[B, S, L\*H\] and \[B, S\]"):
        trainer(batch.input_ids, batch.hidden_states[:, 1:], batch.loss_mask)


def test_flex_attention_may_be_compiled_for_all_shapes_of_a_padded_run() -> None:
    with torch._dynamo.config.patch(recompile_limit=8):
        tiny_trainer(attention_backend="sdpa")
        assert torch._dynamo.config.recompile_limit == 8
        tiny_trainer(attention_backend="flex_attention")
        assert torch._dynamo.config.recompile_limit >= 64
