"""Extraction by an engine: the same cache as transformers makes, or a refusal that says what the engine got wrong."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from cache_files import made_otherwise, set_field
from pretended_vllm import pretend
from processes import FORKING
from running import Settings, dflash
from safetensors.torch import load_file, save_file
from torch import Tensor

from dflash_offline.schemas.errors import CacheError, DflashError, MismatchError
from dflash_offline.schemas.identity import differences
from dflash_offline.schemas.manifest import EMBEDDINGS, FINAL, TARGET, Manifest
from dflash_offline.schemas.settings.extract import ExtractConfig
from dflash_offline.schemas.settings.verify import RerunConfig
from dflash_offline.stages.capture import forecast
from dflash_offline.stages.capture.compare import compare_with_target
from dflash_offline.stages.capture.engines import states, vllm
from dflash_offline.stages.capture.engines.shared_memory import SharedMemory
from dflash_offline.stages.capture.inputs import choose_target, open_inputs
from dflash_offline.stages.capture.workers import gpus_of_engine
from dflash_offline.stages.extract import extract, plan_only
from dflash_offline.stages.progress import Silent
from dflash_offline.stages.store.cache import Cache
from dflash_offline.stages.store.verify import verify_cache
from dflash_offline.stages.training.corpus import Corpus


def by_engine(config: Settings, out: Path, **changes: object) -> ExtractConfig:
    return ExtractConfig(**config | {"engine": "vllm"} | changes, out=out)


@pytest.mark.parametrize("layout", [{}, {"features": "rounded"}, {"features": "scaled"}])
def test_an_engines_cache_holds_what_transformers_holds(
    layout: Settings, extract_config: Settings, installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines = pretend(monkeypatch)
    extract(ExtractConfig(**extract_config | layout, out=tmp_path / "own"), Silent())
    extract(by_engine(extract_config, tmp_path / "other", **layout), Silent())
    assert [engine.was_shut for engine in engines] == [True]
    assert verify_cache(tmp_path / "other", Silent()) == []
    own, other = Cache.open(tmp_path / "own"), Cache.open(tmp_path / "other")
    assert own.usable().tolist() == other.usable().tolist() == list(range(len(own.samples)))
    step = own.layout.features.expected_error or 2**-8
    for sample in own.usable().tolist():
        values, others = own.values(sample).astype(np.float64), other.values(sample).astype(np.float64)
        assert (np.abs(values - others) <= 2 * step * np.abs(values) + 2e-2 * values.std()).all()
        assert np.linalg.norm(values - others) < 1e-2 * np.linalg.norm(values)


def test_an_engine_goes_on_with_what_is_left(
    extract_config: Settings, installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forecast, "_TIMED_S", 0.0)  # so that both commands measure one batch, however slow it is
    out = tmp_path / "cache"
    engines = pretend(monkeypatch)
    extract(by_engine(extract_config, tmp_path / "whole"), Silent())
    pretend(monkeypatch, dies_after=engines[0].ran - 5)  # within the last shard
    with pytest.raises(DflashError, match=r"vLLM's engine stopped: RuntimeError: worker 0 died. Finished shards"):
        extract(by_engine(extract_config, out), Silent())
    begun = Cache(out)
    assert 0 < len(begun.commits) < begun.layout.num_shards
    engines = pretend(monkeypatch)
    extracted = extract(by_engine(extract_config, out), Silent())
    assert extracted.shards_written == begun.layout.num_shards - len(begun.commits)
    assert Cache.open(out).commits.items() >= begun.commits.items()
    assert extract(by_engine(extract_config, out), Silent()).shards_written == 0
    assert len(engines) == 1, "where nothing is left no engine starts"


def test_a_plan_alone_leaves_no_engine(
    extract_config: Settings, installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines = pretend(monkeypatch)
    _, layout, forecast = plan_only(by_engine(extract_config, tmp_path / "cache"), Silent())
    assert layout.num_shards > 1 and forecast.tokens_per_s > 0
    assert [engine.was_shut for engine in engines] == [True] and list(tmp_path.glob("cache*")) == []


def swapped(states: list[Tensor]) -> list[Tensor]:
    """Return the states of a step with those of two requests exchanged, as far as both are long."""
    if len(states) < 2:
        return states
    first, second = states[0].clone(), states[1].clone()
    shorter = min(len(first), len(second))
    first[:shorter], second[:shorter] = states[1][:shorter], states[0][:shorter]
    return [first, second, *states[2:]]


def others_prefix(states: list[Tensor]) -> list[Tensor]:
    """Return the states of a step with the first 16 tokens of its last request in all others."""
    return [torch.cat([states[-1][:16], state[16:]]) for state in states]


def padded(states: list[Tensor]) -> list[Tensor]:
    """Return the states of a step as padding on the left that is not taken off would give them."""
    return [torch.roll(state, 1, 0) for state in states]


def repeated(states: list[Tensor]) -> list[Tensor]:
    """Return the states of a step whose second layer is the first once more."""
    return [state[:, [0, 0, 2]] for state in states]


@pytest.mark.parametrize(
    ("plant", "said"),
    [
        ({"shift": 1}, "layer 1 is off by [+]1: the target's layer 2 fits better"),
        ({"shift": -1}, "layer 4 is off by -1: the target's layer 3 fits better"),
        ({"change": swapped}, "in a batch: sample .* they are those of sample"),
        ({"change": others_prefix}, "in a batch: sample .* has other states at 1[0-9] tokens, from [0-9] to 15"),
        ({"change": padded}, "one at a time: sample 0 has other states"),
        ({"change": repeated}, "layer 2 is off by -1"),
        ({"change": lambda states: [state.fill_(torch.nan) for state in states]}, "differs from the target's by nan"),
        ({"change": lambda states: [state.zero_() for state in states]}, "differs from the target's by 100"),
        ({"other_ids": True}, "vLLM ran other token ids than it was given"),
        ({"gives_states": False}, "handed over no states"),
    ],
)
def test_an_engine_whose_states_are_not_the_targets_writes_nothing(
    plant: Settings,
    said: str,
    extract_config: Settings,
    installed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engines = pretend(monkeypatch, **plant)
    with pytest.raises(DflashError, match=f"(?s){said}"):
        extract(by_engine(extract_config | {"limit": 12}, tmp_path / "cache"), Silent())
    assert [engine.was_shut for engine in engines] == [True]
    assert not (tmp_path / "cache").exists()


def test_bad_features_are_refused_or_left_out_as_for_transformers(
    extract_config: Settings, installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(states: list[Tensor]) -> list[Tensor]:
        if engines[-1].ran > 120 and not spoilt:
            spoilt.append(states[0][3, 1].fill_(torch.inf))
        return states

    spoilt: list[Tensor] = []
    engines = pretend(monkeypatch, change=spoil)
    with pytest.raises(CacheError, match="a feature is not finite at layer 2, position 3"):
        extract(by_engine(extract_config, tmp_path / "refused"), Silent())
    spoilt.clear()
    extracted = extract(by_engine(extract_config, tmp_path / "cache", on_bad_features="skip"), Silent())
    assert extracted.num_skipped == 1 and verify_cache(tmp_path / "cache", Silent()) == []


ENGINE_SETTINGS: dict[str, tuple[Settings, set[str]]] = {
    "tensor_parallel_size": ({"tensor_parallel_size": 2}, {"engine.tensor_parallel_size"}),
    "quantization": ({"quantization": "fp8"}, {"engine.quantization"}),
    "kv_cache_dtype": ({"kv_cache_dtype": "fp8"}, {"engine.kv_cache_dtype"}),
    "engine_args": ({"engine_args": {"seed": 1}}, {"engine.args", "engine.args.seed"}),
    "prefix caching": ({"engine_args": {"enable_prefix_caching": False}}, {"engine.prefix_caching"}),
    "gpu_memory_utilization": ({"gpu_memory_utilization": 0.5}, set()),
}


@pytest.mark.parametrize("setting", ENGINE_SETTINGS)
def test_settings_of_the_engine_are_told_by_their_own_fields(
    setting: str, extract_config: Settings, installed: Path, tmp_path: Path
) -> None:
    changes, fields = ENGINE_SETTINGS[setting]
    plain, other = (
        open_inputs(by_engine(extract_config, tmp_path / "out", **more), Silent()).identity for more in ({}, changes)
    )
    assert {name for name, _, _ in differences(plain, other)} == fields


def test_a_cache_takes_no_shards_of_another_engine_or_release(
    cache: Path, extract_config: Settings, installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "engine" not in Manifest.read(cache).identity, "without it transformers is meant, as in older caches"
    with pytest.raises(MismatchError, match=r"engine.name .* cache: .absent.  now: vllm"):
        extract(by_engine(extract_config, cache), Silent())
    pretend(monkeypatch)
    extract(by_engine(extract_config, tmp_path / "cache"), Silent())
    with pytest.raises(MismatchError, match=r"engine.name .* cache: vllm  now: .absent"):
        extract(ExtractConfig(**extract_config, out=tmp_path / "cache"), Silent())
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.33.1\n")
    with pytest.raises(MismatchError, match=r"engine.version .* cache: 0.32.0  now: 0.33.1"):
        extract(by_engine(extract_config, tmp_path / "cache"), Silent())


def test_caches_of_two_engines_go_together_unless_one_quantized_the_target(
    cache: Path, extract_config: Settings, installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch)
    extract(by_engine(extract_config, tmp_path / "cache"), Silent())
    assert Corpus.open((cache, tmp_path / "cache")).engines() == ["transformers", "vllm 0.32.0"]
    other = made_otherwise(tmp_path / "cache", tmp_path / "other", set_field("identity/engine/quantization", "fp8"))
    with pytest.raises(MismatchError, match=r"quantization of the engine  first: None  other: fp8"):
        Corpus.open((cache, other))
    assert "vllm 0.32.0, which ran the target, fp8" in " ".join(dflash("inspect", other).stdout.split())
    rerun = RerunConfig(target=str(extract_config["target"]), samples=2)
    assert [fit.largest_error for fit in compare_with_target(other, rerun, Silent())] == 3 * [0.25]


def test_a_cache_of_either_is_compared_with_the_engine_that_runs_its_target_again(
    cache: Path, extract_config: Settings, installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines = pretend(monkeypatch)
    rerun = RerunConfig(target=str(extract_config["target"]), samples=10, engine="vllm")
    fits = compare_with_target(cache, rerun, Silent())
    assert [(fit.layer_id, fit.fault, fit.error < 5e-3) for fit in fits] == [(n, "", True) for n in (1, 2, 4)]
    assert (engines[0].named, engines[0].ran, engines[0].was_shut) == ([0, 1, 2, 3, 4, 5], 10, True)
    told = dflash("verify", cache, "--target", extract_config["target"], "--engine", "vllm", "--samples", 2)
    assert told.exit_code == 0 and "is sound" in told.stdout
    fp8 = made_otherwise(cache, tmp_path / "fp8", set_field("identity/engine", {"name": "vllm", "quantization": "fp8"}))
    assert [fit.largest_error for fit in compare_with_target(fp8, rerun, Silent())] == 3 * [0.02], "both quantize"
    pretend(monkeypatch, shift=1)
    fits = compare_with_target(cache, rerun, Silent())
    assert "layer 2 is off by -1: the target's layer 1 fits better" in fits[1].fault
    with pytest.raises(DflashError, match="engine_args holds max_model_len, which this program sets itself"):
        RerunConfig(target="t", engine="vllm", engine_args={"max_model_len": 3})


def test_final_states_are_compared_with_the_engines_last_layer_after_the_final_norm(
    extract_config: Settings, installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines = pretend(monkeypatch)
    extract(ExtractConfig(**extract_config | {"limit": 16, "final": True}, out=tmp_path / "cache"), Silent())
    rerun = RerunConfig(target=str(extract_config["target"]), samples=4, engine="vllm", engine_args={"seed": 1})
    fits = compare_with_target(tmp_path / "cache", rerun, Silent())
    assert [(fit.array, fit.layer_id, fit.fault) for fit in fits[3:]] == [(FINAL, 5, "")] and engines[0].named[-1] == 5
    assert fits[3].error < 5e-3


def test_what_is_not_installed_or_too_old_is_said(extract_config: Settings, installed: Path, tmp_path: Path) -> None:
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.11.0\n")
    with pytest.raises(DflashError, match=r"vLLM 0.11.0 is installed, and --engine vllm needs 0.32 or later"):
        extract(by_engine(extract_config, tmp_path / "cache"), Silent())
    (installed / "METADATA").unlink()
    installed.rmdir()
    with pytest.raises(DflashError, match=r"needs vLLM, which is not installed here. Install it: pip install"):
        extract(by_engine(extract_config, tmp_path / "cache"), Silent())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"tensor_parallel_size": 2}, "tensor_parallel_size is a setting of vllm, and the engine is transformers"),
        ({"engine_args": {"seed": 1}}, "engine_args is a setting of vllm"),
        ({"engine": "vllm", "engine_args": {"model": "x"}}, "engine_args holds model, which is the setting target"),
        ({"engine": "vllm", "engine_args": {"max_model_len": 9}}, "max_model_len, which is the setting max_length"),
        ({"engine": "vllm", "engine_args": {"kv_transfer_config": 1}}, "which this program sets itself"),
        ({"engine": "vllm", "engine_args": {"data_parallel_size": 2}}, "which no command supports; take tensor"),
        ({"engine": "vllm", "device_map": "auto"}, "device_map is a setting of transformers"),
        ({"engine": "vllm", "device": "cuda:1"}, "device is 'cuda:1', and vllm takes the first GPUs"),
        ({"engine": "vlm"}, "Did you mean vllm?"),
        ({"engine": "vllm", "gpu_memory_utilization": 1.5}, "above 0, and at most 1"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(
    settings: Settings, said: str, extract_config: Settings, tmp_path: Path
) -> None:
    with pytest.raises(DflashError, match=said.replace("?", r"\?")):
        ExtractConfig(**extract_config | settings, out=tmp_path)


@pytest.fixture
def too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a machine whose memory takes no target as transformers loads it."""
    monkeypatch.setattr(vllm, "usable_memory_bytes", lambda: 1000)


class Heard(Silent):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.said = ""

    def say(self, text: str) -> None:
        self.said += f"{text}\n"


@pytest.mark.usefixtures("too_large")
def test_a_target_that_transformers_cannot_hold_is_held_against_a_second_layout(
    cache: Path, extract_config: Settings, installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines, heard = pretend(monkeypatch), Heard()
    extract(by_engine(extract_config, tmp_path / "other"), heard)
    assert [(engine.named, engine.max_num_seqs) for engine in engines] == [([-1, 0, 1, 2, 3, 4, 5], 1), ([1, 2, 4], 3)]
    assert [engine.was_shut for engine in engines] == [True, True]
    for said in ("fits neither one GPU nor the host", "1000 B", "A fault of vLLM's that both layouts share would not"):
        assert said in heard.said
    assert "states are those of a second layout of vLLM to" in heard.said
    own, other = Cache.open(cache), Cache.open(tmp_path / "other")
    borrowed, others = (load_file(folder / TARGET / EMBEDDINGS) for folder in (cache, tmp_path / "other"))
    assert borrowed.keys() == others.keys() and all(torch.equal(borrowed[name], others[name]) for name in borrowed)
    assert other.usable().tolist() == own.usable().tolist()


def turned(state: Tensor) -> Tensor:
    """Return states whose first and last layer are exchanged, behind the embedding."""
    return state[:, [0, 6, *range(2, 6), 1]]


@pytest.mark.usefixtures("too_large")
@pytest.mark.parametrize(
    ("plant", "said"),
    [
        ({"shift": 1}, "what goes into layer 0 is not the embedding table's rows"),
        ({"scale": 2.0}, "what goes into layer 0 is not the embedding table's rows"),
        (
            {"change": lambda states: [torch.cat([s[:, :1], s[:, 1:].roll(1, 1)], 1) for s in states]},
            "leads to the token",
        ),
        ({"change": lambda states: [torch.cat([s[:, :2], s[:, 1:-1]], 1) for s in states]}, "layer 1 repeats layer 0"),
        (
            {"change": lambda states: swapped(states) if len(states) > 1 else states},
            "those that a second layout of vLLM",
        ),
    ],
)
def test_a_fault_that_shows_between_two_layouts_or_at_their_ends_is_refused(
    plant: Settings,
    said: str,
    extract_config: Settings,
    installed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engines = pretend(monkeypatch, **plant)
    with pytest.raises(DflashError, match=said):
        extract(by_engine(extract_config | {"limit": 12}, tmp_path / "cache"), Silent())
    assert all(engine.was_shut for engine in engines) and not (tmp_path / "cache").exists()


@pytest.mark.usefixtures("too_large")
def test_where_neither_transformers_nor_a_second_layout_can_prove_states_nothing_is_run(
    extract_config: Settings, installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines = pretend(monkeypatch)
    folder = tmp_path / "target"
    shutil.copytree(str(extract_config["target"]), folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"].to(torch.float8_e4m3fn)
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(DflashError, match=r"A second layout cannot prove them: .* is stored as torch.float8_e4m3fn"):
        extract(by_engine(extract_config | {"target": str(folder)}, tmp_path / "cache"), Silent())
    assert engines == []


def test_an_engine_loads_no_layer_behind_the_last_captured_one(extract_config: Settings, tmp_path: Path) -> None:
    def loaded(**changes: object) -> dict[str, object]:
        config = ExtractConfig(**extract_config | {"engine": "vllm"} | changes, out=tmp_path)
        arguments = states.engine_arguments(config, choose_target(config))
        return {name: arguments[name] for name in ("hf_overrides", "load_format") if name in arguments}

    cut = {"num_hidden_layers": 5, "layer_types": ["full_attention"] * 5}
    assert loaded() == {"hf_overrides": cut, "load_format": "dflash_first_layers"}
    own = {"hf_overrides": {"rope_theta": 1.0}}
    assert loaded(engine_args=own) == own and loaded(engine_args={"load_format": "dummy"}) == {"load_format": "dummy"}


def test_engines_take_groups_of_gpus_in_turn() -> None:
    groups = [list(gpus_of_engine("01234", 2, index)) for index in range(3)]
    assert groups == [["0", "1"], ["2", "3"], ["0", "1"]]
    with pytest.raises(DflashError, match="--tensor-parallel-size is 4, and there are 2 GPUs: 6, 7"):
        gpus_of_engine(["6", "7"], 4, 0)


def fill_shared_memory(path: str, place: int) -> None:
    SharedMemory(path).view(place, (2, 3), torch.bfloat16).fill_(1.5)


def test_shared_memory_is_another_processs_too_and_goes_with_its_users() -> None:
    memory = SharedMemory()
    begin = memory.grow(100)
    for place in (begin, memory.grow(10_000)):
        other = FORKING.Process(target=fill_shared_memory, args=(memory.path, place))
        other.start()
        other.join()
        assert other.exitcode == 0
        assert memory.view(place, (2, 3), torch.bfloat16).eq(1.5).all()
    assert not list(Path("/dev/shm").glob("*dflash*"))
    path, values = memory.path, memory.view(begin, (2, 3), torch.bfloat16)
    memory.close()
    memory.close()
    assert not Path(path).exists() and values.eq(1.5).all(), "a view outlives the memory's owner"
