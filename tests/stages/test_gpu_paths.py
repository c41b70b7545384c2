"""What a GPU would run, on one that is pretended: every tensor is where it must be, and the host waits seldom."""

import shutil
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import closing
from dataclasses import fields
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pretend_gpu import GPU, PretendedGpu, gpu
from running import some_slow
from safetensors.torch import load_file
from tiny import ATTENTION, pack, tiny_batch, tiny_draft, tiny_trainer
from tiny_decoding import random_draft, random_prompts, tiny_target
from tiny_target import save_conversations
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from dflash_offline.schemas.draft.anchor_rule import AnchorRule
from dflash_offline.schemas.manifest import HIDDEN, FeatureLayout, Layout
from dflash_offline.schemas.settings.extract import ExtractConfig
from dflash_offline.schemas.settings.train import TrainConfig
from dflash_offline.schemas.settings.verify import RerunConfig
from dflash_offline.stages.capture.compare import compare_with_target
from dflash_offline.stages.capture.encode import FeatureEncoder, calibrate
from dflash_offline.stages.capture.runner import TargetRunner
from dflash_offline.stages.capture.shard import FilledShard, Wanted
from dflash_offline.stages.draft import attention as drafter
from dflash_offline.stages.draft.decode import plain_decode, speculative_decode
from dflash_offline.stages.draft.pairing import check_rewindable
from dflash_offline.stages.extract import extract
from dflash_offline.stages.progress import Silent
from dflash_offline.stages.store.cache import Cache
from dflash_offline.stages.store.codec import FeatureCodec
from dflash_offline.stages.target.files import open_target
from dflash_offline.stages.target.model import choose_device, load_model
from dflash_offline.stages.train import train
from dflash_offline.stages.training import draft_setup as shape
from dflash_offline.stages.training import loader
from dflash_offline.stages.training.checkpoint import list_checkpoints
from dflash_offline.stages.training.corpus import Corpus
from dflash_offline.stages.training.loader import Batch, BatchLoader
from dflash_offline.stages.training.optimizer import ITERATED_IN
from dflash_offline.stages.training.ranks import Ranks
from dflash_offline.stages.training.run import Training

__all__ = ["gpu"]
CPU = torch.device("cpu")
LAYOUTS = [FeatureLayout(), FeatureLayout(kind="rounded", mantissa_bits=4), FeatureLayout(kind="scaled", step=1 / 8)]
LAYERS = [1, 2, 4]


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("device", ["auto", "cuda", "cuda:0"])
def test_a_gpu_is_chosen_with_its_number(device: str) -> None:
    assert choose_device(device) == GPU


def codec_for(layout: FeatureLayout, states: Tensor) -> FeatureCodec:
    if layout.step is None:
        return FeatureCodec(layout)
    scales = [calibrate(layer, layout.step) for layer in states.unbind(1)]
    return FeatureCodec(layout, *(np.stack(part) for part in zip(*scales, strict=True)))


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.kind)
def test_a_shard_is_captured_as_on_the_cpu_without_waiting_behind_a_forward(
    layout: FeatureLayout, gpu: PretendedGpu, cache: Path, target: Path
) -> None:
    samples = Cache.open(cache).samples
    members = samples.samples_of_shard(0)[:20]
    codec = codec_for(layout, torch.from_numpy(Cache.open(cache).values(0)))
    places = Layout(
        num_shards=1,
        shard_tokens=int(samples.start[members[-1]]) + 512,
        chunk_tokens=32,
        num_layers=3,
        hidden_size=32,
        features=layout,
    )
    model = load_model(open_target(str(target)), dtype=torch.float32, device=CPU)

    def filled(device: torch.device) -> tuple[FilledShard, NDArray[np.uint16], int]:
        runner, counts = TargetRunner(model.to(device), device, LAYERS, 200), list[int]()
        buffer = runner.buffer(places, codec.fill)
        gpu.waits.clear()
        wanted = [Wanted(HIDDEN, FeatureEncoder(codec), buffer)]
        (queued,) = runner.run_shard(samples, members, wanted, counts.append)
        assert queued.copied is None or queued.copied.blocking
        return queued.wait(), buffer.array, len(counts)

    expected, wanted, _ = filled(CPU)
    found, codes, num_batches = filled(GPU)
    assert num_batches > 4 and not expected.bad and found == expected
    assert (codes == wanted).all()
    # In each batch where transformers looks at the positions; once for the tables of scales.
    tables = 3 if layout.kind == "scaled" else 0
    assert len(gpu.waits) <= num_batches + tables, gpu.waits


@pytest.mark.usefixtures("gpu")
def test_extraction_leaves_the_cpus_features(cache: Path, extract_config: dict[str, Any], tmp_path: Path) -> None:
    settings = {**extract_config, "device": "cuda", "compile": False}
    extract(ExtractConfig(**settings, out=tmp_path / "cache"), Silent())
    found, wanted = Cache.open(tmp_path / "cache"), Cache.open(cache)
    assert len(found.samples) == len(wanted.samples) == len(found.usable())
    assert all((found.values(sample) == wanted.values(sample)).all() for sample in range(len(found.samples)))


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.kind)
def test_codes_are_made_and_widened_where_they_are(layout: FeatureLayout, gpu: PretendedGpu) -> None:
    states = torch.randn(40, 3, 16, generator=torch.Generator().manual_seed(0))
    encoder = FeatureEncoder(codec_for(layout, states))
    codes = torch.stack([encoder.encode(states[:, layer], layer) for layer in range(3)], dim=1)
    widened, placed, kept = encoder.widen(codes[:, [0, 2]], [0, 2]), states.to(GPU), codes.to(GPU)
    encoder.encode(placed[:, 0], 0)
    gpu.waits.clear()
    made = [encoder.encode(placed[:, layer], layer) for layer in range(3)]
    again = encoder.widen(kept[:, ::2], [0, 2])
    assert not gpu.waits and again.device == GPU
    assert torch.equal(torch.stack(made, dim=1).cpu(), codes) and torch.equal(again.cpu(), widened)


class AtOnce:
    """A pool that does in this thread what it is given: the pretended GPU is this thread's."""

    def __init__(self, *_: object, **__: object) -> None: ...

    def __enter__(self) -> "AtOnce":
        return self

    def __exit__(self, *_: object) -> None: ...

    def submit(self, function: Callable[..., Batch], *args: Any) -> Future[Batch]:
        future = Future[Batch]()
        future.set_result(function(*args))
        return future


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Load micro-batches in this thread, and weights as safetensors does on a GPU."""
    monkeypatch.setattr(loader, "ThreadPoolExecutor", AtOnce)
    placed = {"cuda:0": lambda path: {name: one.to(GPU) for name, one in load_file(path).items()}, "cpu": load_file}
    monkeypatch.setattr(shape, "load_file", lambda path, device: placed[device](path))


@pytest.mark.usefixtures("at_once")
def test_micro_batches_arrive_whole_and_the_step_waits_for_none(
    gpu: PretendedGpu, cache: Path, extract_config: dict[str, Any], tmp_path: Path
) -> None:
    data = save_conversations(tmp_path / "chats.jsonl", 12, seed=7)
    settings = {**extract_config, "data": (data,), "features": "scaled", "out": tmp_path / "scaled"}
    extract(ExtractConfig(**settings), Silent())
    scaled = tmp_path / "scaled"
    for caches, rows in (((cache,), [[7, 3], [30]]), ((scaled,), [[5], [1, 2]]), ((cache, scaled), [[7, 82], [85]])):
        batches = [([np.array(row) for row in rows], epoch) for epoch in range(3)]

        def streamed(device: torch.device, caches: Any = caches, batches: Any = batches) -> list[Batch]:
            made = BatchLoader(
                Corpus.open(caches),
                layer_ids=(1, 4),
                anchor_rule=AnchorRule(8),
                num_anchors=5,
                seed=3,
                shape=None,
                device=device,
            )
            gpu.waits.clear()
            return list(made.stream(batches, 2))

        expected, found = streamed(CPU), streamed(GPU)
        assert len(gpu.waits) <= 3 * len(caches), gpu.waits  # for each cache's tables of scales, and for no batch
        for batch, wanted in zip(found, expected, strict=True):
            for name in (f.name for f in fields(Batch)):
                here: Any = getattr(batch, name)
                if isinstance(here, Tensor):
                    assert here.device == GPU and torch.equal(here.cpu(), getattr(wanted, name)), name
                    if name != "hidden_states":  # their own, or widened from what was kept
                        assert here.used_by == [gpu.main], name


def run_settings(cache: Path, out: Path, device: torch.device, **settings: Any) -> TrainConfig:
    defaults: dict[str, Any] = {"dtype": "float32", "attention_backend": "sdpa", "steps": 4, "val_every": 2}
    small: dict[str, Any] = {"draft_layers": 1, "num_anchors": 4, "save_every": 2, "compile": False}
    return TrainConfig(caches=(cache,), out=out, device=str(device), **{**defaults, **small, **settings})


@pytest.mark.usefixtures("at_once", "gpu")
@pytest.mark.parametrize(
    ("settings", "tolerance"),
    [({"ema": 0.9}, 1e-6), ({"packing": False, "optimizer": "muon"}, 5e-5)],  # Muon's steps let rounding grow
    ids=["packed", "padded"],
)
def test_a_run_with_validations_that_is_resumed_ends_as_the_cpus(
    settings: dict[str, Any], tolerance: float, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ITERATED_IN, GPU.type, torch.float32)  # so that what is compared is not bfloat16's rounding
    weights = []
    for device in (CPU, GPU):
        config = run_settings(cache, tmp_path / device.type, device, **settings)
        train(config, Silent())
        last = list_checkpoints(config.out)[-1]
        if device == GPU:
            shutil.rmtree(last)
            train(config, Silent())
        weights.append(load_file(last / "model.safetensors"))
    for name, wanted in weights[0].items():
        torch.testing.assert_close(weights[1][name], wanted, rtol=1e-4, atol=tolerance)


@pytest.mark.usefixtures("at_once")
def test_validations_copy_on_the_stream_of_the_steps(gpu: PretendedGpu, cache: Path, tmp_path: Path) -> None:
    # What a stream has freed is reused by that stream alone: another one a validation would strand memory each time.
    config = run_settings(cache, tmp_path / "run", GPU, val_samples=1, batch_tokens=512)
    training = Training(config, Corpus.open(config.caches), Ranks(rank=0, count=1, device=GPU))
    with closing(training.stream()) as stream:
        training.step(islice(stream, 1))
    for _ in range(2):
        training.validate()
    assert [training.loader(seed) for seed in range(20)] and len(gpu.others) == 1


@pytest.mark.usefixtures("at_once")
def test_validations_and_checkpoints_take_no_more_memory(gpu: PretendedGpu, cache: Path, tmp_path: Path) -> None:
    config = run_settings(cache, tmp_path / "run", GPU, steps=99, val_samples=2, batch_tokens=512, keep=1)
    training, reserved = Training(config, Corpus.open(config.caches), Ranks(rank=0, count=1, device=GPU)), list[int]()
    with training.writer, closing(training.stream()) as stream:
        for _ in range(14):
            training.step(islice(stream, 1))
            training.validate()
            training.save()
            reserved.append(gpu.reserved_bytes)
    # The first ones make moments and the largest micro-batch, of which no two are alike.
    assert 0 < reserved[-1] <= 1.01 * reserved[3], reserved


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("backend", ["sdpa", "flex_attention"])
def test_a_step_waits_once_for_its_sums_and_in_each_forward_for_what_it_computes(
    backend: str, gpu: PretendedGpu, cache: Path, tmp_path: Path, dense_flex: None
) -> None:
    config = run_settings(cache, tmp_path / "run", GPU, attention_backend=backend, accumulation=2, ema=0.9)
    training = Training(config, Corpus.open(config.caches), Ranks(rank=0, count=1, device=GPU))
    with closing(training.stream()) as stream:
        for _ in range(2):
            gpu.waits.clear()
            training.step(islice(stream, 2))
            # Two forwards wait for the number of supervised slots, with sdpa also for what a mask shows; all wait once.
            assert len(gpu.waits) <= (5 if backend == "sdpa" else 3), gpu.waits


@pytest.fixture
def dense_flex(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute flex attention from what its mask says of every query and key, instead of compiling it."""

    def attend(
        q: Tensor, k: Tensor, v: Tensor, *, block_mask: BlockMask, enable_gqa: bool, kernel_options: None
    ) -> Tensor:
        assert kernel_options in (
            None,
            {"bwd_BLOCK_M1": 32, "bwd_BLOCK_N1": 128, "bwd_BLOCK_M2": 128, "bwd_BLOCK_N2": 32},
        )
        rows, queries, keys = (torch.arange(n, device=q.device) for n in (q.shape[0], q.shape[2], k.shape[2]))
        rows = rows[:, None, None, None]
        mask = block_mask.mask_mod(rows, torch.zeros_like(rows), queries[:, None], keys)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=enable_gqa)

    monkeypatch.setattr(drafter, "_compiled_flex", lambda: attend)


@pytest.mark.usefixtures("gpu", "dense_flex")
@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_flex_step_is_where_it_must_be_and_the_cpus(dtype: torch.dtype, attention: str) -> None:
    results = []
    for device, backend in ((CPU, "sdpa"), (GPU, "flex_attention")):
        trainer = tiny_trainer(tiny_draft(**ATTENTION[attention]), loss_type="dpace", attention_backend=backend)
        trainer.draft_model.gradient_checkpointing = dtype == torch.float32
        batch = pack(tiny_batch(trainer.draft_model.config, [30, 9, 20]), padding=5)
        trainer.to(device)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            metrics = trainer(
                *(one.to(device) for one in (batch.input_ids, batch.hidden_states, batch.loss_mask)),
                document_ids=batch.document_ids.to(device),
                anchors=torch.tensor([[2, 9, 25, 31, 45, 0]], device=device),
                keep_mask=torch.arange(6, device=device)[None] < 5,
            )
        metrics.loss.backward()
        gradients = [p.grad for p in trainer.draft_model.parameters()]
        measured = {name: one for name, one in vars(metrics).items() if name not in ("part_sums", "paths")}
        assert not metrics.part_sums and not metrics.paths  # a base draft has none
        assert all(one.device == device for one in (*gradients, *measured.values()))
        results.append([one.detach().cpu() for one in (metrics.loss, *gradients)])
    for wanted, found in zip(*results, strict=True):
        assert (found - wanted).norm() <= (1e-4 if dtype == torch.float32 else 5e-2) * wanted.norm()


@pytest.mark.parametrize("family", some_slow(("qwen3", "mistral"), "mistral"))
def test_answers_are_decoded_as_on_the_cpu(family: str, gpu: PretendedGpu) -> None:
    target, draft, prompt = tiny_target(family), random_draft(), random_prompts(1)[0]
    plain = plain_decode(target, prompt, 12, ())
    drafted = speculative_decode(target, draft, prompt, 12, (), keep_blocks=True)
    target, draft = target.to(GPU), draft.to(GPU)
    check_rewindable(target, family)
    assert plain_decode(target, prompt, 12, ()).tokens == plain.tokens
    found = speculative_decode(target, draft, prompt, 12, (), keep_blocks=True)
    assert (found.tokens, found.blocks) == (drafted.tokens, drafted.blocks)


def test_the_target_is_run_again_as_on_the_cpu(gpu: PretendedGpu, cache: Path, target: Path) -> None:
    on_cpu, on_gpu = (
        compare_with_target(cache, RerunConfig(target=str(target), samples=4, device=device), Silent())
        for device in ("cpu", "cuda")
    )
    for found, wanted in zip(on_gpu, on_cpu, strict=True):
        assert not found.fault and found.channel_error == pytest.approx(wanted.channel_error, rel=1e-3)
