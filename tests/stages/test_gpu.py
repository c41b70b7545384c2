"""What only a GPU can show: flex attention's gradients, compiled steps in bfloat16, and both stages on one."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import ATTENTION, pack, tiny_batch, tiny_draft, tiny_trainer
from torch import Tensor

from dflash_offline.schemas.draft.anchor_rule import AnchorRule
from dflash_offline.schemas.settings.extract import ExtractConfig
from dflash_offline.schemas.settings.train import TrainConfig
from dflash_offline.schemas.variants.dflash import DFlash
from dflash_offline.schemas.variants.dflash2 import DFlash2
from dflash_offline.schemas.variants.variant import Variant
from dflash_offline.stages.draft.attention import Blocks, attend, flex_mask, tiled_mask
from dflash_offline.stages.draft.model import DraftModel
from dflash_offline.stages.extract import extract
from dflash_offline.stages.progress import Silent
from dflash_offline.stages.train import train
from dflash_offline.stages.trainer import DFlashStepMetrics
from dflash_offline.stages.training.corpus import Corpus
from dflash_offline.stages.training.loader import BatchLoader

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore"),  # torch warns itself while it traces, and hides that only from users
]
DEVICE = "cuda"
SHAPE = {"hidden_size": 64, "head_dim": 16, "block_size": 8, "mask_token_id": 39}


@pytest.fixture(autouse=True)
def gpu() -> None:
    """Fail where there is none; draw alike in every run."""
    if not torch.cuda.is_available():
        pytest.fail("No CUDA device is visible to torch. `make check-gpu` needs one.")
    torch.manual_seed(0)


DFLASH2 = DFlash2(conv_group_size=8, selector_rank=6, selector_top_k=5)


def draft_with(attention: str, variant: Variant = DFlash()) -> DraftModel:  # noqa: B008
    settings = ATTENTION[attention] | {"variant": variant}
    return tiny_draft(**SHAPE, **settings | ({"sliding_window": 40} if "sliding_window" in settings else {}))


def trained(
    device: str = DEVICE,
    attention: str = "full",
    bfloat16: bool = False,
    checkpointing: bool = False,
    variant: Variant = DFlash(),  # noqa: B008
    **settings: Any,
) -> tuple[DFlashStepMetrics, dict[str, Tensor]]:
    """Return a step's metrics and its gradients."""
    trainer = tiny_trainer(draft_with(attention, variant), **settings).to(device)
    trainer.draft_model.gradient_checkpointing = checkpointing
    batch = pack(tiny_batch(trainer.draft_model.config, [300, 90, 200]), padding=50)
    inputs = [x.to(device) for x in (batch.input_ids, batch.hidden_states, batch.loss_mask)]
    anchors = torch.tensor([[10, 40, 41, 250, 310, 350, 400, 500, 560]], device=device)
    with torch.autocast(device, torch.bfloat16, enabled=bfloat16):
        metrics: DFlashStepMetrics = trainer(*inputs, document_ids=batch.document_ids.to(device), anchors=anchors)
    metrics.loss.backward()
    return metrics, {name: p.grad.float().cpu() for name, p in trainer.draft_model.named_parameters()}


def check_close(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float) -> None:
    for name, grad in wanted.items():
        assert (found[name] - grad).norm() <= tolerance * grad.norm(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("attention", ATTENTION)
def test_flex_attention_and_its_gradients_equal_sdpas(attention: str, dtype: torch.dtype) -> None:
    config = draft_with(attention).config
    batch = pack(tiny_batch(config, [300, 90, 200]), padding=50)
    anchors = torch.arange(4, 590, 9, device=DEVICE)[None]
    keep = torch.rand(anchors.shape, device=DEVICE) < 0.9
    blocks = Blocks(anchors, keep, batch.document_ids.to(DEVICE), batch.input_ids.shape[1], 8)
    num_keys = blocks.seq_len + blocks.num_queries
    q = torch.randn(1, 4, blocks.num_queries, 16, device=DEVICE, dtype=dtype, requires_grad=True)
    k, v = (torch.randn(1, 2, num_keys, 16, device=DEVICE, dtype=dtype, requires_grad=True) for _ in range(2))
    above = torch.randn_like(q)
    for rule in config.attention_rules.values():
        results = []
        for backend, mask in (("sdpa", tiled_mask(blocks, rule)), ("flex_attention", flex_mask(blocks, rule))):
            out = attend(q, k, v, mask, backend)
            results.append((out, *torch.autograd.grad(out, (q, k, v), above)))
        tolerance = 1e-4 if dtype == torch.float32 else 2e-2
        for sdpa, flex in zip(*results, strict=True):
            assert (flex - sdpa).float().norm() <= tolerance * sdpa.float().norm()


@pytest.mark.parametrize("attention", ATTENTION)
def test_a_flex_step_on_the_gpu_equals_the_cpus(attention: str) -> None:
    metrics, grads = trained(attention=attention, attention_backend="flex_attention")
    expected, wanted = trained("cpu", attention)
    assert metrics.loss.item() == pytest.approx(expected.loss.item(), rel=1e-5)
    check_close(grads, wanted, 1e-4)


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled"])
def test_a_flex_step_in_bfloat16_is_near_the_cpus_in_float32(compiled: bool, attention: str) -> None:
    metrics, grads = trained(attention=attention, bfloat16=True, attention_backend="flex_attention", compiled=compiled)
    expected, wanted = trained("cpu", attention)
    assert metrics.loss.item() == pytest.approx(expected.loss.item(), rel=2e-2)
    check_close(grads, wanted, 0.1)


@pytest.mark.parametrize("attention", ["full", "sliding"])
def test_a_dflash2_step_on_the_gpu_equals_the_cpus_and_in_bfloat16_is_near(attention: str) -> None:
    expected, wanted = trained("cpu", attention, variant=DFLASH2)
    metrics, grads = trained(attention=attention, variant=DFLASH2, attention_backend="flex_attention")
    assert metrics.loss.item() == pytest.approx(expected.loss.item(), rel=1e-5)
    check_close(grads, wanted, 1e-4)
    halved, _ = trained(
        attention=attention, bfloat16=True, variant=DFLASH2, attention_backend="flex_attention", compiled=True
    )
    assert halved.loss.item() == pytest.approx(expected.loss.item(), rel=2e-2)


@pytest.mark.parametrize("variant", [DFlash(), DFLASH2])
def test_a_compiled_step_with_checkpointing_equals_a_plain_one(variant: Variant) -> None:
    expected, wanted = trained(attention_backend="flex_attention", variant=variant)
    metrics, grads = trained(checkpointing=True, attention_backend="flex_attention", compiled=True, variant=variant)
    assert metrics.loss.item() == pytest.approx(expected.loss.item(), rel=1e-5)
    check_close(grads, wanted, 1e-4)


@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled"])
def test_padded_batches_of_many_shapes_never_run_flex_attention_uncompiled(compiled: bool) -> None:
    draft = draft_with("one sliding")
    trainer = tiny_trainer(draft, attention_backend="flex_attention", compiled=compiled).to(DEVICE)
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for rows, length, grad in itertools.product((4, 3, 1), (60, 90, 140), (True, False)):
            batch = tiny_batch(draft.config, [length] * rows)
            with torch.set_grad_enabled(grad):
                trainer(*(x.to(DEVICE) for x in (batch.input_ids, batch.hidden_states, batch.loss_mask)))


def test_batches_copied_beside_the_computation_are_the_loaded_ones(cache: Path) -> None:
    loader = BatchLoader(
        Corpus.open((cache,)),
        layer_ids=(1, 4),
        anchor_rule=AnchorRule(8),
        num_anchors=5,
        seed=0,
        shape=None,
        device=torch.device(DEVICE),
    )
    busy = torch.randn(4096, 4096, device=DEVICE)
    order = [[np.array([sample % 80])] for sample in range(200)]
    sums = []
    for batch in loader.stream(((rows, 0) for rows in order), threads=3):
        busy = busy @ busy / 64  # the computation lags behind, as the copies must not know
        sums.append(batch.hidden_states.double().sum() + batch.input_ids.sum())
    for rows, found in zip(order, sums, strict=True):
        batch = loader.widen(loader.load(rows, 0))
        assert found.item() == pytest.approx((batch.hidden_states.double().sum() + batch.input_ids.sum()).item())


def test_extract_and_train_on_the_gpu(extract_config: dict[str, Any], tmp_path: Path) -> None:
    extract(ExtractConfig(**{**extract_config, "device": DEVICE}, out=tmp_path / "cache"), Silent())
    settings = TrainConfig(
        caches=(tmp_path / "cache",),
        out=tmp_path / "run",
        steps=6,
        draft_head_dim=16,
        num_anchors=16,
        attention_backend="flex_attention",
        device=DEVICE,
    )
    assert train(settings, Silent()).state.step == 6
