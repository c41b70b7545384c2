"""Targets of other families through the whole pipeline, each tiny and random; and those that are refused, and when."""

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from running import dflash, some_slow
from tiny_target import save_conversations, save_tokenizer
from transformers import AutoModelForCausalLM, PreTrainedConfig
from typer.testing import Result

from dflash_offline.pipeline.doctor.torch_trials import _describe_target
from dflash_offline.schemas.draft.lint import lint_draft
from dflash_offline.schemas.errors import DflashError, UnsupportedTargetError
from dflash_offline.schemas.files import sha256_file
from dflash_offline.stages.target import files as target_files
from dflash_offline.stages.target import model as target_model
from dflash_offline.stages.target.files import open_target
from dflash_offline.stages.target.model import check_plain_embeddings, load_model

SHAPE = {
    "vocab_size": 304,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_hidden_layers": 6,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 2,
}
LINEAR = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LLAMA_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def make(name: str, **changes: Any) -> PreTrainedConfig:
    return getattr(transformers, name)(**{**SHAPE, **changes})


def nested(name: str, text: dict[str, Any]) -> PreTrainedConfig:
    """Return a config whose decoder is a part of it, as a model that also sees has."""
    return getattr(transformers, name)(text_config={**SHAPE, **text}, tie_word_embeddings=False)


DECODED: dict[str, Callable[[], PreTrainedConfig]] = {
    "qwen3_moe": lambda: make("Qwen3MoeConfig", **EXPERTS, decoder_sparse_step=1),
    "llama3": lambda: make("LlamaConfig", rope_parameters=LLAMA_ROPE),
    "qwen3_5_nested_full": lambda: nested("Qwen3_5Config", {"layer_types": ["full_attention"] * 6}),
    "llama4_nested": lambda: nested(
        "Llama4Config",
        {
            "intermediate_size_mlp": 64,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "interleave_moe_layer_step": 2,
            "attention_chunk_size": 256,
        },
    ),
}
NOT_REWOUND: dict[str, Callable[[], PreTrainedConfig]] = {
    "qwen3_next": lambda: make("Qwen3NextConfig", **LINEAR, **EXPERTS, shared_expert_intermediate_size=32),
    "qwen3_5_nested": lambda: nested("Qwen3_5Config", LINEAR),
}
PER_LAYER = {"layer_types": ["sliding_attention", "full_attention"] * 3}
REFUSED: dict[str, tuple[Callable[[], PreTrainedConfig], str]] = {
    "gemma3": (lambda: make("Gemma3TextConfig"), "does not feed raw embedding rows"),
    "gemma3_nested": (lambda: nested("Gemma3Config", {}), "does not feed raw embedding rows"),
    "granite": (lambda: make("GraniteConfig", logits_scaling=4.0), "scales or caps its logits"),
    "gemma4": (
        lambda: make("Gemma4TextConfig", **PER_LAYER, num_kv_shared_layers=0, hidden_size_per_layer_input=0),
        "gemma4_text): {target}/config.json gives head_dim layer by layer",
    ),
    "gemma3n": (
        lambda: make(
            "Gemma3nTextConfig",
            **PER_LAYER,
            intermediate_size=[64] * 6,
            num_kv_shared_layers=0,
            vocab_size_per_layer_input=304,
            hidden_size_per_layer_input=8,
            activation_sparsity_pattern=[0.0] * 6,
            laurel_rank=8,
            altup_num_inputs=2,
        ),
        "gemma3n_text): {target}/config.json gives intermediate_size layer by layer",
    ),
    "mllama": (
        lambda: nested("MllamaConfig", {"cross_attention_layers": [1, 4], "bos_token_id": 1}),
        "its layers 1, 4 (cross_attention_layers) run for images alone",
    ),
    "gpt2": (
        lambda: transformers.GPT2Config(
            vocab_size=304, n_embd=32, n_layer=6, n_head=4, n_positions=512, bos_token_id=2, eos_token_id=2
        ),
        "keeps no list of 6 decoder layers",
    ),
}


def save(config: PreTrainedConfig, folder: Path) -> Path:
    """Save a random target of this config with a tokenizer; a nested config stays nested on disk."""
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            torch.nn.init.normal_(parameter, std=0.15)
    model.generation_config.eos_token_id = 2
    model.save_pretrained(folder)
    config.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def extracted(config: PreTrainedConfig, tmp_path: Path) -> tuple[Path, Path, Result]:
    target, data = save(config, tmp_path / "target"), save_conversations(tmp_path / "chats.jsonl", 40)
    flags = ["--out", tmp_path / "cache", "--block-size", 8, "--shard-mib", 1, "--device", "cpu", "--quiet"]
    return target, tmp_path / "cache", dflash("extract", data, "--target", target, *flags)


def trained(cache: Path, tmp_path: Path) -> Path:
    """Train and export a draft; returns its folder."""
    settings = ["--steps", 10, "--draft-layers", 1, "--num-anchors", 8, "--device", "cpu", "--quiet"]
    run = dflash("train", cache, "--out", tmp_path / "run", *settings)
    assert run.exit_code == 0, run.output
    made = dflash("export", tmp_path / "run", "--out", tmp_path / "draft")
    assert made.exit_code == 0, made.output
    assert lint_draft(tmp_path / "draft") == []
    walked = dflash("eval", tmp_path / "run", "--cache", cache, "--quiet", "--json")
    assert walked.exit_code == 0 and json.loads(walked.stdout)["acceptance"]["pooled"] >= 1, walked.output
    return tmp_path / "draft"


@pytest.mark.parametrize("family", some_slow(DECODED, "llama4_nested", "qwen3_5_nested_full"))
def test_a_family_runs_from_extraction_to_lossless_decoding(family: str, tmp_path: Path) -> None:
    config = DECODED[family]()
    target, cache, made = extracted(config, tmp_path)
    assert made.exit_code == 0, made.output
    draft = trained(cache, tmp_path)
    found = dflash("verify", cache, "--target", target, "--samples", 3, "--quiet")
    assert found.exit_code == 0, found.output
    flags = ["--cache", cache, "--target", target, "--max-new-tokens", 24, "--json", "--quiet", "--device", "cpu"]
    result = dflash("eval", draft, *flags)
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["lossless"] and document["acceptance"]["rounds"] > 10
    assert dflash("verify", draft, "--target", target).exit_code == 0


@pytest.mark.parametrize("family", some_slow(NOT_REWOUND, "qwen3_5_nested"))
def test_a_recurrent_target_is_extracted_and_trained_for_and_eval_says_why_not_decoded(
    family: str, tmp_path: Path
) -> None:
    target, cache, made = extracted(NOT_REWOUND[family](), tmp_path)
    assert made.exit_code == 0, made.output
    draft = trained(cache, tmp_path)
    refused = dflash("eval", draft, "--cache", cache, "--target", target, "--quiet")
    assert refused.exit_code == 1
    assert "cannot be taken back to before a rejected token (its layers keep a recurrent state)" in refused.stderr


def test_a_target_without_sdpa_says_which_flag_helps_and_then_works(tmp_path: Path) -> None:
    config = make("GptOssConfig", num_local_experts=4, num_experts_per_tok=2)
    target, cache, refused = extracted(config, tmp_path)
    assert refused.exit_code == 1 and "Try --attn-implementation eager" in refused.stderr, refused.output
    eager = ["--attn-implementation", "eager", "--device", "cpu", "--quiet"]
    data, flags = tmp_path / "chats.jsonl", ["--out", cache, "--block-size", 8, "--shard-mib", 1]
    assert dflash("extract", data, "--target", target, *flags, *eager).exit_code == 0
    flags = ["--cache", cache, "--target", target, "--max-new-tokens", 12, "--limit", 2]
    found = dflash("eval", trained(cache, tmp_path), *flags, *eager)
    assert found.exit_code == 0 and "identical answers: 2 of 2" in found.stdout, found.output


def skip_at(layer: torch.nn.Module) -> Callable[..., Any]:
    """Return a call that hands the hidden states past one layer."""

    def call(self: torch.nn.Module, hidden_states: torch.Tensor, *rest: Any, **named: Any) -> Any:
        return hidden_states if self is layer else torch.nn.Module.__call__(self, hidden_states, *rest, **named)

    return call


@pytest.mark.parametrize("family", some_slow(REFUSED, "gemma3_nested"))
def test_a_target_that_no_draft_can_serve_is_refused_before_any_work(family: str, tmp_path: Path) -> None:
    config, why = REFUSED[family]
    target, cache, refused = extracted(config(), tmp_path)
    assert refused.exit_code == 1 and why.format(target=target) in refused.stderr, refused.output
    assert refused.stderr.startswith("dflash: ") and not cache.exists()


@pytest.mark.parametrize("family", ["gemma4", "gemma3n", "mllama"])
def test_the_doctor_refuses_layers_of_other_kinds_by_the_same_words(family: str, tmp_path: Path) -> None:
    config, why = REFUSED[family]
    target = tmp_path / "target"
    config().save_pretrained(target)
    save_tokenizer(target)
    with pytest.raises(UnsupportedTargetError) as error:
        _describe_target(str(target))
    assert why.format(target=target) in str(error.value)


def test_a_layer_that_text_does_not_run_through_is_refused_whatever_its_config_says(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(open_target(str(target)), dtype=torch.float32, device=torch.device("cpu"))
    skipped = model.model.layers[3]
    monkeypatch.setattr(type(skipped), "__call__", skip_at(skipped))
    with pytest.raises(UnsupportedTargetError, match="runs text through 5 of its 6 layers, not through 3;"):
        check_plain_embeddings(model, "target")


ELSEWHERE: dict[str, tuple[str, dict[str, Any], str]] = {
    "adapter": ("adapter_config.json", {"base_model_name_or_path": "org/base"}, r"holds an adapter .*merge_and_unload"),
    "model code": (
        "config.json",
        {"auto_map": {"AutoConfig": "org/code--its.Config"}},
        r"org/code--its\.Config\. Copy",
    ),
    "tokenizer code": (
        "tokenizer_config.json",
        {"auto_map": {"AutoTokenizer": [None, "o/c--t.T"]}},
        r"o/c--t\.T\. Copy",
    ),
}


@pytest.mark.parametrize("what", ELSEWHERE)
def test_a_target_with_parts_outside_its_folder_is_refused(target: Path, tmp_path: Path, what: str) -> None:
    name, fields, told = ELSEWHERE[what]
    folder = shutil.copytree(target, tmp_path / "target")
    path = folder / name
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | fields))
    with pytest.raises(UnsupportedTargetError, match=told):
        open_target(str(folder), trust_remote_code=True)
    if what == "adapter":
        (folder / "config.json").unlink()  # as peft saves it
        with pytest.raises(UnsupportedTargetError, match=told):
            open_target(str(folder))
    else:
        open_target(str(folder))  # transformers' own code then


def test_weights_are_hashed_once_and_again_when_replaced_by_some_of_the_same_size_and_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "notes"))
    hashed: list[Path] = []

    def counted(path: Path) -> str:
        hashed.append(path)
        return sha256_file(path)

    monkeypatch.setattr(target_files, "sha256_file", counted)
    weights, other = tmp_path / "model.safetensors", tmp_path / "other"

    def sha256() -> str:
        os.utime(weights, (0, 0))
        time.sleep(0.02)  # a clock of files ticks a few hundred times a second
        target_files._noted_sha256.cache_clear()  # as a process that starts
        return target_files._cached_sha256(weights)

    weights.write_bytes(b"one")
    assert sha256() == hashlib.sha256(b"one").hexdigest() == target_files._cached_sha256(weights) and len(hashed) == 1
    other.write_bytes(b"two")
    other.replace(weights)
    assert sha256() == hashlib.sha256(b"two").hexdigest()
    weights.write_bytes(b"six")
    assert sha256() == hashlib.sha256(b"six").hexdigest()
    target_files._noted_sha256.cache_clear()
    assert target_files._cached_sha256(weights) == hashlib.sha256(b"six").hexdigest() and len(hashed) == 3


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
@pytest.mark.parametrize("settings", [{}, pytest.param({"MALLOC_MMAP_THRESHOLD_": "4096"}, marks=pytest.mark.slow)])
def test_freed_memory_is_kept_unless_the_user_says_otherwise(settings: dict[str, str]) -> None:
    code = (
        "import resource, ctypes; from dflash_offline.stages.target.model import keep_freed_memory\n"
        "def faults():\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "    for _ in range(20): bytearray(64 << 20)[:: 4096] = bytes(16384)\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before\n"
        "first = faults(); keep_freed_memory(); faults(); print(first, faults())"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | settings, check=True, capture_output=True, text=True
    )
    before, after = map(int, run.stdout.split())
    assert before > 100_000
    assert after > 100_000 if settings else after < 1_000


@pytest.mark.parametrize("has_accelerate", [True, False])
def test_weights_go_straight_to_a_gpu_where_accelerate_is_installed(
    target: Path, monkeypatch: pytest.MonkeyPatch, has_accelerate: bool
) -> None:
    asked: list[object] = []

    def note(*_: object, device_map: object, **__: object) -> None:
        asked.append(device_map)
        raise OSError("noted")

    device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _device: None)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", note)
    monkeypatch.setattr(target_model, "find_spec", lambda _name: has_accelerate or None)
    with pytest.raises(DflashError, match="noted"):
        load_model(open_target(str(target)), dtype=torch.float32, device=device)
    assert asked == [{"": device} if has_accelerate else None]
