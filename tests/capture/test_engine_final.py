"""Final states of an engine: its last layer's output after our own final norm, proved as the layers are."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pretended_vllm import pretend
from running import Settings
from safetensors.torch import load_file, save_file
from torch import Tensor

from dflash_offline.schemas.errors import CacheError, DflashError
from dflash_offline.schemas.settings.extract import ExtractConfig
from dflash_offline.stages.capture.engines import second_layout, vllm
from dflash_offline.stages.extract import extract, plan_only
from dflash_offline.stages.progress import Silent
from dflash_offline.stages.store.cache import Cache
from dflash_offline.stages.store.verify import verify_cache
from dflash_offline.stages.target.borrowed import Borrowed, FinalNorm, read_borrowed


def by_engine(config: Settings, out: Path, **changes: object) -> ExtractConfig:
    return ExtractConfig(**config | {"engine": "vllm", "final": True} | changes, out=out)


@pytest.fixture(scope="module")
def own(extract_config: Settings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with final states by transformers."""
    out = tmp_path_factory.mktemp("own") / "cache"
    extract(ExtractConfig(**extract_config, out=out, final=True), Silent())
    return out


def refuse_other_final_states(path: Path, other: Path, error: float = 2**-7) -> None:
    """Assert that two caches hold final states of the same positions, up to an error of each value."""
    own, made = Cache.open(path).require_final(), Cache.open(other).require_final()
    assert own.usable().tolist() == made.usable().tolist() == list(range(len(own.samples)))
    for sample in range(len(own.samples)):
        kept = own.stored(sample)
        np.testing.assert_array_equal(kept, made.stored(sample))
        np.testing.assert_array_equal(own.codes(sample)[~kept], made.codes(sample)[~kept])
        np.testing.assert_allclose(made.values(sample)[kept], own.values(sample)[kept], rtol=error, atol=2e-4)


@pytest.mark.parametrize(("layout", "error"), [({}, 2**-7), ({"features": "scaled"}, 2**-3)])
def test_an_engines_final_states_are_those_of_transformers(
    layout: Settings,
    error: float,
    own: Path,
    extract_config: Settings,
    installed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engines = pretend(monkeypatch)
    extract(by_engine(extract_config | layout, tmp_path / "cache"), Silent())
    assert [engine.named for engine in engines] == [[1, 2, 4, 5]]
    assert Cache.open(tmp_path / "cache").layer_ids == (1, 2, 4) and verify_cache(tmp_path / "cache", Silent()) == []
    refuse_other_final_states(own, tmp_path / "cache", error)


def test_an_engine_adds_final_states_alone_to_a_complete_cache(
    own: Path, extract_config: Settings, installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines, out = pretend(monkeypatch), tmp_path / "cache"
    extract(by_engine(extract_config, out, final=False), Silent())
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    done = extract(by_engine(extract_config, out), Silent())
    assert done.shards_written == done.num_shards > 1
    assert [engine.named for engine in engines] == [[1, 2, 4], [1, 2, 4, 5]]
    assert {path: path.stat().st_mtime_ns for path in before} == before and verify_cache(out, Silent()) == []
    refuse_other_final_states(own, out)


def test_final_states_of_an_engine_that_died_are_gone_on_with(
    own: Path, extract_config: Settings, installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines, out = pretend(monkeypatch), tmp_path / "cache"
    assert plan_only(by_engine(extract_config, out), Silent())[2].final_bytes > 0
    pretend(monkeypatch, dies_after=engines[0].ran + 30)
    with pytest.raises(DflashError, match="Finished shards are kept"):
        extract(by_engine(extract_config, out), Silent())
    pretend(monkeypatch)
    assert extract(by_engine(extract_config, out), Silent()).shards_left == 0
    refuse_other_final_states(own, out)


def behind_the_norm(state: Tensor) -> Tensor:
    """Return states whose last layer was normed already."""
    last = state[:, -1:]
    return torch.cat([state[:, :-1], last * torch.rsqrt(last.square().mean(-1, keepdim=True))], 1)


@pytest.mark.parametrize(
    ("plant", "norm", "said"),
    [
        ({"shift": -1}, {}, "layer 5 is off by -1: the target's layer 4 fits better"),
        ({"change": lambda states: list(map(behind_the_norm, states))}, {}, "layer 5 differs from the target's by"),
        ({}, {"weight": torch.linspace(0.5, 2.0, 32)}, "in a batch: the final state differs from the target's by"),
        ({}, {"epsilon": 1.0}, "one at a time: the final state differs from the target's by"),
    ],
)
def test_a_shifted_last_layer_or_another_norm_is_refused_before_anything_is_written(
    plant: Settings,
    norm: Settings,
    said: str,
    extract_config: Settings,
    installed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engines, right = pretend(monkeypatch, **plant), vllm.final_norm
    monkeypatch.setattr(vllm, "final_norm", lambda target: FinalNorm(**vars(right(target)) | norm))
    with pytest.raises(DflashError, match=f"(?s){said}"):
        extract(by_engine(extract_config | {"limit": 12}, tmp_path / "cache"), Silent())
    assert [engine.was_shut for engine in engines] == [True] and not (tmp_path / "cache").exists()


def test_where_transformers_cannot_hold_the_target_a_second_layout_proves_them(
    own: Path, extract_config: Settings, installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines = pretend(monkeypatch)
    monkeypatch.setattr(vllm, "usable_memory_bytes", lambda: 1000)
    extract(by_engine(extract_config, tmp_path / "cache"), Silent())
    assert [engine.named for engine in engines] == [[-1, 0, 1, 2, 3, 4, 5], [1, 2, 4, 5]]
    refuse_other_final_states(own, tmp_path / "cache")


def test_a_norm_that_leads_to_the_right_tokens_by_other_probabilities_is_refused_by_a_second_layout(
    extract_config: Settings, installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def scaled(*arguments: Any) -> Borrowed:
        right = read_borrowed(*arguments)
        return replace(right, norm=replace(right.norm, weight=50 * right.norm.weight))

    pretend(monkeypatch)
    monkeypatch.setattr(vllm, "usable_memory_bytes", lambda: 1000)
    monkeypatch.setattr(second_layout, "read_borrowed", scaled)
    with pytest.raises(DflashError, match="gives what vLLM draws another log-probability, by"):
        extract(by_engine(extract_config | {"limit": 12}, tmp_path / "cache"), Silent())
    assert not (tmp_path / "cache").exists()


def test_samples_whose_last_layer_is_bad_are_left_out_of_the_final_states_alone(
    extract_config: Settings, installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(states: list[Tensor]) -> list[Tensor]:
        if engines[-1].ran > 120 and not spoilt:
            spoilt.append(states[0][:, -1].fill_(torch.inf))
        return states

    spoilt: list[Tensor] = []
    engines = pretend(monkeypatch, change=spoil)
    with pytest.raises(CacheError, match="a feature is not finite at layer 5, position"):
        extract(by_engine(extract_config, tmp_path / "refused"), Silent())
    spoilt.clear()
    extracted = extract(by_engine(extract_config, tmp_path / "cache", on_bad_features="skip"), Silent())
    cache = Cache.open(tmp_path / "cache")
    assert extracted.num_skipped == 1 and verify_cache(cache.path, Silent()) == []
    assert len(cache.usable()) == len(cache.samples) == len(cache.require_final().usable()) + 1


def test_a_norm_that_cannot_be_read_is_said(
    extract_config: Settings, installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines, folder = pretend(monkeypatch), tmp_path / "target"
    shutil.copytree(str(extract_config["target"]), folder)
    weights = load_file(folder / "model.safetensors")
    save_file(weights | {"model.norm.bias": torch.zeros(32)}, folder / "model.safetensors")
    with pytest.raises(DflashError, match=r"its head or final norm has a bias.* Leave --engine out, or --final"):
        extract(by_engine(extract_config | {"target": str(folder)}, tmp_path / "cache"), Silent())
    assert engines == []
