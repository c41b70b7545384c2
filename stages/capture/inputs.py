"""What the settings of an extraction name: the target and how it is run, the data, and the identity of their cache."""

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from dflash_offline.schemas.draft.anchor_rule import WHOLE
from dflash_offline.schemas.manifest import (
    CAPTURE_RULE,
    COMPILE_RULE,
    HISTORY_RULE,
    MANIFEST,
    ORDER_RULE,
    Layout,
    Manifest,
    is_by_length,
    is_compiled,
)
from dflash_offline.schemas.paths import output_folder, refuse_other_than_utf8
from dflash_offline.schemas.settings.engine import TRANSFORMERS
from dflash_offline.schemas.settings.extract import ExtractConfig
from dflash_offline.stages.buckets.mirror import worked_on
from dflash_offline.stages.capture.engines.installed import engine_identity
from dflash_offline.stages.conversations.loss_mask import ConversationEncoder
from dflash_offline.stages.conversations.sources import Data
from dflash_offline.stages.progress import Progress
from dflash_offline.stages.store.chunks import CODEC
from dflash_offline.stages.target.compiled import reason_not_to_compile
from dflash_offline.stages.target.files import TargetFiles, open_target
from dflash_offline.stages.target.layer_ids import check_layer_ids, default_layer_ids
from dflash_offline.stages.target.model import choose_device, resolve_dtype


@dataclass(frozen=True, kw_only=True)
class ChosenTarget:
    """The target's files, and how it is to be run; no weight is loaded."""

    files: TargetFiles
    layer_ids: tuple[int, ...]
    device: torch.device
    dtype: torch.dtype


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Everything that a cache is made of."""

    config: ExtractConfig
    """The settings, with the real path of the cache, and `max_length` within the target's positions."""
    target: ChosenTarget
    encoder: ConversationEncoder
    data: Data
    identity: dict[str, Any]
    """Every field that decides the cache's content."""

    @property
    def by_length(self) -> bool:
        """Whether samples are ordered by length."""
        return is_by_length(self.identity)

    def layout(self, num_shards: int = 0, shard_tokens: int = 0) -> Layout:
        """Return the layout of a cache with this many shards, and token slots in each."""
        return Layout(
            num_shards=num_shards,
            shard_tokens=shard_tokens,
            chunk_tokens=self.config.chunk_tokens,
            num_layers=len(self.target.layer_ids),
            hidden_size=int(self.target.files.text_config.hidden_size),
            features=self.config.feature_layout,
        )


def open_inputs(config: ExtractConfig, progress: Progress) -> Inputs:
    """Return what the settings name; `DflashError` if the cache folder, the target or the data cannot be used.

    A cache that is there keeps the rules by which it was planned, where those have changed since.
    """
    out = output_folder(worked_on(config.out), marker=MANIFEST, kind="feature cache", renamed=True)
    refuse_other_than_utf8(out, "a feature cache")
    target = choose_target(config)
    num_positions = target.files.num_positions
    if config.max_length > num_positions:
        why = (
            f"Beyond {num_positions} positions the target turns all sequences of a batch by another rotary table "
            f"(longrope)"
            if target.files.table_changes
            else f"The target has {num_positions} positions"
        )
        progress.say(f"{why}; longer conversations are cut there.")
    config = replace(config, out=out, max_length=min(config.max_length, num_positions))
    made = Manifest.read(out).identity if (out / MANIFEST).exists() else None
    encoder = ConversationEncoder(target.files, config, as_served=made is None or "history" in made)
    data = Data(config)
    by_length, compiled = made is None or is_by_length(made), _compiles(config, target, made, progress)
    identity = cache_identity(config, target, encoder, data, by_length=by_length, compiled=compiled)
    return Inputs(config=config, target=target, encoder=encoder, data=data, identity=identity)


def _compiles(config: ExtractConfig, target: ChosenTarget, made: dict[str, Any] | None, progress: Progress) -> bool:
    """Return whether the target's layers are compiled: as asked for, else as in a cache that is there, else on a GPU.

    A GPU's target that is not compiled unasked is said, with the reason.
    """
    if config.compile is not None or made is not None:
        return is_compiled(made or {}) if config.compile is None else config.compile
    if target.device.type == "cpu" or config.engine != TRANSFORMERS:
        return False
    why = reason_not_to_compile(target.files) if config.device_map is None else "it is spread over devices"
    if why:
        progress.say(f"The layers of {target.files.name} are not compiled: {why}. --compile tries it all the same.")
    return not why


def choose_target(config: ExtractConfig) -> ChosenTarget:
    """Return the target that the settings name, and how they run it."""
    files = open_target(
        config.target,
        revision=config.revision,
        trust_remote_code=config.trust_remote_code,
        by_transformers=config.engine == TRANSFORMERS,
    )
    if config.layers is None:
        layer_ids = default_layer_ids(files.num_layers, config.num_layers)
    else:
        layer_ids = check_layer_ids(config.layers, files.num_layers)
    device = choose_device(config.device)
    dtype = resolve_dtype(config.dtype, device, files.config)
    return ChosenTarget(files=files, layer_ids=layer_ids, device=device, dtype=dtype)


def target_identity(config: ExtractConfig, target: ChosenTarget) -> dict[str, Any]:
    """Return what decides the target's hidden states: the hashes of its files as they are now, and how it is run."""
    return {
        **target.files.identity(),
        "dtype": str(target.dtype).removeprefix("torch."),
        "attn_implementation": config.attn_implementation,
        "device_map": config.device_map,
    }


def cache_identity(
    config: ExtractConfig,
    target: ChosenTarget,
    encoder: ConversationEncoder,
    data: Data,
    *,
    by_length: bool,
    compiled: bool,
) -> dict[str, Any]:
    """Return every field that decides a cache's content."""
    return {
        "target": target_identity(config, target),
        "device": target.device.type,
        **engine_identity(config),
        **({"compiled": COMPILE_RULE} if compiled else {}),
        "layer_ids": list(target.layer_ids),
        "capture": CAPTURE_RULE,
        "data": data.identity(),
        **_selection(config, data),
        "mask_rule": encoder.mask_rule,
        **({"history": HISTORY_RULE} if encoder.as_served else {}),
        "mask_token_id": "found" if config.mask_token_id is None else config.mask_token_id,
        "chat_template_kwargs": config.chat_template_kwargs,
        "max_length": config.max_length,
        "block_size": config.block_size,
        **({} if config.anchors == WHOLE else {"anchors": config.anchors}),
        "skip_bad_rows": config.skip_bad_rows,
        "layout": {
            "features": asdict(config.feature_layout),
            "codec": CODEC,
            "shard_mib": config.shard_mib,
            "chunk_tokens": config.chunk_tokens,
            "batch_tokens": config.batch_tokens,
            **({"order": ORDER_RULE} if by_length else {}),
        },
    }


def _selection(config: ExtractConfig, data: Data) -> dict[str, Any]:
    """Return the settings that choose among the data's rows, without those at their default."""
    chosen = {
        "input_format": config.input_format,
        "limit": config.limit,
        "weights": data.weights,
        "seed": None if data.weights is None else config.seed,
        "drop_duplicates": config.drop_duplicates or None,
        "keep_special_tokens": config.keep_special_tokens or None,
    }
    return {name: value for name, value in chosen.items() if value is not None}
