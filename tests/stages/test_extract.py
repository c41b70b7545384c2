"""Stage one against the target's own hidden states, interrupted in every way."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from cache_files import content
from processes import Command, children, forked, is_running, run
from running import Settings, arguments, command
from tiny_target import save_conversations
from transformers import AutoModelForCausalLM, GemmaConfig, GemmaForCausalLM

from dflash_offline.schemas.commits import commit_path
from dflash_offline.schemas.errors import CacheError, DflashError, MismatchError, UnsupportedTargetError
from dflash_offline.schemas.locks import ABANDONED_S
from dflash_offline.schemas.samples import SampleTable
from dflash_offline.schemas.settings.extract import ExtractConfig
from dflash_offline.stages.capture.create import create_cache
from dflash_offline.stages.capture.inputs import open_inputs
from dflash_offline.stages.capture.runner import micro_batches, pad_sequences
from dflash_offline.stages.extract import extract, plan_only
from dflash_offline.stages.progress import Silent
from dflash_offline.stages.stop import STOPS
from dflash_offline.stages.store.cache import Cache
from dflash_offline.stages.store.codec import NAN
from dflash_offline.stages.store.verify import verify_cache
from dflash_offline.stages.target import model as loading
from dflash_offline.stages.target.files import open_target
from dflash_offline.stages.target.model import capture_layers, layer_states, load_model

ZARR_READER = """
import sys, json
sys.modules["dflash_offline"] = None
import numpy as np, zarr
group = zarr.open_group(sys.argv[1] + "/features.zarr", mode="r")
hidden = group["hidden_states"]
np.savez(sys.argv[2], hidden=hidden[:], ids=group["input_ids"][:], mask=group["loss_mask"][:],
         layers=hidden.attrs["target_layer_ids"])
"""


def test_plain_zarr_gives_the_targets_hidden_states(cache: Path, target: Path, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", ZARR_READER, str(cache), str(tmp_path / "a.npz")], check=True, cwd=tmp_path)
    arrays = np.load(tmp_path / "a.npz")
    samples = Cache.open(cache).samples
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    for sample in range(0, len(samples), 7):
        slots = slice(samples.start[sample], samples.start[sample] + samples.num_tokens[sample])
        np.testing.assert_array_equal(arrays["ids"][slots], samples.input_ids(sample))
        np.testing.assert_array_equal(arrays["mask"][slots], samples.loss_mask(sample))
        ids = torch.from_numpy(arrays["ids"][slots].astype(np.int64))[None]
        with torch.no_grad():
            states = model(ids, output_hidden_states=True).hidden_states
        expected = torch.stack([states[layer + 1][0] for layer in arrays["layers"].tolist()], dim=1)
        stored = torch.from_numpy(arrays["hidden"][slots].view(np.int16)).view(torch.bfloat16).float()
        torch.testing.assert_close(stored, expected, rtol=2**-8, atol=1e-5)


def test_slots_between_samples_hold_nan_and_no_shard_file_is_missing(cache: Path) -> None:
    reader = Cache.open(cache)
    layout = reader.manifest.layout
    assert layout.num_shards >= 3
    names = sorted(int(p.name) for p in (cache / "features.zarr/hidden_states/c").iterdir())
    assert names == list(range(layout.num_shards))
    import zarr

    hidden = zarr.open_group(str(cache / "features.zarr"), mode="r")["hidden_states"]
    end = int(reader.samples.start[0] + reader.samples.num_tokens[0])
    assert isinstance(hidden, zarr.Array)
    gap = np.asarray(hidden[end : int(reader.samples.start[1])])
    assert (gap == NAN).all()


def test_our_reader_equals_zarr_and_reads_chosen_layers(cache: Path) -> None:
    reader = Cache.open(cache)
    whole = reader.codes(3)
    np.testing.assert_array_equal(reader.codes(3, [2, 0]), whole[:, [2, 0]])


def test_capture_sees_layer_outputs_before_the_final_norm(target: Path) -> None:
    files = open_target(str(target))
    model = load_model(files, dtype=torch.float32, device=torch.device("cpu"))
    ids = torch.arange(20)[None]
    with torch.no_grad(), capture_layers(model, [0, 4, 5]) as captured:
        states = model(ids, output_hidden_states=True).hidden_states
    torch.testing.assert_close(captured[0], states[1], rtol=0, atol=0)
    torch.testing.assert_close(captured[1], states[5], rtol=0, atol=0)
    torch.testing.assert_close(model.get_decoder().norm(captured[2]), states[6], rtol=0, atol=0)


def test_micro_batches_hold_every_sample_once_and_keep_to_the_budget(cache: Path) -> None:
    samples = Cache.open(cache).samples
    for least in (True, False):
        batches = micro_batches(samples, np.arange(len(samples)), 700, least=least)
        assert sorted(np.concatenate(batches).tolist()) == list(range(len(samples)))
        assert all(len(batch) * samples.num_tokens[batch].max() <= 700 for batch in batches if len(batch) > 1)


def test_micro_batches_are_those_of_the_least_work_and_a_larger_budget_never_makes_more() -> None:
    def least(lengths: tuple[int, ...], budget: int) -> int:
        """Try every way to cut descending lengths into groups."""
        works = [0] if not lengths else []
        for count in range(1, len(lengths) + 1):
            if count == 1 or count * lengths[0] <= budget:
                works.append(512 + count * lengths[0] + least(lengths[count:], budget))
        return min(works)

    chance = np.random.default_rng(0)
    for _ in range(20):
        lengths = chance.integers(16, 3000, chance.integers(1, 11)).astype(np.int64)
        samples, before = cast(SampleTable, SimpleNamespace(num_tokens=lengths)), None
        for budget in (1000, 4096, 8192, 20_000):
            groups = [lengths[group] for group in micro_batches(samples, np.arange(len(lengths)), budget, least=True)]
            work = sum(512 + len(group) * int(group.max()) for group in groups)
            assert work == least(tuple(sorted(lengths.tolist(), reverse=True)), budget) and work <= (before or work)
            before = work


def test_a_cache_of_an_older_version_goes_on_in_its_order_and_its_micro_batches(
    extract_config: Settings, tmp_path: Path
) -> None:
    config = ExtractConfig(**extract_config | {"batch_tokens": 300, "out": tmp_path / "older"})
    inputs = open_inputs(config, Silent())
    layout = {name: value for name, value in inputs.identity["layout"].items() if name != "order"}
    runner = create_cache(replace(inputs, identity={**inputs.identity, "layout": layout}), Silent())
    assert plan_only(config, Silent())[0].samples.row.tolist() == list(range(1, 81))
    extract(config, Silent())
    cache = Cache.open(config.out)
    samples = cache.samples
    assert samples.row.tolist() == list(range(1, 81))
    for shard in range(cache.layout.num_shards):
        left = sorted(samples.samples_of_shard(shard).tolist(), key=lambda sample: -samples.num_tokens[sample])
        while left:
            longest = int(samples.num_tokens[left[0]])
            batch, left = left[: max(1, 300 // longest)], left[max(1, 300 // longest) :]
            states = layer_states(runner.model, torch.from_numpy(pad_sequences(samples, np.array(batch))), [1, 2, 4])
            for place, sample in enumerate(batch):
                real = torch.stack([state[place, : samples.num_tokens[sample]] for state in states], dim=1)
                assert np.array_equal(cache.values(sample), real.bfloat16().float().numpy())


def test_the_same_command_again_does_nothing(cache: Path, extract_config: Settings) -> None:
    before = {path: path.stat().st_mtime_ns for path in cache.rglob("*") if path.is_file()}
    assert extract(ExtractConfig(**extract_config, out=cache), Silent()).shards_written == 0
    assert before == {path: path.stat().st_mtime_ns for path in cache.rglob("*") if path.is_file()}


def test_what_another_machine_left_of_a_plan_is_named_and_removed_after_an_hour(
    cache: Path, extract_config: Settings, tmp_path: Path
) -> None:
    config = ExtractConfig(**extract_config, out=shutil.copytree(cache, tmp_path / "cache"))
    left = tmp_path / ".cache.building-elsewhere-7-x"
    left.mkdir()
    said: list[str] = []

    class Listening(Silent):
        def say(self, text: str) -> None:
            said.append(text)

    extract(config, Listening())
    assert left.exists() and any(text.startswith(f"{left} stays") for text in said)
    hour_ago = left.stat().st_mtime - ABANDONED_S - 60
    os.utime(left, (hour_ago, hour_ago))
    extract(config, Silent())
    assert not left.exists()


def test_killed_at_random_instants_it_resumes_to_the_same_bytes(
    cache: Path, extract_config: Settings, tmp_path: Path
) -> None:
    out, chance = tmp_path / "cache", random.Random(0)
    total, finished, kills = Cache.open(cache).manifest.layout.num_shards, 0, 0
    for _ in range(40):
        process = Command(arguments(extract_config, out))
        deadline = time.monotonic() + 60
        # Wait until the cache is being filled, so that kills land in the work and not in what comes before.
        while process.poll() is None and time.monotonic() < deadline and not _more_commits(out, finished):
            time.sleep(0.002)
        time.sleep(chance.random() * 0.02)
        process.send_signal(signal.SIGKILL)
        kills += process.wait()[0] == -signal.SIGKILL
        finished = _commits(out)
        if kills >= 4:
            break
        if finished == total:  # it came through: begin anew
            shutil.rmtree(out)
            finished = 0
    assert kills >= 4
    assert run(arguments(extract_config, out))[0] == 0
    assert content(out) == content(cache)
    assert list((out / "tmp").iterdir()) == []


def _commits(out: Path) -> int:
    return len(list((out / "commits").glob("*.json"))) if out.exists() else 0


def _more_commits(out: Path, finished: int) -> bool:
    return _commits(out) > finished


def test_two_starts_at_once_share_the_work(cache: Path, extract_config: Settings, tmp_path: Path) -> None:
    out = tmp_path / "cache"
    both = [Command(arguments(extract_config, out)) for _ in range(2)]
    for process in both:
        code, said = process.wait()
        assert code == 0, said
    assert content(out) == content(cache)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache"]


@pytest.mark.parametrize(
    ("number", "workers"),
    [
        (signal.SIGINT, 1),
        (signal.SIGTERM, 1),
        pytest.param(signal.SIGTERM, 2, marks=pytest.mark.slow),
        pytest.param(signal.SIGHUP, 2, marks=pytest.mark.slow),
    ],
)
def test_a_signal_ends_all_of_it_within_seconds_and_says_how_to_go_on(
    number: signal.Signals, workers: int, extract_config: Settings, tmp_path: Path
) -> None:
    out, many = tmp_path / "cache", save_conversations(tmp_path / "many.jsonl", 1000)
    config = extract_config | {"data": (many,)}  # work enough that the signal comes in the middle of it
    process = Command([*arguments(config, out), "--workers", str(workers)])
    while process.poll() is None and not _commits(out):
        time.sleep(0.005)
    assert process.process.pid is not None
    started = children(process.process.pid)
    assert len(started) >= (workers if workers > 1 else 0)
    process.send_signal(number)
    code, said = process.wait(timeout_s=5)
    assert code == 128 + number and _commits(out), said
    assert "Finished shards are kept; repeat the command" in said and "Traceback" not in said
    assert not any(map(is_running, started))
    assert all(fault.missing for fault in verify_cache(out, Silent()))


@pytest.mark.slow
def test_a_ctrl_c_in_the_terminal_is_heard_by_the_command_alone(extract_config: Settings, tmp_path: Path) -> None:
    out, many = tmp_path / "cache", save_conversations(tmp_path / "many.jsonl", 1000)
    line = [*command(extract_config | {"data": (many,)}, out), "--workers", "2"]
    process = subprocess.Popen(line, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while process.poll() is None and not _commits(out):
        time.sleep(0.005)
    workers = [pid for pid in children(process.pid) if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text()]
    assert len(workers) == 2 and all(held_back(pid) >= {*STOPS} for pid in workers)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, said = process.communicate(timeout=20)
    assert process.returncode == 130 and said.count("Finished shards are kept; repeat the command") == 1
    assert "Traceback" not in said, said
    assert not any(map(is_running, workers))


def held_back(pid: int) -> set[int]:
    """Return the numbers of the signals that a process's main thread has blocked."""
    words = Path(f"/proc/{pid}/status").read_text().split()
    mask = int(words[words.index("SigBlk:") + 1], 16)
    return {number for number in range(1, 65) if mask >> (number - 1) & 1}


def damaged(cache: Path, tmp_path: Path, harm: Callable[[Path], None]) -> Path:
    copy = tmp_path / "copy"
    shutil.copytree(cache, copy)
    harm(copy)
    return copy


def _remove_shard(copy: Path) -> None:
    (copy / "features.zarr/hidden_states/c/1/0/0").unlink()


def _cut_shard(copy: Path) -> None:
    path = copy / "features.zarr/hidden_states/c/1/0/0"
    path.write_bytes(path.read_bytes()[:-10])


def _spoil_record(copy: Path) -> None:
    path = copy / "commits/000001.json"
    path.write_text(path.read_text().replace('"num_tokens": ', '"num_tokens": 1'))


@pytest.mark.parametrize("harm", [_remove_shard, _cut_shard, _spoil_record])
def test_a_broken_shard_is_redone_alone(
    cache: Path, extract_config: Settings, tmp_path: Path, harm: Callable[[Path], None]
) -> None:
    copy = damaged(cache, tmp_path, harm)
    assert extract(ExtractConfig(**extract_config, out=copy), Silent()).shards_written == 1
    assert content(copy) == content(cache)


def test_a_moved_but_equal_input_is_no_difference(
    cache: Path, extract_config: Settings, data: Path, target: Path, tmp_path: Path
) -> None:
    moved = shutil.copy(data, tmp_path / "elsewhere.jsonl")
    copy = shutil.copytree(target, tmp_path / "target")
    config = ExtractConfig(**extract_config | {"data": (Path(moved),), "target": str(copy)}, out=cache)
    assert extract(config, Silent()).shards_written == 0


def test_a_folder_with_something_else_is_refused_and_left_alone(extract_config: Settings, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(DflashError, match="is not a feature cache"):
        extract(ExtractConfig(**extract_config, out=tmp_path), Silent())
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_features_that_are_not_finite_are_refused_with_sample_layer_and_position(
    target: Path, extract_config: Settings, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    model.model.layers[2].mlp.down_proj.weight.data[3] = float("inf")
    broken = shutil.copytree(target, tmp_path / "broken")
    model.save_pretrained(broken)
    with pytest.raises(CacheError, match=r"Sample 0 \(chats.jsonl:\d+\): .* not finite at layer 2, position 0"):
        extract(ExtractConfig(**extract_config | {"target": str(broken)}, out=tmp_path / "cache"), Silent())
    assert _commits(tmp_path / "cache") == 0


def test_a_dead_layer_is_refused(target: Path, extract_config: Settings, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    model.model.embed_tokens.weight.data.zero_()
    broken = shutil.copytree(target, tmp_path / "broken")
    model.save_pretrained(broken)
    with pytest.raises(CacheError, match="the layer is dead"):
        extract(ExtractConfig(**extract_config | {"target": str(broken)}, out=tmp_path / "cache"), Silent())


def test_a_target_whose_embeddings_are_not_finite_is_refused(
    target: Path, extract_config: Settings, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    model.model.embed_tokens.weight.data[299, 5] = float("nan")  # of a token that no conversation holds
    folder = shutil.copytree(target, tmp_path / "broken")
    model.save_pretrained(folder)
    with pytest.raises(UnsupportedTargetError, match=r"row 299 of embed_tokens\.weight holds a value that is not"):
        extract(ExtractConfig(**extract_config | {"target": str(folder)}, out=tmp_path / "cache"), Silent())
    assert not (tmp_path / "cache").exists()


def test_a_target_with_scaled_embeddings_is_refused_by_name(
    target: Path, extract_config: Settings, tmp_path: Path
) -> None:
    folder = shutil.copytree(target, tmp_path / "gemma")
    config = GemmaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=304,
        num_hidden_layers=6,
    )
    GemmaForCausalLM(config).save_pretrained(folder)
    with pytest.raises(UnsupportedTargetError, match="raw embedding rows"):
        extract(ExtractConfig(**extract_config | {"target": str(folder)}, out=tmp_path / "cache"), Silent())
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_file_size_limit_gives_a_clear_error_and_a_resumable_cache(
    cache: Path, extract_config: Settings, tmp_path: Path, workers: int
) -> None:
    out = tmp_path / "cache"
    code, said = run([*arguments(extract_config, out), "--workers", str(workers)], most_file_bytes=200 << 10)
    assert code == 1 and f"{out}/tmp/" in said and "File too large" in said and "Traceback" not in said, said
    assert "`ulimit -f`" in said and "repeat" in said
    assert run(arguments(extract_config, out))[0] == 0
    assert content(out) == content(cache)


def test_a_damaged_plan_is_refused(cache: Path, extract_config: Settings, tmp_path: Path) -> None:
    copy = damaged(cache, tmp_path, lambda c: (c / "samples.parquet").write_bytes(b"x"))
    with pytest.raises(CacheError, match=r"samples\.parquet has 1 bytes"):
        extract(ExtractConfig(**extract_config, out=copy), Silent())
    with pytest.raises(CacheError, match=r"samples\.parquet"):
        Cache.open(copy)


def test_the_manifest_records_what_made_the_cache(cache: Path) -> None:
    manifest = json.loads((cache / "manifest.json").read_text())
    assert manifest["identity"]["layer_ids"] == [1, 2, 4]
    assert manifest["plan"]["mask_token_id"] == 3 and manifest["plan"]["formats"] == {"jsonl, messages": 80}
    chosen = {"input_format", "limit", "weights", "seed", "drop_duplicates", "keep_special_tokens"}
    assert not chosen & set(manifest["identity"])  # a default adds no field, so that older caches can be continued
    assert set(manifest["files"]) >= {"samples.parquet", "rejects.parquet", "features.zarr/zarr.json"}
    assert "target/embeddings.safetensors" in manifest["files"] and "target/tokenizer.json" in manifest["files"]


def test_other_end_tokens_are_another_target(
    cache: Path, extract_config: Settings, target: Path, tmp_path: Path
) -> None:
    other = shutil.copytree(target, tmp_path / "target")
    path = other / "generation_config.json"
    settings = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(settings | {"eos_token_id": [2, 5]}))
    with pytest.raises(MismatchError, match=r"target\.end_ids"):
        extract(ExtractConfig(**extract_config | {"target": str(other)}, out=cache), Silent())
    path.write_text("{")
    with pytest.raises(DflashError, match=r"generation_config\.json is not JSON"):
        extract(ExtractConfig(**extract_config | {"target": str(other)}, out=cache), Silent())


def test_a_bad_row_that_reads_like_a_fault_of_the_system_is_told_as_a_bad_row(
    extract_config: Settings, tmp_path: Path
) -> None:
    data = tmp_path / "chats.jsonl"
    data.write_text(json.dumps({"messages": [{"role": "error code: 12", "content": "a"}]}) + "\n")
    code, said = run(arguments(extract_config | {"data": (data,)}, tmp_path / "cache"))
    assert code == 1 and "chats.jsonl:1" in said and "'error code: 12'" in said, said
    assert "memory" not in said and "Traceback" not in said, said


@pytest.mark.parametrize("kib", [20, 100])
def test_a_disk_that_fills_before_the_first_shard_is_told(extract_config: Settings, tmp_path: Path, kib: int) -> None:
    code, said = run(arguments(extract_config, tmp_path / "cache"), most_file_bytes=kib << 10)
    assert code == 1 and "File too large" in said and "Traceback" not in said, said


@pytest.mark.slow
def test_a_cache_on_a_file_system_that_became_read_only_is_told_and_resumed_later(
    cache: Path, extract_config: Settings, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(cache, tmp_path / "cache"))
    commit_path(out, 1).unlink()
    before = content(out)
    unshare = ["unshare", "--mount"] if os.getuid() == 0 else ["unshare", "--mount", "--map-root-user"]
    read_only = [*unshare, "sh", "-ec", 'mount --bind "$0" "$0"; mount -o remount,bind,ro "$0"; exec "$@"', str(out)]
    if shutil.which("unshare") is None or subprocess.run([*read_only, "true"], capture_output=True).returncode:
        pytest.skip("nothing can be mounted here, not even in a namespace of its own")
    done = subprocess.run([*read_only, *command(extract_config, out)], capture_output=True, text=True)
    assert done.returncode == 1 and "Read-only file system" in done.stderr and "Traceback" not in done.stderr
    assert content(out) == before
    assert extract(ExtractConfig(**extract_config, out=out), Silent()).shards_written == 1
    assert content(out) == content(cache)


@pytest.mark.parametrize("device", ["mps", "meta", "cuda:9"])
def test_other_devices_are_refused(extract_config: Settings, tmp_path: Path, device: str) -> None:
    with pytest.raises(DflashError, match="device is"):
        extract(ExtractConfig(**extract_config | {"device": device}, out=tmp_path / "cache"), Silent())


def test_the_target_is_gone_before_workers_load_it_though_its_hooks_hold_it(
    cache: Path, extract_config: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load, loaded, started = loading.load_model, list[weakref.ref[torch.nn.Parameter]](), list[bool]()

    def with_hooks(*arguments: Any, **settings: Any) -> Any:
        model = load(*arguments, **settings).apply(lambda module: add_hook_to_module(module, ModelHook()))
        loaded.append(weakref.ref(next(model.parameters())))
        return model

    def workers_start(method: str) -> Any:
        started.append(all(weights() is None for weights in loaded))
        return forked(method)

    monkeypatch.setattr(loading, "load_model", with_hooks)
    monkeypatch.setattr("multiprocessing.get_context", workers_start)
    done = extract(ExtractConfig(**extract_config, out=tmp_path / "cache", workers=2), Silent())
    assert len(loaded) == 1 and started and all(started)
    assert content(done.cache) == content(cache)
