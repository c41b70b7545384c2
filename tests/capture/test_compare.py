"""A cache's features beside the target run again: sound, off by a layer, wrong behind one huge token, not finite."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from running import some_slow
from safetensors.torch import load_file, save_file
from tiny_target import save_target
from torch import Tensor
from typer.testing import CliRunner

from dflash_offline.pipeline.app import app
from dflash_offline.schemas.errors import MismatchError
from dflash_offline.schemas.manifest import Manifest
from dflash_offline.schemas.settings.extract import ExtractConfig
from dflash_offline.schemas.settings.verify import RerunConfig
from dflash_offline.stages.capture import compare, runner
from dflash_offline.stages.capture.compare import compare_with_target
from dflash_offline.stages.extract import extract
from dflash_offline.stages.progress import Silent
from dflash_offline.stages.store.cache import Cache
from dflash_offline.stages.store.verify import verify_cache


def test_the_target_run_again_fits_every_layer(cache: Path, target: Path) -> None:
    fits = compare_with_target(cache, RerunConfig(target=str(target), samples=4), Silent())
    assert [fit.layer_id for fit in fits] == [1, 2, 4]
    assert all(max(fit.error, fit.channel_error, fit.worst_channel_error) < 0.01 and not fit.fault for fit in fits)


def test_a_layer_that_is_off_by_one_is_said_to_be(
    target: Path, extract_config: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = runner.layer_states
    monkeypatch.setattr(runner, "layer_states", lambda model, ids, layers: right(model, ids, [i + 1 for i in layers]))
    out = tmp_path / "cache"
    extract(ExtractConfig(**extract_config, out=out), Silent())
    assert verify_cache(out, Silent()) == []
    faults = [fit.fault for fit in compare_with_target(out, RerunConfig(target=str(target), samples=4), Silent())]
    assert all("off by +1" in fault for fault in faults)
    said = CliRunner().invoke(app, ["verify", str(out), "--target", str(target)])
    assert said.exit_code == 1 and "layer 1 is off by +1" in said.stdout and "Next: do not train" in said.stdout
    hint = CliRunner().invoke(app, ["inspect", str(out)]).stdout
    assert f"dflash verify {out} --target" in hint  # no record shows it, so the first screen names what would


Run = Callable[[Any, Tensor, list[int]], list[Tensor]]


def changed(change: Callable[[Tensor], Tensor]) -> Run:
    """Return what runs a target and then changes every layer's states, [B, S, H]."""
    right = compare.layer_states
    return lambda model, ids, layers: [change(state) for state in right(model, ids, layers)]


def huge_first(states: Tensor) -> Tensor:
    """Make each first token a thousand times the rest, as targets do."""
    return torch.cat([1000 * states[:, :1], states[:, 1:]], dim=1)


@pytest.mark.parametrize("features", some_slow(("lossless", "rounded", "scaled"), "rounded", "lossless"))
def test_tokens_that_are_wholly_wrong_are_found_behind_one_huge_token(
    target: Path,
    extract_config: dict[str, object],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    features: str,
) -> None:
    settings, again = extract_config | {"features": features}, RerunConfig(target=str(target), samples=8)
    monkeypatch.setattr(compare, "layer_states", changed(huge_first))
    monkeypatch.setattr(runner, "layer_states", compare.layer_states)
    extract(ExtractConfig(**settings, out=tmp_path / "sound"), Silent())
    sound = compare_with_target(tmp_path / "sound", again, Silent())
    assert not any(fit.fault for fit in sound), sound
    monkeypatch.setattr(
        runner, "layer_states", changed(lambda states: torch.cat([states[:, :1], states[:, 1:].flip(1)], dim=1))
    )
    extract(ExtractConfig(**settings, out=tmp_path / "wrong"), Silent())
    assert verify_cache(tmp_path / "wrong", Silent()) == []
    for fit in compare_with_target(tmp_path / "wrong", again, Silent()):
        assert fit.error < fit.largest_error and fit.channel_error > 0.5
        assert f"layer {fit.layer_id} differs from the target's" in fit.fault


def test_a_layer_that_adds_nothing_is_not_taken_for_the_one_before_it(
    target: Path, extract_config: dict[str, object], tmp_path: Path
) -> None:
    expanded = shutil.copytree(target, tmp_path / "expanded")
    weights = load_file(expanded / "model.safetensors")
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        weights[f"model.layers.2.{name}.weight"].zero_()
    save_file(weights, expanded / "model.safetensors", {"format": "pt"})
    settings = extract_config | {"target": str(expanded), "limit": 8, "out": tmp_path / "cache"}
    extract(ExtractConfig(**settings), Silent())
    fits = compare_with_target(tmp_path / "cache", RerunConfig(target=str(expanded), samples=4), Silent())
    assert [(fit.best_layer_id, fit.fault) for fit in fits] == [(1, ""), (2, ""), (4, "")]


def test_without_a_second_token_to_vary_the_plain_error_judges(
    cache: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = Cache.values
    monkeypatch.setattr(Cache, "values", lambda reader, sample: right(reader, sample)[:2])
    arguments = ["verify", str(cache), "--target", str(target), "--samples", "1", "--quiet"]
    pair = changed(lambda states: states[:, :2])
    monkeypatch.setattr(compare, "layer_states", pair)
    said = CliRunner().invoke(app, arguments)
    assert said.exit_code == 0 and "too few tokens to judge its channels" in said.stdout, said.stdout
    assert "is sound" in said.stdout and "nan" not in said.stdout and "inf" not in said.stdout
    monkeypatch.setattr(compare, "layer_states", lambda *inputs: [1.1 * state for state in pair(*inputs)])
    said = CliRunner().invoke(app, arguments)
    assert said.exit_code == 1 and "layer 1 differs from the target's by 9." in said.stdout
    assert "Next: do not train" in said.stdout and "nan" not in said.stdout and "finite" not in said.stdout


@pytest.mark.parametrize("position", [0, 3])
def test_a_target_that_is_not_finite_when_run_again_is_a_fault(
    cache: Path, target: Path, monkeypatch: pytest.MonkeyPatch, position: int
) -> None:
    right = compare.layer_states

    def spoiled(model: Any, ids: Tensor, layers: list[int]) -> list[Tensor]:
        states = [state.clone() for state in right(model, ids, layers)]
        states[layers.index(2)][0, position, 5] = math.nan
        return states

    monkeypatch.setattr(compare, "layer_states", spoiled)
    fits = compare_with_target(cache, RerunConfig(target=str(target), samples=4), Silent())
    assert [fit.layer_id for fit in fits if fit.fault] == [2] and "not finite" in fits[1].fault
    monkeypatch.setattr(compare, "layer_states", changed(lambda states: states * math.inf))
    fits = compare_with_target(cache, RerunConfig(target=str(target), samples=4), Silent())
    assert all("not finite" in fit.fault for fit in fits)
    said = CliRunner().invoke(app, ["verify", str(cache), "--target", str(target), "--json", "--quiet"])
    assert said.exit_code == 1
    for layer in json.loads(said.stdout, parse_constant=pytest.fail)["layers"]:
        assert layer["error"] is None and layer["channel_error"] is None and "not finite" in layer["fault"]
    said = CliRunner().invoke(app, ["verify", str(cache), "--target", str(target), "--quiet"])
    assert said.exit_code == 1 and "another --device" in said.stdout
    assert "is sound" not in said.stdout and "do not train" not in said.stdout  # of the cache nothing is known


def test_another_target_is_refused(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(MismatchError, match=r"(?s)target\.weights_sha256.*Name the target that it was made from"):
        compare_with_target(cache, RerunConfig(target=str(save_target(tmp_path / "other", seed=3))), Silent())


def test_a_tokenizer_saved_with_truncation_and_padding_is_the_same_target(
    target: Path, cache: Path, extract_config: dict[str, object], tmp_path: Path
) -> None:
    saved = shutil.copytree(target, tmp_path / "saved")
    tokenizer = json.loads((saved / "tokenizer.json").read_text())
    tokenizer["truncation"] = {"direction": "Right", "max_length": 9, "strategy": "LongestFirst", "stride": 0}
    tokenizer["padding"] = {
        "strategy": {"Fixed": 9},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<|endoftext|>",
    }
    (saved / "tokenizer.json").write_text(json.dumps(tokenizer))
    out = tmp_path / "cache"
    extract(ExtractConfig(**extract_config | {"target": str(saved)}, out=out), Silent())
    assert Manifest.read(out).identity == Manifest.read(cache).identity
    for made in (out, cache):
        compare_with_target(made, RerunConfig(target=str(saved), samples=1), Silent())


def test_impossible_numbers_of_samples_are_refused(cache: Path, target: Path) -> None:
    flags = ["--samples", "0", "--seed", "-1"]
    result = CliRunner().invoke(app, ["verify", str(cache), "--target", str(target), *flags])
    assert result.exit_code == 1 and "samples is 0; expected at least 1" in result.output
    assert "seed is -1; expected at least 0" in result.output


OWN_CODE = {
    "configuration_own.py": """
from transformers import Qwen3Config

class OwnConfig(Qwen3Config):
    model_type = "own"
""",
    "modeling_own.py": """
from transformers import Qwen3ForCausalLM

from .configuration_own import OwnConfig

class OwnForCausalLM(Qwen3ForCausalLM):
    config_class = OwnConfig
""",
}


def test_a_cache_of_a_target_with_its_own_code_is_verified_as_it_was_extracted(
    target: Path, extract_config: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    own = shutil.copytree(target, tmp_path / "own")
    for name, code in OWN_CODE.items():
        (own / name).write_text(code)
    config = json.loads((own / "config.json").read_text())
    places = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    (own / "config.json").write_text(json.dumps(config | {"model_type": "own", "auto_map": places}))
    out = tmp_path / "cache"
    settings = extract_config | {"target": str(own), "attn_implementation": "eager"}
    extract(ExtractConfig(**settings, out=out, trust_remote_code=True, limit=20), Silent())
    arguments = ["verify", str(out), "--target", str(own), "--samples", "2", "--quiet"]
    refused = CliRunner().invoke(app, arguments)
    assert refused.exit_code == 1 and "--trust-remote-code" in refused.output
    for more in ([], ["--attn-implementation", "sdpa", "--device", "cpu"]):
        sound = CliRunner().invoke(app, [*arguments, "--trust-remote-code", *more])
        assert sound.exit_code == 0 and "layer   4: relative error 0." in sound.stdout, sound.output
    (own / "modeling_own.py").write_text(OWN_CODE["modeling_own.py"] + "# changed\n")
    other = CliRunner().invoke(app, [*arguments, "--trust-remote-code"])
    assert other.exit_code == 1 and "target.code_sha256.modeling_own.py" in other.output
