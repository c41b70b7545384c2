"""A real vLLM runs the target of an extraction: the values that transformers gives, faults refused, nothing left."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from live_vllm import ended, environment, left_files, members, run_script, shared_files
from running import Settings

from dflash_offline.pipeline.demo import CONVERSATIONS, TARGET
from dflash_offline.schemas.settings.extract import ExtractConfig
from dflash_offline.schemas.settings.verify import RerunConfig
from dflash_offline.stages.capture.compare import compare_with_target
from dflash_offline.stages.extract import extract
from dflash_offline.stages.progress import Silent
from dflash_offline.stages.store.cache import Cache
from dflash_offline.stages.store.verify import verify_cache
from dflash_offline.stages.target.files import open_target

pytestmark = pytest.mark.vllm
NUM_ROWS = 3 * int(os.environ.get("DFLASH_VLLM_PROMPTS", "200"))
FEW = min(NUM_ROWS, 60)
KILLS = min(10, -(-NUM_ROWS // 60))
"""Of each kind."""
BATCH_TOKENS = 96
"""Less than most samples have, so that they are run in pieces."""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    data = tmp_path_factory.mktemp("data") / "chats.jsonl"
    data.write_text("".join(CONVERSATIONS.read_text().splitlines(keepends=True)[:NUM_ROWS]))
    return {"data": (data,), "target": str(TARGET), "block_size": 8, "shard_mib": 4, "batch_tokens": BATCH_TOKENS}


def by_vllm(config: Settings, out: Path) -> list[str]:
    """Return the command that extracts by vLLM."""
    assert isinstance(config["data"], tuple)
    words = [sys.executable, "-m", "dflash_offline.pipeline", "extract", *config["data"], "--out", out]
    for name, value in ({"engine": "vllm"} | config).items():
        if name != "data":
            words += [f"--{name.replace('_', '-')}"]
            words += [] if value is True else [json.dumps(value) if isinstance(value, dict) else value]
    return list(map(str, words))


def refuse_other_values(out: Path, other: Path) -> None:
    """Assert that two caches hold the same values up to what float32 moves and the layout makes of that."""
    own, made = Cache.open(out), Cache.open(other)
    refuse_other_array(own, made)
    if own.final is not None:
        refuse_other_array(own.require_final(), made.require_final())


def refuse_other_array(own: Cache, made: Cache) -> None:
    """Assert it of one array of both, and that it holds the same positions."""
    assert made.usable().tolist() == own.usable().tolist() == list(range(len(own.samples)))
    step = own.layout.features.expected_error or 2**-8
    for sample in own.usable().tolist():
        kept = own.stored(sample)
        np.testing.assert_array_equal(made.stored(sample), kept)
        np.testing.assert_array_equal(made.codes(sample)[~kept], own.codes(sample)[~kept])
        values, others = (cache.values(sample)[kept].astype(np.float64) for cache in (own, made))
        if own.layout.features.kind == "lossless":  # one step of bfloat16, or where that is less, what float32 moves
            moved = 2e-5 * np.abs(values).max(axis=-1, keepdims=True)
            assert (np.abs(values - others) <= np.maximum(2**-7 * np.abs(values), moved)).all()
        assert np.linalg.norm(values - others) < step * np.linalg.norm(values)


@pytest.mark.parametrize("layout", ["lossless", "rounded", "scaled"])
def test_vllm_makes_the_cache_that_transformers_makes(layout: str, config: Settings, tmp_path: Path) -> None:
    """Its final states are made with the others, or where the layout is rounded added to a cache without."""
    config = config | {"features": layout, "final": True} | ({} if layout == "lossless" else {"limit": FEW})
    extract(ExtractConfig(**config, out=tmp_path / "own"), Silent())
    for more in ({"final": True},) if layout != "rounded" else ({}, {"final": True}):
        command = by_vllm({name: config[name] for name in config if name != "final"} | more, tmp_path / "cache")
        done = subprocess.run(command, env=environment(), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        assert "vLLM's states are those of transformers to" in done.stderr
    assert verify_cache(tmp_path / "cache", Silent()) == []
    refuse_other_values(tmp_path / "own", tmp_path / "cache")
    fits = compare_with_target(tmp_path / "cache", RerunConfig(target=str(TARGET), samples=8), Silent())
    assert [fit.fault for fit in fits] == [""] * len(fits)


def scripted(
    folder: Path, config: Settings, out: Path, plant: str | None, *, too_large: bool = False
) -> dict[str, Any]:
    assert isinstance(config["data"], tuple)
    job = {"config": config | {"data": list(map(str, config["data"])), "out": str(out)}, "plant": plant}
    job |= {"too_large": too_large}
    (folder / "job.json").write_text(json.dumps(job))
    return run_script(
        Path(__file__).with_name("vllm_extract.py"), folder / "job.json", folder / "result.json", env=environment()
    )


def test_raw_states_are_transformers_in_float32_in_pieces_and_from_cached_prefixes(
    config: Settings, tmp_path: Path
) -> None:
    """The final states too, which our own norm makes of the last layer's."""
    config = config | {"engine_args": {"block_size": 32}}  # so that most of a sample is whole blocks, which are cached
    config |= {"final": True}
    extract(ExtractConfig(**config | {"engine_args": {}}, out=tmp_path / "own"), Silent())
    found = scripted(tmp_path, config, tmp_path / "own", None)
    assert found["samples"] >= 0.9 * NUM_ROWS
    assert found["cached"] > 0.5 * Cache(tmp_path / "own").samples.num_tokens.sum()
    assert found["largest"] < 2e-5


@pytest.mark.parametrize(
    ("plant", "said"),
    [
        ("shift", "layer 1 is off by +1: the target's layer 2 fits better"),
        ("swapped", "they are those of sample"),
        ("padded", "one at a time: sample 0 has other states"),
        ("cached", "to 15"),
        ("early", "layer {last} is off by -1: the target's layer {before} fits better"),
        ("norm", "one at a time: the final state differs from the target's by"),
    ],
)
def test_a_fault_of_vllm_is_refused_before_anything_is_written(
    plant: str, said: str, config: Settings, tmp_path: Path
) -> None:
    last = open_target(str(TARGET)).num_layers - 1
    found = scripted(tmp_path, config | {"limit": FEW, "final": plant in ("early", "norm")}, tmp_path / "cache", plant)
    assert found["refused"] is not None and said.format(last=last, before=last - 1) in found["refused"]
    assert not (tmp_path / "cache").exists()


def test_a_target_too_large_for_transformers_is_proved_by_a_second_layout(config: Settings, tmp_path: Path) -> None:
    config = config | {"limit": FEW, "final": True}
    extract(ExtractConfig(**config, out=tmp_path / "own"), Silent())
    assert scripted(tmp_path, config, tmp_path / "cache", None, too_large=True)["refused"] is None
    refuse_other_values(tmp_path / "own", tmp_path / "cache")


@pytest.mark.parametrize(
    ("plant", "said"),
    [
        ("padded", "vLLM's states are not those that a second layout of vLLM gives"),
        ("shared", "what goes into layer 0 is not the embedding table's rows"),
    ],
)
def test_a_fault_of_one_layout_or_of_both_is_refused(plant: str, said: str, config: Settings, tmp_path: Path) -> None:
    """A second layout's workers are other processes, where a fault that is planted here alone does not show."""
    found = scripted(tmp_path, config | {"limit": FEW, "final": True}, tmp_path / "cache", plant, too_large=True)
    assert found["refused"] is not None and said in found["refused"]
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("victim", ["command", "engine", "worker"])
def test_killed_at_any_time_it_leaves_nothing_and_goes_on(victim: str, config: Settings, tmp_path: Path) -> None:
    """The command alone is killed; it, in which the engine is, with workers beside it; or one of these workers."""
    config = config | {"shard_mib": 1, "limit": min(NUM_ROWS, 20 * KILLS)}
    extract(ExtractConfig(**config, out=tmp_path / "own"), Silent())
    config |= {"tensor_parallel_size": 1 if victim == "command" else 2}
    out, chance, start_s = tmp_path / "cache", random.Random(victim), 0.0
    signals = [signal.SIGKILL] * KILLS + ([signal.SIGTERM, signal.SIGINT] if victim != "worker" else [])
    for turn, number in enumerate(signals):
        records, began = num_records(out), time.monotonic()
        process = subprocess.Popen(
            by_vllm(config, out), env=environment(), start_new_session=True, stderr=subprocess.PIPE, text=True
        )
        if turn % 2:  # while it starts; it may start sooner than the last time
            until = began + chance.random() * start_s
            while time.monotonic() < until and num_records(out) == records:
                time.sleep(0.01)
            while victim == "worker" and process.poll() is None and not workers_of(process.pid):
                time.sleep(0.01)
        else:  # while it writes
            while process.poll() is None and num_records(out) == records:
                time.sleep(0.01)
            start_s = time.monotonic() - began
            time.sleep(chance.random() * 0.2)
        assert process.poll() is None, process.communicate()[1]
        held = shared_files(process.pid)
        if victim == "worker":
            os.kill(chance.choice(workers_of(process.pid)), number)
        elif number == signal.SIGINT:
            os.killpg(process.pid, number)  # as a terminal does
        else:
            os.kill(process.pid, number)
        said = process.communicate(timeout=600)[1]
        print(f"{victim} {turn}: {time.monotonic() - began:.1f} s, {num_records(out)} records, {sorted(held)}")
        assert ended(process.pid) and not left_files(held), (members(process.pid), held)
        assert "Traceback" not in of_the_command(said), said
        if victim == "worker":
            assert process.returncode == 1 and ("engine stopped" in said or "does not start with" in said), said
        assert num_records(out) == 0 or num_records(out) < Cache(out).layout.num_shards, f"whole by turn {turn}"
    done = subprocess.run(by_vllm(config, out), env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert verify_cache(out, Silent()) == []
    refuse_other_values(tmp_path / "own", out)


def of_the_command(said: str) -> str:
    """Return what the command itself said: vLLM's processes log their own ends, line by line with their names."""
    return "\n".join(line for line in said.splitlines() if not line.startswith("(Worker"))


def num_records(out: Path) -> int:
    """Return how many shards of a cache are finished."""
    return len(list(out.glob("commits/*.json")))


def workers_of(session: int) -> list[int]:
    """Return the processes of vLLM's workers in a session."""
    return sorted(pid for pid in members(session) if "VLLM::Worker" in name_of(pid))


def name_of(pid: int) -> str:
    """Return what a process calls itself."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text()
    return ""


def test_what_vllm_cannot_run_is_said_in_a_message(config: Settings, tmp_path: Path) -> None:
    for more, variables, said in (
        ({"engine_args": {"no_such_argument": 1}}, {}, "no_such_argument"),
        ({"quantization": "no-such-kind"}, {}, "no-such-kind"),
        ({}, {"VLLM_CPU_KVCACHE_SPACE": "100000"}, "lower --batch-tokens"),
    ):
        command = by_vllm(config | more, tmp_path / "cache")
        done = subprocess.run(command, env=environment(**variables), capture_output=True, text=True)
        assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr[-3000:]
        assert "does not start with" in done.stderr and said in done.stderr
    assert not (tmp_path / "cache").exists()
