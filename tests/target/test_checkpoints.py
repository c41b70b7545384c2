"""Checkpoints that a load would read in part: each is refused by name, with the weights that would be lost."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from running import dflash, refused
from safetensors.torch import load_file, save_file
from tiny_target import save_conversations, save_target, save_tokenizer
from torch import Tensor
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

from dflash_offline.pipeline.doctor.torch_trials import _describe_target
from dflash_offline.schemas.errors import DflashError
from dflash_offline.stages.progress import Silent
from dflash_offline.stages.target.files import open_target
from dflash_offline.stages.target.model import decoder_of, load_model

Tensors = dict[str, Tensor]
DOWN = "model.layers.0.mlp.down_proj"


def checkpoint(source: Path, folder: Path, change: Callable[[Tensors], Tensors], **config: Any) -> Path:
    """Copy a target with its tensors changed, and with these fields in its config."""
    shutil.copytree(source, folder)
    tensors = change(load_file(folder / "model.safetensors"))
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder


def projections(tensors: Tensors, change: Callable[[str, Tensor], Tensors]) -> Tensors:
    """Replace each projection by what `change` makes of it."""
    made: Tensors = {}
    for name, tensor in tensors.items():
        made |= change(name, tensor) if name.endswith("proj.weight") else {name: tensor}
    return made


def as_float8(tensors: Tensors) -> Tensors:
    """Store projections as ModelOpt stores them: float8 values and a scale beside each."""

    def change(name: str, weight: Tensor) -> Tensors:
        scale = weight.abs().max() / 448
        stored = {name: (weight / scale).to(torch.float8_e4m3fn), f"{name}_scale": scale}
        return stored | {f"{name.removesuffix('weight')}input_scale": torch.tensor(0.01)}

    return projections(tensors, change)


def as_int8(tensors: Tensors) -> Tensors:
    """Store projections as int8 in plain linear layers, their scales kept elsewhere."""
    return projections(tensors, lambda name, weight: {name: (weight * 100).round().to(torch.int8)})


def as_packed(tensors: Tensors) -> Tensors:
    """Store projections as packed words under other names, as GPTQ does."""

    def change(name: str, weight: Tensor) -> Tensors:
        stem = name.removesuffix("weight")
        words = torch.zeros(weight.shape[1] // 8, weight.shape[0], dtype=torch.int32)
        return {
            f"{stem}qweight": words,
            f"{stem}qzeros": words[:1].clone(),
            f"{stem}scales": torch.ones(1, weight.shape[0]),
        }

    return projections(tensors, change)


def as_half_bytes(tensors: Tensors) -> Tensors:
    """Store projections as two 4-bit values a byte, as NVFP4 does."""
    return projections(
        tensors, lambda name, weight: {name: torch.zeros(weight.shape[0], weight.shape[1] // 2, dtype=torch.uint8)}
    )


def with_smoothing(tensors: Tensors) -> Tensors:
    """Fold a smoothing factor out of one projection and store it beside, as AWQ variants do."""
    return tensors | {f"{DOWN}.smooth": torch.ones(64)}


def with_biases(tensors: Tensors) -> Tensors:
    """Add the biases that the config does not tell of."""
    return tensors | {"model.layers.0.self_attn.q_proj.bias": torch.ones(32)}


MODELOPT = {"quantization_config": {"quant_method": "modelopt", "quant_algo": "FP8"}}
UNREAD: dict[str, tuple[Callable[[Tensors], Tensors], dict[str, Any], tuple[str, ...]]] = {
    "float8 of an unknown method": (as_float8, MODELOPT, ("'modelopt'", "126 tensors", "input_scale", "fp8")),
    "float8 without a method": (as_float8, {}, ("names no quantization", "126 tensors")),
    "method under another name": (
        as_float8,
        {"compression_config": {"quant_method": "compressed-tensors"}},
        ("names no quantization",),
    ),
    "an unknown method over plain weights": (lambda tensors: tensors, MODELOPT, ("'modelopt'", "Expected")),
    "a quantization without a method": (as_int8, {"quantization_config": {"bits": 8}}, ("quantization None",)),
    "int8 in plain layers": (as_int8, {}, ("names no quantization", "42 tensors", f"{DOWN}.weight")),
    "packed words": (as_packed, {}, ("names no quantization", "126 tensors", "qweight")),
    "two values a byte": (as_half_bytes, MODELOPT, ("'modelopt'", "42 tensors")),
}
LOST: dict[str, tuple[Callable[[Tensors], Tensors], dict[str, Any], tuple[str, ...]]] = {
    "factors beside a weight": (with_smoothing, {}, (f"{DOWN}.smooth", "holds 1 weights that Qwen3ForCausalLM")),
    "biases": (with_biases, {}, ("q_proj.bias", "describes another model")),
    "layers beyond the last": (
        lambda tensors: tensors,
        {"num_hidden_layers": 5, "layer_types": ["full_attention"] * 5},
        ("model.layers.5.", "fewer layers"),
    ),
    "norms of another family": (
        lambda tensors: tensors,
        {"model_type": "llama", "architectures": ["LlamaForCausalLM"]},
        ("LlamaForCausalLM", "q_norm.weight"),
    ),
    "another width": (
        lambda tensors: tensors | {f"{DOWN}.weight": torch.ones(32, 32)},
        {},
        (f"{DOWN}.weight [32, 32], expected [32, 64]",),
    ),
    "no head": (
        lambda tensors: tensors,
        {"tie_word_embeddings": False},
        ("lacks 1 weights of Qwen3ForCausalLM: lm_head.weight",),
    ),
}


@pytest.mark.parametrize("case", UNREAD)
def test_quantized_weights_that_no_quantizer_takes_are_refused_before_any_is_read(
    case: str, target: Path, tmp_path: Path
) -> None:
    change, config, told = UNREAD[case]
    folder = checkpoint(target, tmp_path / "target", change, **config)
    with pytest.raises(DflashError) as error:
        open_target(str(folder))
    assert str(folder / "config.json") in str(error.value)
    assert all(part in str(error.value) for part in told), error.value
    with pytest.raises(DflashError, match="which transformers cannot undo"):
        _describe_target(str(folder))  # as doctor asks


@pytest.mark.parametrize("case", LOST)
def test_weights_that_a_load_would_leave_out_or_make_up_are_refused(case: str, target: Path, tmp_path: Path) -> None:
    change, config, told = LOST[case]
    folder = checkpoint(target, tmp_path / "target", change, **config)
    with pytest.raises(DflashError) as error:
        load_model(open_target(str(folder)), dtype=torch.float32, device=torch.device("cpu"))
    assert str(folder) in str(error.value) and all(part in str(error.value) for part in told), error.value


def test_no_command_takes_features_from_weights_without_their_scales(target: Path, tmp_path: Path) -> None:
    folder = checkpoint(target, tmp_path / "target", as_float8, **MODELOPT)
    data = save_conversations(tmp_path / "chats.jsonl", 2)
    cache, answers = tmp_path / "cache", tmp_path / "answers.jsonl"
    refused(dflash("extract", data, "--target", folder, "--out", cache, "--device", "cpu", "-q"), "'modelopt'")
    refused(dflash("regenerate", data, "--target", folder, "--out", answers, "--device", "cpu", "-q"), "'modelopt'")
    assert not cache.exists() and not answers.exists()


def as_blocks(tensors: Tensors) -> Tensors:
    """Store projections as transformers' own float8 with a scale for each block."""

    def change(name: str, weight: Tensor) -> Tensors:
        scale = weight.abs().max() / 448
        blocks = scale.expand(weight.shape[0] // 16, weight.shape[1] // 16)
        return {name: (weight / scale).to(torch.float8_e4m3fn), f"{name}_scale_inv": blocks}

    return projections(tensors, change)


def undone(tensors: Tensors) -> Tensors:
    """Return plain weights of the values that `as_blocks` stores."""
    stored = as_blocks(tensors)
    scales = {name.removesuffix("_scale_inv"): scale[0, 0] for name, scale in stored.items() if "_scale_inv" in name}
    return {name: stored[name].float() * scales.get(name, torch.tensor(1.0)) for name in tensors}


def test_a_quantization_that_transformers_undoes_gives_the_logits_of_the_plain_weights(
    target: Path, tmp_path: Path
) -> None:
    pytest.importorskip("accelerate")
    fp8 = {"quant_method": "fp8", "weight_block_size": [16, 16], "activation_scheme": "dynamic"}

    def logits(name: str, change: Callable[[Tensors], Tensors], **config: Any) -> Tensor:
        files = open_target(str(checkpoint(target, tmp_path / name, change, **config)))
        model = load_model(files, dtype=torch.float32, device=torch.device("cpu"))
        with torch.inference_mode():
            found: Tensor = model(torch.arange(1, 20)[None]).logits
        return found

    torch.testing.assert_close(logits("stored", as_blocks, quantization_config=fp8), logits("plain", undone))

    def without_scales(tensors: Tensors) -> Tensors:
        return {name: tensor for name, tensor in as_blocks(tensors).items() if "_scale_inv" not in name}

    with pytest.raises(
        DflashError, match=r"holds 42 weights in few bits .* without scales: model\.layers\.0\.mlp\.down"
    ):
        logits("without scales", without_scales, quantization_config=fp8)


class Heard(Silent):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


def test_parts_beside_the_decoder_are_named_and_not_refused(target: Path, tmp_path: Path) -> None:
    beside = {"visual.blocks.0.weight": torch.ones(4, 4), "model.mtp.norm.weight": torch.ones(4)}
    beside |= {"model.layers.6.mlp.up_proj.weight": torch.ones(4), "model.layers.0.self_attn.k_scale": torch.ones(1)}
    folder = checkpoint(target, tmp_path / "t", lambda tensors: tensors | beside, num_nextn_predict_layers=1)
    heard = Heard()
    load_model(open_target(str(folder)), dtype=torch.float32, device=torch.device("cpu"), progress=heard)
    said = "\n".join(heard.lines)
    assert f"3 weights of {folder} belong to no part of Qwen3ForCausalLM" in said, said
    assert "visual.blocks" in said and "model.mtp" in said


def test_an_index_that_names_absent_files_is_refused_with_their_names(target: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(target, tmp_path / "target")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    names = load_file(folder / "model-00001-of-00002.safetensors")
    shards = dict.fromkeys(names, "model-00001-of-00002.safetensors") | {
        "lm_head.weight": "model-00002-of-00002.safetensors"
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    with pytest.raises(DflashError, match=r"lacks 1 of the 2 weight files .*: model-00002-of-00002\.safetensors\."):
        open_target(str(folder))


class Code:
    """Runs when a pickle of it is opened."""

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return (print, ("run",))


@pytest.mark.parametrize("content", ["code", "nothing", "int8"])
def test_a_pickle_is_named_and_none_of_its_code_is_run(
    content: str, target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(target, tmp_path / "target")
    tensors: dict[str, Any] = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    path = folder / "pytorch_model.bin"
    torch.save(tensors, path)
    load_model(open_target(str(folder)), dtype=torch.float32, device=torch.device("cpu"))
    if content == "int8":
        torch.save(as_int8(tensors), path)
    elif content == "code":
        torch.save(tensors | {"code": Code()}, path)
    else:
        path.write_bytes(b"")
    with pytest.raises(DflashError, match="42 tensors" if content == "int8" else "pytorch_model.bin is a pickle"):
        open_target(str(folder))
    assert "run" not in capsys.readouterr().out


def test_a_damaged_header_is_refused_by_file(target: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(target, tmp_path / "target")
    path = folder / "model.safetensors"
    path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:200])
    with pytest.raises(DflashError, match=r"model\.safetensors is no sound safetensors file"):
        open_target(str(folder))


def _of_text_and_images(folder: Path) -> Path:
    """Save a tiny model whose decoder has a config within the config."""
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {**small, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 304}
    images = {**small, "image_size": 28, "patch_size": 14}
    Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=images)).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.mark.parametrize("of_text_and_images", [False, True])
@pytest.mark.parametrize(("named", "asked"), [("eager", "sdpa"), ("sdpa", "eager")])
def test_the_attention_that_is_asked_for_goes_before_the_one_in_the_config(
    of_text_and_images: bool, named: str, asked: str, tmp_path: Path
) -> None:
    """It is recorded as what ran, so it must be what runs: in the layers too, not only in the config."""
    folder = (_of_text_and_images if of_text_and_images else save_target)(tmp_path / "target")
    config = json.loads((folder / "config.json").read_text())
    for part in (config, config.get("text_config", {})):
        part |= {"_attn_implementation": named, "return_dict": False}
    (folder / "config.json").write_text(json.dumps(config))
    model = load_model(
        open_target(str(folder)), dtype=torch.float32, device=torch.device("cpu"), attn_implementation=asked
    )
    run = {module.config._attn_implementation for module in decoder_of(model).modules() if hasattr(module, "config")}
    assert run == {asked}
    assert model(input_ids=torch.arange(4)[None]).logits.shape == (1, 4, 304)
