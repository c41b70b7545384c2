"""The draft of a run: its config, from the settings, the cache and the draft it starts from, and what it borrows."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from dflash_offline.schemas.draft.anchor_rule import WHOLE, AnchorRule
from dflash_offline.schemas.draft.config import DraftConfig
from dflash_offline.schemas.draft.config_rules import config_faults
from dflash_offline.schemas.draft.lint import trained_with
from dflash_offline.schemas.draft.rules import ONE_CLIENTS_LIMIT
from dflash_offline.schemas.draft.weights import read_header
from dflash_offline.schemas.errors import DflashError, MismatchError
from dflash_offline.schemas.files import sha256_file
from dflash_offline.schemas.identity import differences, refuse_differences, wherever_placed
from dflash_offline.schemas.manifest import CAPTURE_RULE, EMBEDDINGS, TARGET
from dflash_offline.schemas.run import RUN, RunRecord
from dflash_offline.schemas.settings.train import TrainConfig
from dflash_offline.schemas.variants.table import BASE, NAMES, own_fields
from dflash_offline.schemas.variants.variant import Variant
from dflash_offline.stages.draft.weights import load_draft
from dflash_offline.stages.store.cache import Cache
from dflash_offline.stages.training.corpus import Corpus

MAY_DIFFER = ("block_size", "max_position_embeddings")
"""Fields in which a run's draft may differ from the draft it starts from: no weight and no position depends on them."""


@dataclass(frozen=True, kw_only=True)
class StartDraft:
    """A draft folder that a run starts from."""

    folder: Path
    config: DraftConfig
    weights: dict[str, Tensor]
    """float32."""
    sha256: str
    """Digest of its weight file."""
    target: dict[str, Any] | None
    """Identity of the target that it was trained for; None where it does not say, as in other projects' drafts."""

    @classmethod
    def read(cls, folder: Path) -> "StartDraft":
        """Return the draft in a folder; `DflashError` if it is none."""
        draft = load_draft(folder)
        sha256 = sha256_file(folder / "model.safetensors")
        return cls(
            folder=folder,
            config=draft.config,
            weights=dict(draft.state_dict()),
            sha256=sha256,
            target=_target_of(folder.resolve()),
        )

    def refuse_other_target(self, cache: Cache) -> None:
        """Raise `MismatchError` with a table of fields if the draft says that it is of another target than a cache."""
        if self.target is None:
            return
        identity = cache.manifest.identity
        cached = {"target": wherever_placed(identity["target"]), "capture": identity["capture"]}
        refuse_differences(
            f"{self.folder} was trained for another target than that of {cache.path}",
            differences({"target": wherever_placed(self.target), "capture": CAPTURE_RULE}, cached),
            ("draft", "cache"),
            "Train from a cache of the draft's own target, extracted in the same way, or without --init-from.",
        )

    def refuse_other_config(self, config: DraftConfig) -> None:
        """Raise `MismatchError` with a table of fields if the run's draft is not this one's continuation."""
        start = self.config
        if start.variant.architecture in config.variant.starts_from:
            start = replace(start, variant=config.variant)
        have, want = ({k: v for k, v in c.to_record().items() if k not in MAY_DIFFER} for c in (start, config))
        refuse_differences(
            f"{self.folder} is not a draft that this run can start from",
            differences(have, want),
            ("draft", "run"),
            "Leave out the settings that ask for another shape, train from a cache of the draft's own target and "
            "layers, or train without --init-from.",
        )

    def load_into(self, draft: nn.Module) -> None:
        """Give a run's draft these weights; what its variant has beyond them stays as drawn and changes nothing."""
        draft.load_state_dict({**draft.state_dict(), **self.weights})


def _target_of(folder: Path) -> dict[str, Any] | None:
    """Return the target that a draft says it was trained for: an export in its weight file, a checkpoint in its run."""
    if (run := folder.parent.parent / RUN).is_file() and folder.parent.name == "checkpoints":
        target: dict[str, Any] = RunRecord.read(run.parent).origin["target_identity"]
        return target
    _, metadata = read_header(folder / "model.safetensors")
    trained = trained_with(metadata, folder / "model.safetensors")
    return None if trained is None else trained.get("target")


def resolve_draft_config(config: TrainConfig, corpus: Corpus, start: StartDraft | None) -> DraftConfig:
    """Return the draft's config: where the settings say nothing, that of the draft it starts from, else the target's.

    Raises `MismatchError` if a block is longer than a cache was planned for, a layer is not in a cache, or the target
    or the shape is not that of the draft it starts from, and `DflashError` if `dflash export` would refuse it.
    """
    manifest = corpus.caches[0].manifest
    if start:
        start.refuse_other_target(corpus.caches[0])
    planned = min(int(cache.manifest.plan["block_size"]) for cache in corpus.caches)
    block_size = planned if config.block_size is None else config.block_size
    layers = config.layers or (start.config.target_layer_ids if start else corpus.caches[0].layer_ids)
    for cache in corpus.caches:
        _refuse_unfit_cache(cache, block_size, layers)
    defaults = start.config.to_record() if start else {**manifest.decoder, "num_hidden_layers": len(layers)}
    asked: dict[str, Any] = {
        "num_hidden_layers": config.draft_layers,
        "num_attention_heads": config.draft_heads,
        "num_key_value_heads": config.draft_kv_heads,
        "head_dim": config.draft_head_dim,
        "intermediate_size": config.draft_intermediate_size,
        "rope_theta": config.draft_rope_theta,
        "rms_norm_eps": config.draft_rms_norm_eps,
        "max_position_embeddings": config.draft_max_position_embeddings,
    }
    sizes = {name: defaults[name] if value is None else value for name, value in asked.items()}
    draft_config = DraftConfig(
        hidden_size=manifest.decoder["hidden_size"],
        vocab_size=manifest.decoder["vocab_size"],
        num_target_layers=manifest.decoder["num_hidden_layers"],
        target_layer_ids=tuple(layers),
        block_size=block_size,
        mask_token_id=int(manifest.plan["mask_token_id"]),
        **sizes,
        **_attention(config, start, sizes["num_hidden_layers"]),
        variant=_variant(config, start),
    )
    if start:
        start.refuse_other_config(draft_config)
    _refuse_unexportable(draft_config)
    _refuse_idle_temperature(config, draft_config)
    if draft_config.variant.has_own_loss and config.mixture.needs_final:
        raise DflashError(
            f"--loss {config.loss} is not for the variant {draft_config.variant.name}, which learns by a loss of its "
            f"own. Leave it out, or name dflash or dpace, which then weigh its slots."
        )
    return draft_config


def needs_final(config: TrainConfig, draft: DraftConfig) -> bool:
    """Return whether a run learns from the target's own distribution, by its loss or by its draft's variant."""
    return config.mixture.needs_final or draft.variant.needs_final


def _refuse_idle_temperature(config: TrainConfig, draft: DraftConfig) -> None:
    if config.teacher_temperature is not None and not needs_final(config, draft):
        raise DflashError(
            f"teacher_temperature is {config.teacher_temperature}, and --loss {config.loss} does not learn from the "
            f"target's distribution. Choose a loss that does, as in --loss kl, or leave it out."
        )


def _refuse_unexportable(config: DraftConfig) -> None:
    """Raise `DflashError` naming what `dflash export` would refuse of this draft, however it is trained."""
    faults = [fault for fault in config_faults(config.to_json()) if fault.rule not in ONE_CLIENTS_LIMIT]
    if faults:
        listed = "\n  ".join(f"{fault.place} {fault.what}: {fault.why}." for fault in faults)
        raise DflashError(f"This run's draft could not be exported:\n  {listed}\nChange these settings.")


def _variant(config: TrainConfig, start: StartDraft | None) -> Variant:
    """Return the draft's variant; what is not asked for is that of the draft it starts from, if it is of the same.

    Raises `DflashError` naming every setting that belongs to another variant.
    """
    begun = start.config.variant if start else None
    kind = NAMES[config.variant] if config.variant else type(begun) if begun else BASE
    settings = {each: _settings(each) for each in NAMES.values()}
    asked = {name: value for name in {*chain(*settings.values())} if (value := getattr(config, name)) is not None}
    if others := sorted(asked.keys() - settings[kind]):
        owners = {name: [each.name for each, names in settings.items() if name in names] for name in others}
        listed = "\n  ".join(f"{name} is a setting of the variant {' or '.join(owners[name])}." for name in others)
        raise DflashError(
            f"This run's draft is of the variant {kind.name}, which these settings do not belong to:\n  {listed}\n"
            f"Leave them out, or name the variant by --variant."
        )
    defaults = vars(begun) if isinstance(begun, kind) else {}
    own = {name: asked[name] for name in own_fields(kind) if name in asked}
    return kind(**{**defaults, **own})


def _settings(kind: type[Variant]) -> set[str]:
    """Return the settings that are a variant's own: its fields, and those of its loss."""
    return {*own_fields(kind), *kind.loss_settings}


def choose_anchor_rule(config: TrainConfig, draft: DraftConfig, begun: Mapping[str, Any] | None) -> AnchorRule:
    """Return which positions anchor a block: as asked for, or as the run was begun, or as the draft's variant has it.

    `begun` are the settings on the run's record, None if it has none; one that says nothing of it has whole blocks.
    """
    variant = draft.variant
    kind = config.anchors or (begun.get("anchors", WHOLE) if begun else variant.anchors[0])
    if kind not in variant.anchors:
        raise DflashError(
            f"--anchors {kind} is not for a draft of the variant {variant.name}; expected "
            f"{' or '.join(variant.anchors)}. Leave it out."
        )
    return variant.anchor_rule(kind, draft.block_size)


def _attention(config: TrainConfig, start: StartDraft | None, num_layers: int) -> dict[str, Any]:
    """Return windows and causality; what is not asked for is that of the draft it starts from."""
    window, sliding, causal = config.sliding_window, config.sliding_layers, config.causal_layers
    if start and window is None and sliding is None:
        window, sliding = start.config.sliding_window, start.config.sliding_layers
    elif sliding is None:
        sliding = () if window is None else tuple(range(num_layers))
    if causal is None:
        causal = start.config.causal_layers if start else "none"
    return {"sliding_window": window, "sliding_layers": sliding, "causal_layers": causal}


def _refuse_unfit_cache(cache: Cache, block_size: int, layers: tuple[int, ...]) -> None:
    planned = int(cache.manifest.plan["block_size"])
    if block_size > planned:
        raise MismatchError(
            f"{cache.path} was planned for blocks of {planned}, and this draft has blocks of {block_size}. Train "
            f"with --block-size {planned} or less, or extract again with --block-size {block_size}."
        )
    if not set(layers) <= set(cache.layer_ids):
        raise MismatchError(
            f"{cache.path} holds layers {list(cache.layer_ids)}, but this draft reads {list(layers)}. Extract "
            f"again with --layers {','.join(map(str, layers))} into a new folder, or train with layers it holds."
        )


def borrowed_parts(
    cache: Cache, device: torch.device, autocast: torch.dtype | None = None
) -> tuple[nn.Linear, nn.Embedding]:
    """Return the target's head and embedding table from the cache; float32 on the CPU, as stored on a GPU.

    On a GPU they are in the dtype of `autocast`, if any, so that no step has to cast them.
    """
    tensors = load_file(cache.path / TARGET / EMBEDDINGS, device=str(device))
    dtype = torch.float32 if device.type == "cpu" else autocast
    tensors = {name: tensor.to(dtype or tensor.dtype) for name, tensor in tensors.items()}
    table = tensors["embed_tokens.weight"]
    weight, bias = tensors.get("lm_head.weight", table), tensors.get("lm_head.bias")
    head = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    head.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        head.bias = nn.Parameter(bias, requires_grad=False)
    return head, nn.Embedding.from_pretrained(table)
