"""Stage one: run the frozen target over conversations once and keep the hidden states of chosen layers.

Axes: B rows, S positions, L captured layers, H hidden size.
"""

import platform
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from dflash_offline.schemas.config import ExtractConfig
from dflash_offline.schemas.errors import DflashError
from dflash_offline.schemas.files import building_folder, output_folder, sha256_file
from dflash_offline.schemas.manifest import (
    CAPTURE_RULE,
    EMBEDDINGS,
    FEATURES,
    MANIFEST,
    REJECTS,
    SAMPLES,
    TARGET,
    TMP,
    Layout,
    Manifest,
    refuse_other_identity,
)
from dflash_offline.schemas.samples import SampleTable, write_rejects
from dflash_offline.stages.cache import ShardWriter, create_arrays, publish_cache
from dflash_offline.stages.progress import Progress, readable_bytes
from dflash_offline.stages.samples import Masker, Plan, choose_mask_token, make_plan, refuse_ids_beyond_table
from dflash_offline.stages.shards import BLOSC
from dflash_offline.stages.target import (
    TargetFiles,
    check_layer_ids,
    check_plain_embeddings,
    choose_device,
    default_layer_ids,
    embedding_tensors,
    load_model,
    open_target,
    resolve_dtype,
    run_captured,
)


@dataclass(frozen=True, kw_only=True)
class Extracted:
    """What `extract` left."""

    cache: Path
    num_samples: int
    num_tokens: int
    num_shards: int
    shards_written: int
    """By this call; the rest was there before, or another worker's."""
    bytes_written: int
    seconds: float
    """Spent on the shards."""


class Extraction:
    """One call of `dflash extract`: the target's files, what is captured, and, once needed, the loaded model."""

    def __init__(self, config: ExtractConfig, progress: Progress) -> None:
        self.progress = progress
        self.files: TargetFiles = open_target(
            config.target, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
        self.config = self._within_positions(config)
        self.layer_ids = (
            check_layer_ids(config.layers, self.files.num_layers)
            if config.layers is not None
            else default_layer_ids(self.files.num_layers, config.num_layers)
        )
        self.device = choose_device(config.device)
        self.dtype = resolve_dtype(config.dtype, self.device, self.files.config)
        self.masker = Masker(self.files, config.chat_template_kwargs)
        self._model: Any = None

    def _within_positions(self, config: ExtractConfig) -> ExtractConfig:
        most = self.files.decoder()["max_position_embeddings"]
        if config.max_length <= most:
            return config
        self.progress.say(f"The target has {most} positions; longer conversations are cut there.")
        return replace(config, max_length=most)

    def identity(self) -> dict[str, Any]:
        """Return every field that decides the cache's content."""
        for path in self.config.data:
            if not path.is_file():
                raise DflashError(f"{path} is not a file. Name JSONL files of conversations.")
        config = self.config
        return {
            "target": {
                **self.files.identity(),
                "dtype": str(self.dtype).removeprefix("torch."),
                "attn_implementation": config.attn_implementation,
            },
            "layer_ids": list(self.layer_ids),
            "capture": CAPTURE_RULE,
            "data": {f"file_{i}_sha256": sha256_file(path) for i, path in enumerate(config.data)},
            "mask_rule": self.masker.rule,
            "mask_token_id": "found" if config.mask_token_id is None else config.mask_token_id,
            "chat_template_kwargs": config.chat_template_kwargs,
            "max_length": config.max_length,
            "block_size": config.block_size,
            "skip_bad_rows": config.skip_bad_rows,
            "layout": {
                "features": "bfloat16",
                "codec": BLOSC,
                "shard_mib": config.shard_mib,
                "chunk_tokens": config.chunk_tokens,
                "batch_tokens": config.batch_tokens,
            },
        }

    @property
    def model(self) -> Any:
        """The loaded target, checked to be one that a draft can be served with."""
        if self._model is None:
            self.progress.say(f"Loading {self.files.folder} ({self.dtype}, {self.device}).")
            self._model = load_model(
                self.files,
                dtype=self.dtype,
                device=self.device,
                attn_implementation=self.config.attn_implementation,
                trust_remote_code=self.config.trust_remote_code,
            )
            check_plain_embeddings(self._model, self.files.name)
        return self._model

    def create(self, identity: dict[str, Any]) -> None:
        """Plan the samples and publish the cache's static files; another process may have been first."""
        _ = self.model  # a target that cannot be drafted for is refused before any other work
        hidden_size = int(self.files.text_config.hidden_size)
        self.progress.start("Tokenizing", None, "rows")
        plan = make_plan(self.config, self.masker, 2 * len(self.layer_ids) * hidden_size, self.progress.advance)
        self.progress.finish()
        refuse_ids_beyond_table(self.files, plan.samples)
        mask_token_id = choose_mask_token(self.files, plan.samples, self.config.mask_token_id)
        _say_plan(self.progress, plan)
        layout = Layout(
            num_shards=plan.num_shards,
            shard_tokens=plan.shard_tokens,
            chunk_tokens=self.config.chunk_tokens,
            num_layers=len(self.layer_ids),
            hidden_size=hidden_size,
        )
        with building_folder(self.config.out) as folder:
            plan.samples.write(folder / SAMPLES)
            write_rejects(folder / REJECTS, plan.rejects)
            create_arrays(folder / FEATURES, layout, list(self.layer_ids))
            self._write_target(folder / TARGET)
            publish_cache(
                folder,
                self.config.out,
                identity=identity,
                origin=self._origin(),
                decoder=self.files.decoder(),
                layout=layout,
                plan={**plan.counts(), "mask_token_id": mask_token_id, "block_size": self.config.block_size},
            )

    def _write_target(self, folder: Path) -> None:
        folder.mkdir()
        for name in ("config.json", "generation_config.json"):
            if (self.files.folder / name).is_file():
                shutil.copyfile(self.files.folder / name, folder / name)
        self.files.tokenizer.save_pretrained(folder)
        save_file(embedding_tensors(self.model), folder / EMBEDDINGS)

    def _origin(self) -> dict[str, Any]:
        return {
            "target": self.files.name,
            "revision": self.config.revision,
            "data": [str(path) for path in self.config.data],
            "software": {
                "python": platform.python_version(),
                **{name: version(name) for name in ("dflash-offline", "torch", "transformers", "zarr", "numcodecs")},
            },
        }

    def run_shard(self, writer: ShardWriter, shard: int) -> NDArray[np.uint16]:
        """Return one shard's features, [shard_tokens, L, H] uint16; depends on the plan and the target alone."""
        samples = writer.samples
        base = shard * writer.manifest.layout.shard_tokens
        hidden = writer.empty()
        for batch in micro_batches(samples, samples.samples_of_shard(shard), self.config.batch_tokens):
            longest = int(samples.num_tokens[batch].max())
            rows = np.zeros((len(batch), longest), np.int64)
            for row, sample in zip(rows, batch, strict=True):
                row[: samples.num_tokens[sample]] = samples.input_ids(sample)
            states = run_captured(self.model, torch.from_numpy(rows).to(self.device), self.layer_ids)
            for layer, state in enumerate(states):
                bits = state.to(torch.bfloat16).view(torch.int16).cpu().numpy().view(np.uint16)
                for features, sample in zip(bits, batch, strict=True):
                    begin, count = samples.start[sample] - base, samples.num_tokens[sample]
                    hidden[begin : begin + count, layer] = features[:count]
            self.progress.advance(int(samples.num_tokens[batch].sum()))
        return hidden


def micro_batches(samples: SampleTable, members: NDArray[np.int64], batch_tokens: int) -> Iterator[NDArray[np.int64]]:
    """Yield a shard's samples in length-sorted groups of at most `batch_tokens` padded tokens (or one sample)."""
    ordered = members[np.argsort(-samples.num_tokens[members], kind="stable")]
    while len(ordered):
        count = max(1, batch_tokens // int(samples.num_tokens[ordered[0]]))
        yield ordered[:count]
        ordered = ordered[count:]


def extract(config: ExtractConfig, progress: Progress) -> Extracted:
    """Make the cache complete, or go on with it, and return what it holds.

    Raises `MismatchError` if the folder holds a cache of something else, and `DflashError` for unusable input.
    """
    out = output_folder(config.out, marker=MANIFEST, kind="feature cache", renamed=True)
    work = Extraction(replace(config, out=out), progress)
    config = work.config
    identity = work.identity()
    if not (config.out / MANIFEST).exists():
        work.create(identity)
    manifest = Manifest.read(config.out)
    refuse_other_identity(config.out, manifest.identity, identity)
    manifest.check_static_files(config.out)
    samples = SampleTable.read(config.out / SAMPLES)
    writer = ShardWriter(config.out, manifest, samples, work.layer_ids)
    began = time.perf_counter()
    shards, size = _run_shards(work, writer)
    for leftover in (config.out / TMP).iterdir():
        leftover.unlink(missing_ok=True)
    return Extracted(
        cache=config.out,
        num_samples=len(samples),
        num_tokens=int(samples.num_tokens.sum()),
        num_shards=manifest.layout.num_shards,
        shards_written=shards,
        bytes_written=size,
        seconds=time.perf_counter() - began,
    )


def _run_shards(work: Extraction, writer: ShardWriter) -> tuple[int, int]:
    """Do every shard that is left, writing one while the next is computed; returns shards and bytes written.

    Memory: one shard being filled and one being written. Shards that another worker holds are waited for at the
    end, and done here if that worker died.
    """
    samples, num_shards = writer.samples, writer.manifest.layout.num_shards
    done = [shard for shard in range(num_shards) if writer.is_done(shard)]
    finished = int(samples.num_tokens[np.isin(samples.shard, done)].sum())
    if done:
        work.progress.say(f"{len(done)} of {num_shards} shards are already done.")
    if len(done) == num_shards:
        return 0, 0
    _ = work.model  # loading is not part of the rate shown
    work.progress.start("Extracting", int(samples.num_tokens.sum()), "tokens", done=finished)
    written: list[int] = []

    def write(shard: int, hidden: NDArray[np.uint16], started: float, claim: ExitStack) -> None:
        with claim:
            written.append(writer.commit(shard, hidden, started))
            work.progress.advance(
                0, shards=f"{len(done) + len(written)}/{num_shards}", written=readable_bytes(sum(written))
            )

    pending: Future[None] | None = None
    with ThreadPoolExecutor(1, thread_name_prefix="write") as background:
        for wait in (False, True):
            for shard in range(num_shards):
                if writer.is_done(shard):
                    continue
                started = time.time()
                with ExitStack() as claim:
                    if not claim.enter_context(writer.claim(shard, wait=wait)):
                        continue
                    hidden = work.run_shard(writer, shard)
                    if pending is not None:
                        pending.result()
                    pending = background.submit(write, shard, hidden, started, claim.pop_all())
            if pending is not None:
                pending.result()
    work.progress.finish()
    return len(written), sum(written)


def _say_plan(progress: Progress, plan: Plan) -> None:
    counts = plan.counts()
    progress.say(
        f"Plan: {counts['samples']:,} samples, {counts['tokens']:,} tokens ({counts['supervised']:,} supervised), "
        f"{counts['anchors']:,} anchors, {plan.num_shards} shards."
    )
    if plan.num_truncated:
        progress.say(f"  {plan.num_truncated:,} samples were cut at the maximum length.")
    for reason, count in counts["rejects"].items():
        progress.say(f"  left out: {count:,} rows: {reason}.")
