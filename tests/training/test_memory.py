"""What a step is counted to keep, against what autograd saves and what was seen of compiled layers."""

import gc
import threading
import weakref
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_batch, tiny_draft, tiny_draft_config, tiny_trainer
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dflash_offline.pipeline.commands.train import print_dry_run
from dflash_offline.schemas.draft.config import DraftConfig
from dflash_offline.schemas.settings.train import TrainConfig
from dflash_offline.schemas.variants.dflash import DFlash
from dflash_offline.schemas.variants.dflash2 import DFlash2
from dflash_offline.schemas.variants.variant import Variant
from dflash_offline.stages.progress import Silent
from dflash_offline.stages.train import dry_run, train
from dflash_offline.stages.training import run as runs
from dflash_offline.stages.training.corpus import Corpus
from dflash_offline.stages.training.loader import Batch
from dflash_offline.stages.training.memory import StepMemory, kept_by_block_token, step_flops
from dflash_offline.stages.training.ranks import Ranks
from dflash_offline.stages.training.run import Training

LARGE: dict[str, Any] = {"hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}


def kept(config: DraftConfig, **changes: Any) -> int:
    return kept_by_block_token(config, **{"compiled": False, "budget": 1.0, "checkpointing": False, **changes})


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"intermediate_size": 256},
        {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 1},
        {"variant": DFlash2(conv_group_size=8, selector_rank=6, selector_top_k=5)},
        {"hidden_size": 64, "variant": DFlash2(conv_kernel_size=3, selector_rank=16, selector_top_k=5)},
    ],
    ids=str,
)
def test_activations_are_counted_nearly_as_autograd_saves_them(shape: dict[str, Any]) -> None:
    trainer = tiny_trainer(tiny_draft(**shape), num_anchors=60)
    config, saved = trainer.draft_model.config, dict[int, Tensor]()
    weights = {parameter.untyped_storage().data_ptr() for parameter in trainer.parameters()}

    def note(x: Tensor) -> Tensor:
        saved[x.untyped_storage().data_ptr()] = x
        return x

    batch = tiny_batch(config, [80, 80])
    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        trainer(
            batch.input_ids,
            batch.hidden_states,
            batch.loss_mask,
            document_ids=batch.document_ids,
            generator=torch.Generator().manual_seed(0),
        )
    found = sum(x.untyped_storage().nbytes() for address, x in saved.items() if address not in weights)
    # More, because the tiles that stand in for flex attention here hold keys of their own; less, because the last layer
    # leaves out rows that no loss reads.
    assert 0.85 < found / (4 * kept(config) * 2 * 60 * config.block_size) < 1.4


@pytest.mark.parametrize("variant", [DFlash(), DFlash2(conv_group_size=2, selector_rank=24, selector_top_k=5)])
def test_the_operations_of_a_step_are_counted_as_torch_counts_its_matmuls(variant: Variant) -> None:
    draft = tiny_draft(variant=variant, hidden_size=64)
    batch, config = tiny_batch(draft.config, [90]), draft.config
    trainer, anchors = tiny_trainer(draft, attention_backend="eager"), torch.arange(0, 80, 2)[None]
    with FlopCounterMode(display=False) as counter:
        trainer(batch.input_ids, batch.hidden_states, torch.ones_like(batch.loss_mask), anchors=anchors).loss.backward()
    products = counter.get_flop_counts()["Global"]
    found = sum(flops for operation, flops in products.items() if operation is not torch.ops.aten.bmm)
    slots, keys = 40 * config.block_size, 90 + 40 * config.block_size
    # Less, because the last layer leaves out rows that no loss reads, and convolutions are no matmuls.
    assert 0.9 < found / step_flops(config, 90, slots) <= 1
    # Scores and values of attention, forward and backward, and those of the selector's candidates.
    attention = 12 * config.num_hidden_layers * slots * keys * config.num_attention_heads * config.head_dim
    assert products[torch.ops.aten.bmm] == pytest.approx(attention, rel=0.03)


def test_a_draft_for_an_8b_target_keeps_what_was_seen_of_the_compiler() -> None:
    config = replace(tiny_draft_config(**LARGE, intermediate_size=12_288), num_hidden_layers=5)
    head = 2 * 4096
    assert 2 * (kept(config, compiled=True) - head) == 5 * 144 * 1024
    assert 2 * (kept(config) - head) == pytest.approx(5 * 202 * 1024, rel=0.01)
    assert 2 * (kept(config, compiled=True, budget=0.5) - head) == pytest.approx(5 * 69 * 1024, rel=0.01)
    assert kept(config, checkpointing=True) < 0.3 * kept(config)


def training(cache: Path, out: Path, **settings: Any) -> Training:
    config = TrainConfig(
        **{"caches": (cache,), "out": out, "steps": 1, "draft_layers": 1, "num_anchors": 8, "device": "cpu", **settings}
    )
    return Training(config, Corpus.open(config.caches), Ranks(rank=0, count=1, device=torch.device("cpu")))


def test_the_largest_micro_batch_is_the_one_that_is_counted(cache: Path, tmp_path: Path) -> None:
    memory = training(cache, tmp_path / "run").memory
    room = replace(memory, device_bytes=int((memory.other + memory.activations) / 0.92) + 100)
    assert room.fits and room.most_block_tokens == pytest.approx(memory.block_tokens, abs=1)
    assert not replace(room, block_tokens=memory.block_tokens + 2).fits
    assert replace(room, device_bytes=memory.other).most_block_tokens == 0
    padded = training(cache, tmp_path / "run", packing=False, batch_size=3)
    assert padded.memory.block_tokens == 3 * int(padded.batching.num_anchors.max()) * 8
    found = dry_run(padded.config)
    assert found.block_tokens == padded.memory.block_tokens
    assert found.activation_bytes == padded.memory.activations < found.device_bytes


@pytest.mark.parametrize(
    ("settings", "room", "expected"),
    [
        ({}, 1.0, 1.0),
        ({}, 0.7, 0.5),
        ({"activation_budget": 0.8}, 0.7, 0.8),
        ({"compile": False}, 0.7, 1.0),
    ],
)
def test_half_of_the_activations_are_kept_where_a_gpu_could_not_hold_all(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], room: float, expected: float
) -> None:
    one = training(cache, tmp_path / "run")
    one.compiled, one.device = settings.get("compile", True), torch.device("cuda", 0)
    ends = one.module.target_lm_head, one.module.target_embed_tokens
    monkeypatch.setattr(runs, "device_memory", lambda _device: 2**40)
    needed = one._memory(*ends, 1.0)
    monkeypatch.setattr(
        runs, "device_memory", lambda _device: int((needed.other + room * needed.activations) / 0.92) + 1000
    )
    one.config = replace(one.config, **settings)
    memory, budget = one._budget(*ends)
    assert budget == expected and isinstance(memory, StepMemory)
    if expected == 0.5:
        assert memory.fits and memory.activations < 0.7 * needed.activations


def test_a_run_says_when_it_computes_activations_twice(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []

    class Told(Silent):
        def say(self, text: str) -> None:
            said.append(text)

    def half(one: Training, head: Any, table: Any) -> tuple[StepMemory, float]:
        return one._memory(head, table, 0.5), 0.5

    monkeypatch.setattr(Training, "_budget", half)
    train(training(cache, tmp_path / "run", val_samples=0).config, Told())
    assert [line for line in said if "half of their activations" in line and "--batch-block-tokens" in line]


def test_validations_and_checkpoints_leave_nothing_behind(cache: Path, tmp_path: Path) -> None:
    settings = {"steps": 99, "val_samples": 2, "batch_tokens": 512, "keep": 1, "draft_intermediate_size": 8192}
    one, held, threads = training(cache, tmp_path / "run", **settings), list[int](), list[int]()
    saved = 3 * 4 * sum(parameter.numel() for parameter in one.draft.parameters())
    with one.writer, closing(one.stream()) as stream:
        for _ in range(14):
            one.step(islice(stream, 1))
            one.validate()
            one.save()
            one.writer.wait()
            gc.collect()
            held.append(own_bytes())
            threads.append(threading.active_count())
    assert held[-1] - held[3] < 4 * saved, held  # of ten that could have been left
    assert len(set(threads[3:])) == 1, threads


def test_a_dry_run_says_what_half_of_the_activations_would_take(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    compiled = training(cache, tmp_path / "run")
    compiled.compiled = True
    assert compiled.activations_at(1.0) > 1.4 * compiled.activations_at(0.5)
    found = dry_run(training(cache, tmp_path / "run", compile=False).config)
    assert found.activation_bytes == found.all_activation_bytes == found.half_activation_bytes
    print_dry_run(found)
    assert "Budget" not in capsys.readouterr().out
    print_dry_run(replace(found, all_activation_bytes=3 << 30, half_activation_bytes=1 << 30))
    assert "Budget       1 is taken; 1 keeps 3.0 GiB, 0.5 keeps 1.0 GiB" in capsys.readouterr().out


def own_bytes() -> int:
    """Return the memory that this process holds, without what is mapped from files."""
    words = Path("/proc/self/status").read_text().split()
    return int(words[words.index("RssAnon:") + 1]) << 10


@pytest.mark.parametrize("dry", [True, False])
def test_a_step_holds_one_micro_batch_however_many_it_adds_up(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dry: bool
) -> None:
    backward, seen, alive = Training._backward, [], []

    def noted(one: Training, batch: Batch) -> Tensor:
        seen.append(weakref.ref(batch.hidden_states))
        alive.append(sum(reference() is not None for reference in seen))
        return backward(one, batch)

    monkeypatch.setattr(Training, "_backward", noted)
    config = training(cache, tmp_path / "run", steps=2, accumulation=5, batch_tokens=384, val_samples=0).config
    dry_run(config) if dry else train(config, Silent())
    assert alive == [1] * 10
