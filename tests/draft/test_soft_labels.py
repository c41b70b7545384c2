"""Losses against the target's own distribution: values and gradients against formulas in float64, and their memory."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from reference import train_step
from tiny import TinyBatch, pack, tiny_batch, tiny_draft, tiny_trainer
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from dflash_offline.schemas.draft.anchor_rule import AnchorRule
from dflash_offline.schemas.errors import DflashError
from dflash_offline.schemas.settings.losses import LossMixture
from dflash_offline.schemas.settings.train import TrainConfig
from dflash_offline.schemas.variants.dflash2 import DFlash2
from dflash_offline.schemas.variants.variant import Variant
from dflash_offline.stages.draft import objective, soft_labels
from dflash_offline.stages.draft.anchors import collate_anchors, draw_anchors
from dflash_offline.stages.draft.objective import Head
from dflash_offline.stages.trainer import DFlashStepMetrics, DFlashTrainerModule

SINGLE = ("kl", "tv", "lk", "soft-ce")
MIXTURES = ("kl:0.9,dflash:0.1", "dpace:0.5,soft-ce:2", "kl:0.3,tv:0.2,lk:0.7,soft-ce:0.4,dflash:0.6")
LENGTHS = [14, 3, 9, 20]


def plain_loss(text: str, logits: Tensor, teacher: Tensor, label: int, temperature: float) -> Tensor:
    """Return one slot's loss in float64, token by token, from the formulas."""
    target = (teacher.double() / temperature).tolist()
    exact = logits.double()
    q = exact.exp() / exact.exp().sum()
    total = sum(math.exp(value) for value in target)
    p = [math.exp(value) / total for value in target]
    kl = sum(p[v] * (math.log(p[v]) - q[v].log()) for v in range(len(p)))
    cross = -sum(p[v] * q[v].log() for v in range(len(p)))
    overlap = sum(q[v] if q[v].item() < p[v] else torch.tensor(p[v], dtype=torch.float64) for v in range(len(p)))
    share = math.exp(-3 * overlap.item())
    one: dict[str, Any] = {
        "kl": kl,
        "soft-ce": cross,
        "tv": 1 - overlap,
        "lk": share * kl + (1 - share) * (1 - overlap),
        "dflash": -q[label].log(),
        "dpace": -q[label].log(),
    }
    parts = [part.partition(":") for part in text.split(",")]
    return sum(float(number or 1) * one[name] for name, _, number in parts)


def problem(bias: bool, slots: int = 9) -> tuple[Tensor, Tensor, Tensor, nn.Linear]:
    generator = torch.Generator().manual_seed(0)
    head = nn.Linear(8, 20, bias=bias).requires_grad_(False)
    hidden = torch.randn(slots, 8, generator=generator).mul_(2).requires_grad_()
    teacher = hidden.detach() + torch.randn(slots, 8, generator=generator)
    return hidden, teacher, torch.randint(20, (slots,), generator=generator), head


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(("chunk", "bias"), [(1, True), (4, False), (None, True)])
@pytest.mark.parametrize("text", [*SINGLE, *MIXTURES])
def test_a_loss_and_its_gradient_are_those_of_the_formula(
    text: str, chunk: int | None, bias: bool, temperature: float
) -> None:
    hidden, teacher, labels, head = problem(bias)
    upstream = torch.randn(len(labels), generator=torch.Generator().manual_seed(1))
    mixture = LossMixture.read(text)
    found = Head(linear=head, chunk_slots=chunk, mixture=mixture, teacher_temperature=temperature).loss(
        hidden, labels, lambda: teacher, top_k=3
    )
    (grad,) = torch.autograd.grad((found.loss * upstream).sum(), hidden)
    logits, theirs = head(hidden), head(teacher)
    slots = zip(logits, theirs, labels.tolist(), strict=True)
    expected = torch.stack([plain_loss(text, mine, its, label, temperature) for mine, its, label in slots])
    (expected_grad,) = torch.autograd.grad((expected * upstream).sum(), hidden)
    torch.testing.assert_close(found.loss.double(), expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(grad, expected_grad, atol=1e-5, rtol=1e-5)
    assert torch.equal(found.correct, logits.argmax(-1) == labels)
    torch.testing.assert_close(found.ce, nn.functional.cross_entropy(logits, labels, reduction="none").detach())
    assert not found.ce.requires_grad
    assert torch.equal(found.ids, logits.topk(3, dim=-1).indices.sort(dim=-1).values)


def test_kl_and_soft_cross_entropy_differ_by_the_targets_entropy_and_have_one_gradient() -> None:
    hidden, teacher, labels, head = problem(bias=False)
    grads, losses = [], []
    for text in ("kl", "soft-ce"):
        loss = Head(linear=head, mixture=LossMixture.read(text)).loss(hidden, labels, lambda: teacher).loss
        grads.append(torch.autograd.grad(loss.sum(), hidden)[0])
        losses.append(loss.detach())
    p = head(teacher).softmax(-1)
    torch.testing.assert_close(losses[1] - losses[0], -(p * p.log()).sum(-1), atol=1e-6, rtol=1e-5)
    assert torch.equal(*grads)


def test_a_draft_that_says_what_the_target_says_has_nothing_to_lose() -> None:
    hidden, _, labels, head = problem(bias=True)
    for text in ("kl", "tv", "lk"):
        same = Head(linear=head, mixture=LossMixture.read(text)).loss(hidden, labels, lambda: hidden.detach())
        (grad,) = torch.autograd.grad(same.loss.sum(), hidden)
        assert same.loss.abs().max() < 1e-6 and grad.abs().max() < 1e-6


def test_under_bfloat16_autocast_both_are_projected_in_bfloat16_and_compared_in_float32() -> None:
    hidden, teacher, labels, head = problem(bias=False)
    with torch.autocast("cpu", torch.bfloat16):
        found = Head(linear=head, mixture=LossMixture.read("lk"), teacher_temperature=0.7).loss(
            hidden, labels, lambda: teacher.bfloat16()
        )
        rounded = head(hidden).float(), head(teacher).float()
    slots = zip(*rounded, labels.tolist(), strict=True)
    expected = torch.stack([plain_loss("lk", mine, its, label, 0.7) for mine, its, label in slots])
    torch.testing.assert_close(found.loss.double(), expected, atol=1e-6, rtol=1e-6)
    (grad,) = torch.autograd.grad(found.loss.sum(), hidden)
    assert grad.dtype == torch.float32


# --- a whole step ------------------------------------------------------------------------------------------------


def final_states(trainer: DFlashTrainerModule, batch: TinyBatch) -> Tensor:
    """Return states [B, S, H], NaN where no slot may read: where the next token is not supervised."""
    width = trainer.target_lm_head.weight.shape[1]
    shape = (*batch.input_ids.shape, width)
    states = 2 * torch.randn(shape, generator=torch.Generator().manual_seed(3))
    is_read = torch.zeros(shape[:2], dtype=torch.bool)
    is_read[:, :-1] = batch.loss_mask[:, 1:] > 0
    return torch.where(is_read[..., None], states, math.nan)


def draws(batch: TinyBatch) -> list[Any]:
    return [
        draw_anchors(mask[:length].bool().numpy(), AnchorRule(4), 6, seed=0, epoch=0, sample_id=i)
        for i, (mask, length) in enumerate(zip(batch.loss_mask, LENGTHS, strict=True))
    ]


def step(
    trainer: DFlashTrainerModule, batch: TinyBatch, final: Tensor, *, packed: bool = False, rows: slice = slice(0, 4)
) -> DFlashStepMetrics:
    part = TinyBatch(*(getattr(batch, field)[rows] for field in TinyBatch.__dataclass_fields__))
    final, drawn = final[rows], draws(batch)[rows]
    anchors, keep = collate_anchors([[each] for each in drawn], [[0]] * len(drawn))
    if packed:
        real = part.document_ids >= 0
        final = torch.cat((final[real], torch.full((3, final.shape[-1]), math.nan)))[None]
        part, (anchors, keep) = pack(part, padding=3), collate_anchors([drawn], [[0, 14, 17, 26]])
    inputs = part.input_ids, part.hidden_states, part.loss_mask
    return trainer(*inputs, document_ids=part.document_ids, anchors=anchors, keep_mask=keep, final=final)


def gradients(loss: Tensor, trainer: DFlashTrainerModule) -> dict[str, Tensor]:
    names, weights = zip(*trainer.draft_model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, weights), strict=True))


Found = tuple[float, dict[str, Tensor]]


def sums_and_gradients(trainer: DFlashTrainerModule, steps: list[DFlashStepMetrics]) -> Found:
    """Return the exact mean loss over some micro-batches, and its gradients."""
    loss = sum(each.loss_sum for each in steps) / sum(each.loss_weight for each in steps)
    return loss.item(), gradients(loss, trainer)


def assert_same(found: Found, wanted: Found) -> None:
    assert found[0] == pytest.approx(wanted[0], rel=2e-6)
    for name, grad in wanted[1].items():
        assert (found[1][name] - grad).norm() <= 1e-5 * grad.norm(), name


@pytest.mark.parametrize(
    ("text", "backend", "packed"),
    [("tv", "sdpa", False), (MIXTURES[0], "eager", True), (MIXTURES[1], "sdpa", True)],
)
def test_a_step_is_that_of_the_slow_reference(text: str, packed: bool, backend: str) -> None:
    settings = {"loss_decay_gamma": None if "dpace" in text else 2.0, "attention_backend": backend}
    trainer = tiny_trainer(loss_type=text, teacher_temperature=0.8, **settings)
    batch = tiny_batch(trainer.draft_model.config, LENGTHS)
    final = final_states(trainer, batch)
    documents = [
        {
            "input_ids": batch.input_ids[i, :length],
            "hidden_states": batch.hidden_states[i, :length],
            "loss_mask": batch.loss_mask[i, :length],
            "final": final[i, :length],
            "anchors": anchors,
        }
        for i, (length, anchors) in enumerate(zip(LENGTHS, draws(batch), strict=True))
    ]
    expected = train_step(
        dict(trainer.draft_model.named_parameters()),
        trainer.draft_model.config,
        trainer.target_lm_head,
        trainer.target_embed_tokens,
        documents,
        trainer.loss_decay_gamma,
        trainer.dpace_alpha if "dpace" in text else None,
        lambda logits, teacher, label: plain_loss(text, logits, teacher, label, 0.8),
    )
    found = step(trainer, batch, final, packed=packed)
    loss = expected.loss_sum / expected.loss_weight
    assert_same(sums_and_gradients(trainer, [found]), (loss.item(), gradients(loss, trainer)))
    assert found.valid_tokens.item() == expected.valid_tokens > 20


@pytest.mark.parametrize("variant", [None, DFlash2(conv_group_size=2, selector_rank=6, selector_top_k=5)], ids=str)
def test_micro_batches_add_up_and_packing_and_checkpointing_change_nothing(variant: Variant | None) -> None:
    trainer = tiny_trainer(tiny_draft(**({"variant": variant} if variant else {})), loss_type=MIXTURES[0])
    batch = tiny_batch(trainer.draft_model.config, LENGTHS)
    final = final_states(trainer, batch)
    whole = sums_and_gradients(trainer, [step(trainer, batch, final)])
    halves = [step(trainer, batch, final, rows=rows) for rows in (slice(0, 2), slice(2, 4))]
    assert_same(sums_and_gradients(trainer, halves), whole)
    assert_same(sums_and_gradients(trainer, [step(trainer, batch, final, packed=True)]), whole)
    trainer.draft_model.gradient_checkpointing = True
    assert_same(sums_and_gradients(trainer, [step(trainer, batch, final)]), whole)


def test_the_selector_learns_what_it_learns_beside_hard_labels() -> None:
    variant = DFlash2(conv_group_size=2, selector_rank=6, selector_top_k=5)
    found = {}
    for text in ("dflash", "kl"):
        trainer = tiny_trainer(tiny_draft(variant=variant), loss_type=text)
        batch = tiny_batch(trainer.draft_model.config, LENGTHS)
        metrics = step(trainer, batch, final_states(trainer, batch))
        grads = gradients(metrics.loss, trainer)
        found[text] = {name: grad for name, grad in grads.items() if "selector" in name}, metrics.part_sums
    assert found["kl"][0].keys() == found["dflash"][0].keys() and found["kl"][0]
    for name, grad in found["dflash"][0].items():
        torch.testing.assert_close(found["kl"][0][name], grad, atol=1e-6, rtol=1e-5)
    assert found["kl"][1]["selector_loss"].item() == pytest.approx(found["dflash"][1]["selector_loss"].item())
    assert found["kl"][1]["draft_loss"] != found["dflash"][1]["draft_loss"]


def test_a_step_without_the_targets_states_is_refused() -> None:
    trainer = tiny_trainer(loss_type="kl")
    batch = tiny_batch(trainer.draft_model.config, LENGTHS)
    with pytest.raises(DflashError, match=r"final is not given, and this draft's loss reads it"):
        trainer(batch.input_ids, batch.hidden_states, batch.loss_mask, document_ids=batch.document_ids)


PLANTED: dict[str, Callable[[pytest.MonkeyPatch, DFlashTrainerModule, Tensor], Tensor]] = {
    "the state at the label": lambda patch, trainer, final: final.roll(-1, dims=1),
    "the state two before it": lambda patch, trainer, final: final.roll(1, dims=1),
    "another decay of lk": lambda patch, trainer, final: _planted(patch, final),
    "another temperature": lambda patch, trainer, final: _warmer(trainer, final),
}


def _planted(patch: pytest.MonkeyPatch, final: Tensor) -> Tensor:
    patch.setattr(soft_labels, "LK_DECAY", 2.5)
    return final


def _warmer(trainer: DFlashTrainerModule, final: Tensor) -> Tensor:
    trainer.teacher_temperature = 0.9
    return final


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_mistake_shows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = tiny_trainer(loss_type="lk")
    batch = tiny_batch(trainer.draft_model.config, LENGTHS)
    final = final_states(trainer, batch).nan_to_num(nan=0.3)
    right = sums_and_gradients(trainer, [step(trainer, batch, final)])
    wrong = sums_and_gradients(trainer, [step(trainer, batch, PLANTED[name](monkeypatch, trainer, final))])
    with pytest.raises(AssertionError):
        assert_same(wrong, right)


# --- memory ------------------------------------------------------------------------------------------------------


VOCAB = 3000


def most_held(text: str, dtype: torch.dtype, chunk: int | None = None) -> tuple[int, int]:
    """Return the most bytes that a pass over slots holds beyond its inputs, and the bytes of a chunk's logits."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(600, 16, generator=generator).requires_grad_()
    head = nn.Linear(16, VOCAB, bias=False).requires_grad_(False).to(dtype)
    labels, teacher = torch.randint(VOCAB, (600,), generator=generator), torch.randn(600, 16, generator=generator)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        loss = Head(linear=head, mixture=LossMixture.read(text), chunk_slots=chunk).loss(
            hidden, labels, lambda: teacher
        )
        loss.loss.sum().backward()
    kineto = found.profiler.kineto_results  # type: ignore[union-attr]
    held = most = 0
    for event in sorted(kineto.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most, 4 * 128 * VOCAB


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_targets_distribution_takes_no_more_memory_than_a_quarter_beyond_hard_labels(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(objective.HEAD_CHUNK_BYTES, "cpu", 0)  # so many slots at once as there are always
    hard, chunk = most_held("dflash", dtype)
    assert hard > chunk, "the logits are seen"
    for text in ("kl", "tv", "lk:0.9,dflash:0.1"):
        assert most_held(text, dtype)[0] <= 1.25 * hard, text
    assert most_held("kl", dtype, chunk=600)[0] > 2 * hard, "all slots at once would show"


# --- names -------------------------------------------------------------------------------------------------------


def test_a_mixture_reads_as_it_is_written_and_is_written_in_one_way() -> None:
    assert str(LossMixture.read("dflash:0.10, kl:.9")) == str(LossMixture.read("kl:0.9,dflash:0.1"))
    assert str(LossMixture.read("kl:1")) == str(LossMixture.read("kl:0.5")) == "kl", "a single one has no other scale"
    assert str(LossMixture.read(str(LossMixture.read("tv:0.123456789,kl:1")))) == "kl:1,tv:0.123456789"
    for text, soft in {"dflash": False, "dpace": False, "kl": True, "dflash:0.9,tv:0.1": True}.items():
        assert LossMixture.read(text).needs_final is soft


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("soft_ce", r"loss is 'soft_ce'; expected dflash, .* or soft-ce\. Did you mean soft-ce\?"),
        ("kl,dflash", "gives kl no coefficient"),
        ("kl:0.9,kl:0.1", "names kl twice"),
        ("kl:-1,dflash:1", "coefficient '-1'; expected a number above 0"),
        ("kl:much", "coefficient 'much'"),
        ("kl:inf,tv:1", "coefficient 'inf'"),
        ("dflash:0.5,dpace:0.5", "mixes dflash and dpace"),
        ("", "loss is ''"),
    ],
)
def test_what_names_no_mixture_is_refused_by_the_settings_and_the_trainer(tmp_path: Any, text: str, why: str) -> None:
    with pytest.raises(DflashError, match=why):
        TrainConfig(caches=(tmp_path,), out=tmp_path, loss=text)
    with pytest.raises(DflashError, match=why):
        tiny_trainer(loss_type=text)
