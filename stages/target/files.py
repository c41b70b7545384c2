"""The frozen target's files: finding them, checking them, and the hashes that say which target they are."""

import hashlib
import json
import os
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer

from dflash_offline.schemas.draft.config import DraftConfig
from dflash_offline.schemas.errors import DflashError, UnsupportedTargetError
from dflash_offline.schemas.files import publish, sha256_bytes, sha256_file
from dflash_offline.schemas.paths import refuse_other_than_utf8
from dflash_offline.schemas.sealed import canonical_json
from dflash_offline.stages.target.checkpoint import refuse_unreadable_checkpoint

_WEIGHT_ENDINGS = (".safetensors", ".bin")


def target_folder(name: str, revision: str | None = None) -> Path:
    """Return the folder that holds a target: the one named, or a hub id's files in the hub's cache."""
    folder = Path(name).expanduser()
    refuse_other_than_utf8(folder, "a model")
    if folder.is_dir():
        return folder
    if folder.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise DflashError(f"The target {name} is not a folder. Name a Hugging Face model folder, or a hub id.")
    from huggingface_hub import snapshot_download  # type: ignore[import-not-found, unused-ignore]
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, ignore_patterns=["*.gguf", "*.pth", "original/*"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise DflashError(
            f"The target {name!r} is neither a folder here nor a model that can be fetched from the hub: "
            f"{str(error).splitlines()[0]}. Check the name, or give a folder."
        ) from error


def _refuse_parts_elsewhere(folder: Path, trust_remote_code: bool) -> None:
    """Raise `DflashError` unless all that decides the target's hidden states is in its folder, where it is hashed."""
    if (folder / "adapter_config.json").is_file():
        raise UnsupportedTargetError(
            f"{folder} holds an adapter (adapter_config.json) of a model that lies elsewhere and may change there. "
            f"Merge the two (merge_and_unload in peft), save the result with its tokenizer, and name that folder."
        )
    if not (folder / "config.json").is_file():
        raise DflashError(f"{folder} is not a model: it has no config.json. Name a Hugging Face model folder.")
    for name in ("config.json", "tokenizer_config.json") if trust_remote_code else ():
        try:
            mapped = json.loads((folder / name).read_text()).get("auto_map")
        except (OSError, ValueError, AttributeError):  # absent, or for transformers to refuse
            continue
        elsewhere = re.findall(r'"([^"]+--[^"]+)"', json.dumps(mapped))
        if elsewhere:
            raise UnsupportedTargetError(
                f"{folder / name} takes code from other repositories, where it may change: {', '.join(elsewhere)}. "
                f"Copy those modules into the folder and drop what stands before `--` in auto_map, or leave "
                f"--trust-remote-code out."
            )


def _rotary_tables(text: Any) -> list[dict[str, Any]]:
    """Return how each rotary table of a decoder is made; some families have one for each kind of layer."""
    rope = getattr(text, "rope_parameters", None) or {}
    return [rope, *(part for part in rope.values() if isinstance(part, dict))]


def steady_positions(text: Any) -> int | None:
    """Return up to which length the states of a sequence do not depend on those beside it; None if nothing limits it.

    Once one sequence of a batch exceeds the original positions, longrope turns all of them by another table, as dynamic
    scaling does beyond the declared positions.
    """
    limits = [getattr(text, "max_position_embeddings", None)]
    for rope in _rotary_tables(text):
        if rope.get("rope_type") == "longrope":
            limits.append(rope.get("original_max_position_embeddings"))
    return min((int(limit) for limit in limits if limit), default=None)


@dataclass(frozen=True, kw_only=True)
class TargetFiles:
    """A target on disk, before any weight is loaded."""

    folder: Path
    name: str
    config: Any
    """The transformers config."""
    tokenizer: Any
    """A fast tokenizer with a chat template."""
    template: str
    """The chat template's text."""

    @property
    def text_config(self) -> Any:
        """The part of the config that describes the decoder."""
        return self.config.get_text_config()

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return int(self.text_config.num_hidden_layers)

    @property
    def num_positions(self) -> int:
        """Number of positions of a sequence that can be run beside any others, as `steady_positions` says."""
        return steady_positions(self.text_config) or DraftConfig.max_position_embeddings

    @property
    def table_changes(self) -> bool:
        """Whether the target can run longer sequences, though by another rotary table (longrope)."""
        return self.num_positions < int(self._number("max_position_embeddings") or 0)

    def decoder(self) -> dict[str, Any]:
        """Return the numbers of the decoder that a draft's shape follows, as transformers resolves the config."""
        # A target without attention heads (Mamba) gives a draft no example; heads of about 128 are the usual width.
        hidden_size = int(self._number("hidden_size", needed=True))
        heads = int(self._number("num_attention_heads") or max(1, hidden_size // 128))
        rope = getattr(self.text_config, "rope_parameters", None) or {}
        return {
            "hidden_size": hidden_size,
            "num_hidden_layers": int(self._number("num_hidden_layers", needed=True)),
            "num_attention_heads": heads,
            "num_key_value_heads": int(self._number("num_key_value_heads") or heads),
            "head_dim": int(self._number("head_dim") or hidden_size // heads),
            "intermediate_size": int(self._number("intermediate_size") or 4 * hidden_size),
            "vocab_size": int(self._number("vocab_size", needed=True)),
            "rms_norm_eps": float(self._number("rms_norm_eps") or DraftConfig.rms_norm_eps),
            "rope_theta": float(rope.get("rope_theta") or DraftConfig.rope_theta),
            "max_position_embeddings": self._served_positions(),
        }

    def _served_positions(self) -> int:
        """Return how many positions servers give this target: more than its config declares, where that scales them.

        A draft that declared fewer would end its server at the first longer request.
        """
        declared = int(self._number("max_position_embeddings") or DraftConfig.max_position_embeddings)
        served = [declared]
        for rope in _rotary_tables(self.text_config):
            if rope.get("rope_type") in ("linear", "dynamic", "yarn"):
                original = rope.get("original_max_position_embeddings") if rope["rope_type"] == "yarn" else None
                served.append(int((original or declared) * (rope.get("factor") or 1)))
        return max(served)

    def _number(self, field: str, *, needed: bool = False) -> Any:
        """Return a number of the decoder, or None where its config has none; refuse one that differs by layer."""
        text = self.text_config
        try:
            value = getattr(text, field, None)
        except RuntimeError:  # transformers' answer where layers differ
            value = ()
        if isinstance(value, (list, tuple, dict)) or (needed and value is None):
            said = f"gives no {field}" if value is None else f"gives {field} layer by layer"
            raise UnsupportedTargetError(
                f"{self.name} ({text.model_type}): {self.folder / 'config.json'} {said}; a DFlash draft is shaped "
                f"after decoder layers of one kind, with one number for all. Use another target."
            )
        return value

    def refuse_layers_of_other_kinds(self) -> None:
        """Refuse a decoder whose layers differ in what a draft follows, or run only for some inputs."""
        self.decoder()
        skipped = getattr(self.text_config, "cross_attention_layers", None)
        if skipped:
            raise UnsupportedTargetError(
                f"{self.name} ({self.text_config.model_type}): its layers {', '.join(map(str, skipped))} "
                f"(cross_attention_layers) run for images alone, so text has no hidden states there; a DFlash draft "
                f"needs every layer. Use another target."
            )

    def end_ids(self) -> set[int]:
        """Return the tokens at which serving ends an answer: generation settings', config's and tokenizer's."""
        path = self.folder / "generation_config.json"
        try:
            settings = json.loads(path.read_text()) if path.is_file() else {}
        except ValueError as error:
            raise DflashError(f"{path} is not JSON: {error}. Restore it, or remove it.") from error
        ids: set[int] = set()
        declared = getattr(self.text_config, "eos_token_id", None)
        for named in (settings.get("eos_token_id"), declared, self.tokenizer.eos_token_id):
            ids |= set(named) if isinstance(named, list) else set() if named is None else {named}
        return ids

    def identity(self) -> dict[str, Any]:
        """Return the hashes that say which target this is: config, weights, tokenizer and chat template."""
        weights = sorted(p for p in self.folder.iterdir() if p.name.endswith(_WEIGHT_ENDINGS))
        if not weights:
            raise DflashError(f"{self.folder} holds no weights (*.safetensors or *.bin). Name a complete model folder.")
        return {
            "config_sha256": sha256_file(self.folder / "config.json"),
            "weights_sha256": {path.name: _cached_sha256(path) for path in weights},
            "quantization": _plain(getattr(self.config, "quantization_config", None)),
            "tokenizer_sha256": sha256_bytes(
                self.tokenizer.backend_tokenizer.to_str().encode(),
                canonical_json({k: str(v) for k, v in self.tokenizer.special_tokens_map.items()}),
            ),
            "chat_template_sha256": sha256_bytes(self.template.encode()),
            **self._other_templates(),
            "end_ids": sorted(self.end_ids()),
            "code_sha256": {
                path.name: sha256_file(path) for path in sorted(self.folder.iterdir()) if path.suffix == ".py"
            },
        }

    def _other_templates(self) -> dict[str, Any]:
        """Return hashes of the templates beside the default one, where there are any: rows with tools have their own,
        and a setting may name another."""
        named = self.tokenizer.chat_template
        texts = named if isinstance(named, dict) else {}
        others = {name: sha256_bytes(text.encode()) for name, text in texts.items() if name != "default"}
        return {"other_chat_templates_sha256": others} if others else {}


def open_target(
    name: str, *, revision: str | None = None, trust_remote_code: bool = False, by_transformers: bool = True
) -> TargetFiles:
    """Return a target's config and tokenizer; `DflashError` if either is missing or cannot be used here.

    Weights that transformers does not read are refused, unless something else is to run them.
    """
    folder = target_folder(name, revision)
    _refuse_parts_elsewhere(folder, trust_remote_code)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises whatever the files provoke
        hint = (
            "" if trust_remote_code else " If the model brings its own code and you trust it, add --trust-remote-code."
        )
        raise DflashError(
            f"transformers cannot open the model in {folder}: {str(error).strip().splitlines()[0]}.{hint}"
        ) from error
    if by_transformers:
        refuse_unreadable_checkpoint(folder, config)
    if not getattr(tokenizer, "is_fast", False):
        raise UnsupportedTargetError(
            f"The tokenizer of {folder} has no fast version (tokenizer.json), which the loss mask needs. "
            f"Convert it with transformers and save it beside the model."
        )
    # Whatever it was saved with, only whole texts are encoded; and its identity would hold both.
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    try:
        template = tokenizer.get_chat_template()
    except ValueError as error:
        raise DflashError(
            f"The tokenizer of {folder} has no chat template. Put the model's chat_template.jinja beside it."
        ) from error
    files = TargetFiles(folder=folder, name=name, config=config, tokenizer=tokenizer, template=template)
    files.refuse_layers_of_other_kinds()
    return files


def _plain(config: Any) -> Any:
    if config is None:
        return None
    document = config if isinstance(config, dict) else config.to_dict()
    return json.loads(json.dumps(document, default=str))


def _cached_sha256(path: Path) -> str:
    """Return a weight file's sha256, remembered by path, size, times and inode: in an image all mtimes may be one."""
    stat = path.stat()
    return _noted_sha256(path, (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino))


@cache
def _noted_sha256(path: Path, state: tuple[int, ...]) -> str:
    key = ":".join(map(str, (path.resolve(), *state)))
    root = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "dflash" / "sha256"
    note = root / hashlib.sha256(os.fsencode(key)).hexdigest()
    if note.is_file() and len(known := note.read_text()) == 64:
        return known
    digest = sha256_file(path)
    try:  # only a shortcut: an unwritable home costs the hashing again
        root.mkdir(parents=True, exist_ok=True)
        publish([digest.encode()], path=note)
    except OSError:
        pass
    return digest
