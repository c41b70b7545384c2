"""The draft run offline over known texts under every change, by cached features or with the target run again."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dflash_offline.schemas.draft.config import DraftConfig
from dflash_offline.schemas.errors import DflashError
from dflash_offline.schemas.identity import differences, refuse_differences
from dflash_offline.schemas.settings.diagnose import DiagnoseConfig
from dflash_offline.stages.conversations.prompts import Prompt, encode_prompt
from dflash_offline.stages.draft.pairing import check_draft_fits
from dflash_offline.stages.draft.weights import load_draft
from dflash_offline.stages.evaluation.diagnosis.changes import Change
from dflash_offline.stages.evaluation.diagnosis.known_text import (
    CachedStates,
    KnownText,
    States,
    TargetStates,
    Walker,
    answered,
    cached_texts,
    count_rounds,
    walk_all,
)
from dflash_offline.stages.evaluation.diagnosis.likelihood import Counts
from dflash_offline.stages.evaluation.samples import EvalSamples, check_cache_fits, choose_samples, draft_folder
from dflash_offline.stages.progress import Progress
from dflash_offline.stages.target.files import TargetFiles, open_target
from dflash_offline.stages.target.model import check_plain_embeddings, choose_device, load_model, resolve_dtype
from dflash_offline.stages.training.draft_setup import borrowed_parts

_IDENTITY = ("config_sha256", "weights_sha256", "tokenizer_sha256", "chat_template_sha256")


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What the draft is run with."""

    config: DiagnoseConfig
    folder: Path
    """Of the draft's config and weights."""
    draft: DraftConfig
    """As it was trained."""
    samples: EvalSamples
    device: torch.device
    dtype: torch.dtype
    files: TargetFiles | None
    """The target's, where it can be run again."""
    progress: Progress
    not_tried: list[str] = field(default_factory=list)
    """What could not be tried, and why."""

    @cached_property
    def cached_texts(self) -> list[KnownText]:
        """The answers of the samples."""
        return cached_texts(self.samples)

    @property
    def template_kwargs(self) -> dict[str, Any]:
        """What the cache's conversations were rendered with."""
        kwargs: dict[str, Any] = self.samples.cache.manifest.identity["chat_template_kwargs"]
        return kwargs

    @property
    def target_name(self) -> str:
        """The target that the cache names."""
        return str(self.samples.cache.manifest.origin["target"])

    def rendered(self, prompts: Sequence[Prompt], kwargs: dict[str, Any] | None = None) -> list[list[int]]:
        """Return the prompts' tokens as the cache's conversations were rendered, but for `kwargs`."""
        assert self.files is not None, "prompts were refused without a target"
        given = self.template_kwargs | (kwargs or {})
        return [encode_prompt(prompt, self.files.tokenizer, given) for prompt in prompts]

    def other_renderings(self, prompts: Sequence[Prompt]) -> dict[str, list[list[int]]]:
        """Return the prompts' tokens in each thinking mode that makes other tokens of them."""
        own = self.rendered(prompts)
        modes = {f"enable_thinking={json.dumps(mode)}": {"enable_thinking": mode} for mode in (True, False)}
        found = {title: self.rendered(prompts, kwargs) for title, kwargs in modes.items()}
        return {title: ids for title, ids in found.items() if ids != own}

    def special_ids(self) -> list[int]:
        """Return the tokens that a client may take for the mask token, the likeliest first."""
        if self.files is None:
            return [0]
        tokenizer = self.files.tokenizer
        named = ("pad_token_id", "eos_token_id", "unk_token_id", "bos_token_id", "mask_token_id")
        likely = [getattr(tokenizer, name, None) for name in named]
        added = [i for i, token in sorted(tokenizer.added_tokens_decoder.items()) if token.special]
        return [i for i in (*likely, 0, *added) if i is not None and 0 <= i < self.draft.vocab_size]

    def text_config(self) -> Any | None:
        """Return the target's own text config, where it can be run."""
        return None if self.files is None else self.files.config.get_text_config(decoder=True)


def open_bench(config: DiagnoseConfig, progress: Progress) -> Bench:
    """Return what the settings name, opened; the target is the one that the cache names, or `MismatchError`.

    A target that is not named by the settings may be out of reach: then it is not run.
    """
    folder, trained = draft_folder(config.draft)
    samples, device = choose_samples(config.cache, trained, config.limit), choose_device(config.device)
    draft = load_draft(folder)
    check_cache_fits(samples, draft)
    files, why = None, "--no-rerun is given"
    if config.rerun:
        try:
            files = _recorded_target(config, samples)
        except DflashError as error:
            if config.target is not None or config.prompts is not None:
                raise
            why = f"the target that the cache names cannot be opened ({error})"
    bench = Bench(
        config=config,
        folder=folder,
        draft=draft.config,
        samples=samples,
        device=device,
        dtype=resolve_dtype(config.dtype, device, files.config) if files else torch.float32,
        files=files,
        progress=progress,
    )
    if files is None:
        bench.not_tried.append(f"other layers, another data type and other prompts: {why}")
    if config.other_target is None:
        bench.not_tried.append("another target: --other-target names one")
    return bench


def _recorded_target(config: DiagnoseConfig, samples: EvalSamples) -> TargetFiles:
    manifest = samples.cache.manifest
    recorded, origin = manifest.identity["target"], manifest.origin
    name = config.target or origin["target"]
    revision = config.revision or (origin.get("revision") if name == origin["target"] else None)
    files = open_target(name, revision=revision, trust_remote_code=config.trust_remote_code)
    identity = files.identity()
    have, want = ({name: one.get(name) for name in _IDENTITY} for one in (recorded, identity))
    refuse_differences(
        f"{name} is not the target that {samples.cache.path} was made from",
        differences(have, want),
        ("cache", "target"),
        "Name that target by --target; if this one is what is served, name it by --other-target.",
    )
    return files


def load_target(bench: Bench, files: TargetFiles, dtype: torch.dtype) -> Any:
    """Return a target's model, checked to be one that the draft can be run with."""
    bench.progress.say(f"Loading {files.folder} ({dtype}, {bench.device}).")
    model = load_model(
        files,
        dtype=dtype,
        device=bench.device,
        attn_implementation=bench.config.attn_implementation,
        trust_remote_code=bench.config.trust_remote_code,
        progress=bench.progress,
    )
    check_plain_embeddings(model, files.name)
    check_draft_fits(bench.draft, model)
    return model


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A draft run over some texts."""

    changes: tuple[Change, ...]
    counts: tuple[Counts, ...]
    """Of each change, [P, 1 + slots]."""
    foreign: int = 0
    """Texts whose answer the target would not have given, in whatever data type; 0 where none was run."""
    inexact: int = 0
    """The same in its own data type."""


def run_trial(bench: Bench, model: Any | None, texts: Iterable[KnownText], tried: Sequence[Change]) -> Trial:
    """Return the rounds of all texts under each change whose features are at hand."""
    states: States
    if model is None:
        head, embedding = borrowed_parts(bench.samples.cache, bench.device)
        dtype, table = torch.float32, embedding.weight
        states = CachedStates(bench.samples.cache, bench.device, dtype)
    else:
        head, table, dtype = model.get_output_embeddings(), model.get_input_embeddings().weight, model.dtype
        states = target = TargetStates(model)
    walker = Walker(load_draft(bench.folder, dtype, bench.device), head.to(dtype), table.to(dtype))
    possible = [change for change in tried if states.known.issuperset(change.taps)]
    bench.not_tried.extend(f"{c.title}: the cache does not hold these layers" for c in tried if c not in possible)
    slots = max(change.config.num_draft_tokens for change in possible)
    texts = list(texts)
    if not texts:
        raise DflashError(
            "There is no answer of two tokens or more to be walked. Give other prompts, or another cache."
        )
    rows: list[list[Counts]] = []
    bench.progress.start("Walking", len(texts), "answers")
    try:
        for found in walk_all(walker, states, texts, possible):
            rows.append([count_rounds(accepted, slots) for accepted in found])
            bench.progress.advance(1)
    finally:
        bench.progress.finish()
    return Trial(
        changes=tuple(possible),
        counts=tuple(np.stack(column) for column in zip(*rows, strict=True)),
        foreign=0 if model is None else target.foreign,
        inexact=0 if model is None else target.inexact,
    )


def answer_all(
    bench: Bench, model: Any, prompts: Sequence[tuple[str, list[int]]], stops: frozenset[int], most: int
) -> list[KnownText]:
    """Return a target's own greedy answers to prompts, each given by its place and its tokens, of `most` tokens."""
    found = []
    bench.progress.start("Answering", len(prompts), "prompts")
    try:
        for place, ids in prompts:
            text = answered(model, place, ids, most, stops, bench.draft.block_size * 2)
            found.append(text)
            bench.progress.advance(1)
    finally:
        bench.progress.finish()
    return [text for text in found if text.first < text.last]


def renamed(change: Change, cause: str, title: str) -> Change:
    """Return the draft run as before, where what it is run over is what changes."""
    return replace(change, cause=cause, title=title)


def other_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the data type to be tried beside another."""
    return torch.bfloat16 if dtype == torch.float32 else torch.float32
