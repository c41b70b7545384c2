"""The frozen target: loading it, checking it, and capturing the outputs of its layers.

Axes: B sequences, S positions, L captured layers, H hidden size.
"""

import ctypes
import logging as standard_logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from dflash_offline.schemas.errors import DflashError, UnsupportedTargetError
from dflash_offline.schemas.settings.extract import ExtractConfig
from dflash_offline.schemas.settings.regenerate import RegenerateConfig
from dflash_offline.stages.progress import Progress, Silent
from dflash_offline.stages.target.checkpoint import quantization_of, refuse_incomplete_load
from dflash_offline.stages.target.files import TargetFiles

_LOGIT_CHANGES = ("final_logit_softcapping", "logit_scale", "logits_scaling", "output_multiplier")
"""Config fields of families that change their logits after the head; a cap shows only on large logits."""
_LOAD_REPORT = "LOAD REPORT"
"""Marks transformers' own table of missing, unexpected and other-shaped weights among its warnings."""
_KEPT_BYTES = 1 << 30
"""Freed memory that the C library keeps for the next forward."""


class TargetLoadError(DflashError):
    """transformers cannot hold or load the target here."""


def quiet_libraries() -> None:
    """Keep transformers' own bars and notices off the terminal; its errors still arrive as exceptions."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    logging.disable_default_handler()  # what is left to say goes where the command's own warnings go
    logging.enable_propagation()


def choose_device(device: str) -> torch.device:
    """Return the device a setting stands for, a GPU with its number; auto is the first GPU if there is one."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise DflashError(f"device is {device!r}, but torch sees no GPU. Use --device cpu, or install a CUDA build.")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise DflashError(f"device is {device!r}; expected cpu, cuda, cuda:N or auto.") from error
    if chosen.type not in ("cpu", "cuda"):
        raise DflashError(f"device is {device!r}; expected cpu, cuda, cuda:N or auto.")
    if chosen.type == "cpu":
        return chosen
    index = chosen.index or 0
    if index >= torch.cuda.device_count():
        raise DflashError(f"device is {device!r}, but torch sees {torch.cuda.device_count()} GPUs, counted from 0.")
    return torch.device("cuda", index)


def resolve_dtype(dtype: str, device: torch.device, config: Any) -> torch.dtype:
    """Return the dtype the target runs in: auto is float32 on the CPU and the checkpoint's own on a GPU."""
    if dtype != "auto":
        return getattr(torch, dtype)
    if device.type == "cpu":
        return torch.float32
    own = getattr(config.get_text_config(), "dtype", None) or getattr(config, "dtype", None)
    return own if isinstance(own, torch.dtype) else torch.bfloat16


def load_model(
    files: TargetFiles,
    *,
    dtype: torch.dtype,
    device: torch.device,
    attn_implementation: str = "sdpa",
    device_map: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Any:
    """Return the target's weights as a frozen causal language model in evaluation mode, none of them left out.

    With a `device_map` (auto, balanced, ...) transformers spreads it over all devices; without one it goes to
    `device`, weight by weight to a GPU where accelerate is installed, else by way of a copy in host memory. A quantized
    checkpoint is put in place as it loads, since it cannot be moved afterwards. A GPU becomes the current one, on which
    kernels that transformers brings are launched.
    """
    progress = progress or Silent()
    quantized = quantization_of(files.config) is not None
    has_accelerate = find_spec("accelerate") is not None
    placement = device_map or ({"": device} if quantized or (device.type == "cuda" and has_accelerate) else None)
    if placement is not None and not has_accelerate:
        raise DflashError(
            f"Loading {files.folder} {'quantized' if quantized else 'over several devices'} needs the accelerate "
            f"package. Install it: pip install 'dflash-offline[large]'."
        )
    if device.type == "cuda":
        torch.cuda.set_device(device)
    with _collected_warnings() as told:
        model, loaded = _read_weights(
            files.folder,
            told,
            dtype=dtype,
            attn_implementation=attn_implementation,
            device_map=placement,
            trust_remote_code=trust_remote_code,
        )
    _run_as_asked(model, files.folder, attn_implementation)
    unread = refuse_incomplete_load(files.folder, model, decoder_of(model), loaded)
    if unread:
        parts = sorted({".".join(name.split(".")[:2]) for name in unread})
        progress.say(
            f"{len(unread)} weights of {files.folder} belong to no part of {type(model).__name__} and are not read: "
            f"{', '.join(parts[:5])}{', ...' if len(parts) > 5 else ''}."
        )
    for text in told:
        if _LOAD_REPORT not in text:  # what it lists was judged above
            progress.say(f"transformers says of {files.folder}: {text.strip().splitlines()[0]}")
    if placement is None:
        model.to(device)
    offloaded = sorted(name for name, parameter in model.named_parameters() if parameter.is_meta)
    if offloaded:
        raise DflashError(
            f"{files.folder} does not fit these devices: {len(offloaded)} weights, {offloaded[0]} first, would be "
            f"kept elsewhere and fetched for each forward. Use more or larger GPUs, or a quantized checkpoint."
        )
    return model.eval().requires_grad_(False)


def _read_weights(folder: Path, told: list[str], **settings: Any) -> tuple[Any, dict[str, Any]]:
    """Return the model and transformers' account of the load, which names weights of other shapes instead of raising.

    `told` holds what transformers has warned of so far.
    """
    try:
        return AutoModelForCausalLM.from_pretrained(
            folder, output_loading_info=True, ignore_mismatched_sizes=True, **settings
        )
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        said = str(error).strip().splitlines()[0]
        report = [text for text in told if _LOAD_REPORT in text]
        if report and "above report" in said:
            said = " ".join(line.strip() for line in report[-1].splitlines()[3:] if line.strip())[:500]
        hint = " Try --attn-implementation eager." if "scaled_dot_product_attention" in said else ""
        raise TargetLoadError(
            f"transformers cannot load the model in {folder} as a causal language model: {said}{hint}"
        ) from error


def _run_as_asked(model: Any, folder: Path, attn_implementation: str) -> None:
    """Let what is asked for here decide how the model runs, where its config.json says otherwise.

    transformers lets an attention that the file names go before the one asked for, and the latter is recorded.
    """
    parts = {id(part): part for part in (model.config, model.config.get_text_config(decoder=True))}.values()
    for part in parts:
        part.return_dict = True
    if "_attn_implementation" not in (folder / "config.json").read_text():
        return
    try:
        if any(part._attn_implementation != attn_implementation for part in parts):
            model.set_attn_implementation(attn_implementation)
    except (ValueError, ImportError) as error:
        raise DflashError(f"{folder} cannot run with {attn_implementation} attention: {error}") from error
    found = {str(part._attn_implementation) for part in parts} - {attn_implementation}
    if found:
        raise DflashError(
            f"{folder / 'config.json'} asks for {', '.join(sorted(found))} attention (_attn_implementation), and "
            f"transformers keeps to it; asked for here is {attn_implementation}. Take that line out of the file, or "
            f"give --attn-implementation {min(found)}."
        )


@contextmanager
def _collected_warnings() -> Iterator[list[str]]:
    """Collect what transformers warns of, instead of showing it."""
    told: list[str] = []
    handler = standard_logging.Handler(standard_logging.WARNING)
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.get_logger("transformers")
    level, propagate = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(standard_logging.WARNING)
    logger.propagate = False
    try:
        yield told
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate


def decoder_of(model: Any) -> Any:
    """Return the part of a causal language model that comes before its head."""
    decoder = model.get_decoder()
    # transformers returns the model itself where a family names the part otherwise than it declares (Llama 4).
    return getattr(model, "model", model) if decoder is model else decoder


def decoder_layers(model: Any) -> nn.ModuleList:
    """Return the target's decoder layers, in order."""
    layers = getattr(decoder_of(model), "layers", None)
    expected = model.config.get_text_config().num_hidden_layers
    if not isinstance(layers, nn.ModuleList) or len(layers) != expected:
        raise UnsupportedTargetError(
            f"{type(model).__name__} keeps no list of {expected} decoder layers where transformers' decoders do; "
            f"its hidden states cannot be captured."
        )
    return layers


class _LastLayerReached(Exception):
    """Raised by the last hook: nothing after that layer is needed."""


@contextmanager
def capture_layers(model: Any, layer_ids: Sequence[int], *, stop: bool = False) -> Iterator[list[Tensor]]:
    """Capture the outputs of the chosen decoder layers, before any final norm.

    The list holds, after each forward, one [B, S, H] tensor for each id in order. With `stop`, a forward ends
    after the last of them; call it through `layer_states`.
    """
    layers = decoder_layers(model)
    captured: list[Tensor] = []

    def hook(index: int, output: Any) -> None:
        if index == 0:
            captured.clear()
        captured.append(output[0] if isinstance(output, tuple) else output)
        if stop and index == len(layer_ids) - 1:
            raise _LastLayerReached

    handles = [
        layers[layer].register_forward_hook(lambda _m, _i, output, index=index: hook(index, output))
        for index, layer in enumerate(layer_ids)
    ]
    try:
        yield captured
    finally:
        for handle in handles:
            handle.remove()


@torch.inference_mode()
def layer_states(model: Any, input_ids: Tensor, layer_ids: Sequence[int]) -> list[Tensor]:
    """Return the outputs of the chosen layers for right-padded sequences, L tensors of [B, S, H].

    No mask is passed: every position sees only what stands before it, so padding on the right changes no real one.
    The forward ends after the last chosen layer; no logits are computed.
    """
    with capture_layers(model, layer_ids, stop=True) as captured:
        try:
            decoder_of(model)(input_ids=input_ids, use_cache=False)
        except _LastLayerReached:
            return list(captured)
    raise AssertionError("the forward ended before the last captured layer")


@torch.inference_mode()
def layer_and_final_states(model: Any, input_ids: Tensor, layer_ids: Sequence[int]) -> tuple[list[Tensor], Tensor]:
    """Return what `layer_states` does, of no layer too, and the last hidden state after the final norm, [B, S, H].

    The latter is what the head reads. The forward runs to its end, but for the head.
    """
    with capture_layers(model, layer_ids) as captured:
        output = decoder_of(model)(input_ids=input_ids, use_cache=False)
    return list(captured), output[0]


def load_as_configured(
    files: TargetFiles,
    config: ExtractConfig | RegenerateConfig,
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress,
) -> Any:
    """Return the target, loaded as the settings say and checked to be one that a draft can be served with."""
    progress.say(f"Loading {files.folder} ({dtype}, {config.device_map or device}).")
    if device.type == "cpu":
        keep_freed_memory()
    model = load_model(
        files,
        dtype=dtype,
        device=device,
        attn_implementation=config.attn_implementation,
        device_map=config.device_map,
        trust_remote_code=config.trust_remote_code,
        progress=progress,
    )
    check_plain_embeddings(model, files.name)
    return model


def keep_freed_memory() -> None:
    """Have the C library, if it is glibc, give what is freed to who asks next, unless the user says otherwise.

    It would give large blocks back to the system, which clears their pages one by one whenever they are taken again:
    a tenth to a fourth of the time of a small target's forwards on a CPU.
    """
    with suppress(AttributeError, OSError):  # another library, or another system
        mallopt = ctypes.CDLL(None).mallopt
        for name, parameter in (("TRIM_THRESHOLD", -1), ("MMAP_THRESHOLD", -3)):
            if f"MALLOC_{name}_" not in os.environ:
                mallopt(parameter, _KEPT_BYTES)


@torch.inference_mode()
def check_plain_embeddings(model: Any, name: str) -> None:
    """Refuse a target whose decoder does not start from raw embedding rows and end in a plain linear head.

    A draft borrows the raw table and the head, as the clients serve it; a scaled embedding (Gemma), learned
    positions or capped logits would be lost silently. Refuse one, too, that skips some of its layers.
    """
    ids = torch.arange(1, 9, device=model.device)[None]
    entered: list[Tensor] = []

    def note_input(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        entered.append(args[0] if args else kwargs["hidden_states"])

    layers, ran = decoder_layers(model), set[int]()
    handles = [layers[0].register_forward_pre_hook(note_input, with_kwargs=True)]
    for index, layer in enumerate(layers):
        handles.append(layer.register_forward_hook(lambda *_, index=index: ran.add(index)))
    # What transformers hooks into the layers to return all hidden states would stay there, and torch cannot compile it.
    left: list[Tensor] = []
    handles.append(decoder_of(model).register_forward_hook(lambda _m, _i, output: left.append(output[0])))
    try:
        output = model(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    if len(ran) < len(layers):
        skipped = ", ".join(str(index) for index in range(len(layers)) if index not in ran)
        raise UnsupportedTargetError(
            f"{name} ({type(model).__name__}) runs text through {len(ran)} of its {len(layers)} layers, not through "
            f"{skipped}; a DFlash draft needs the hidden states of every layer. Use another target."
        )
    raw = nn.functional.embedding(ids, model.get_input_embeddings().weight)
    if not torch.equal(entered[0], raw.to(entered[0].dtype)):
        raise UnsupportedTargetError(
            f"{name} ({type(model).__name__}) does not feed raw embedding rows to its first layer (scaled embeddings "
            f"or learned positions); a DFlash draft borrows the raw rows. Use another target."
        )
    head = model.get_output_embeddings()
    logits = head(left[0].to(head.weight.device))
    same = torch.allclose(
        output.logits.float(), logits.float().to(output.logits.device), rtol=1e-2, atol=1e-2, equal_nan=True
    )
    if not same or changes_logits(model.config.get_text_config()):
        raise UnsupportedTargetError(
            f"{name} ({type(model).__name__}) scales or caps its logits after the head; a DFlash draft is trained "
            f"through the plain head and would be served another one. Use another target."
        )


def changes_logits(text: Any) -> bool:
    """Say whether a decoder's config changes the logits after the head."""
    return any(getattr(text, name, None) not in (None, 0, 1) for name in _LOGIT_CHANGES)


def embedding_tensors(model: Any) -> dict[str, Tensor]:
    """Return the embedding table and, unless it is the same matrix, the head, where they lie: all a draft borrows."""
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    tensors = {"embed_tokens.weight": table.detach()}
    if head.weight.data_ptr() != table.data_ptr():
        tensors["lm_head.weight"] = head.weight.detach()
    if getattr(head, "bias", None) is not None:
        tensors["lm_head.bias"] = head.bias.detach()
    return tensors


def refuse_non_finite(tensors: Mapping[str, Tensor], name: str) -> None:
    """Refuse a target whose embeddings or head, which every draft borrows, hold a value that is not finite."""
    for part, tensor in tensors.items():
        rows = tensor.reshape(len(tensor), -1)
        sound = rows.amin(dim=1).isfinite() & rows.amax(dim=1).isfinite()
        if not sound.all():
            raise UnsupportedTargetError(
                f"{name}: row {int(sound.int().argmin())} of {part} holds a value that is not finite, and drafts "
                f"borrow it. Use a sound copy of the target."
            )
