"""The array `final` against the target's own last hidden state, made with the taps and added to a cache without it."""

import hashlib
import json
import random
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from processes import Command
from running import Settings, arguments, dflash
from transformers import AutoModelForCausalLM

from dflash_offline.schemas.commits import commit_path
from dflash_offline.schemas.errors import CacheError, DflashError, MismatchError
from dflash_offline.schemas.manifest import FINAL, FINAL_MANIFEST, FINAL_METADATA, FinalDocument, shard_files
from dflash_offline.schemas.settings.extract import ExtractConfig
from dflash_offline.stages.capture import runner
from dflash_offline.stages.capture.encode import FeatureEncoder
from dflash_offline.stages.capture.final import add_final
from dflash_offline.stages.extract import extract
from dflash_offline.stages.progress import Silent
from dflash_offline.stages.store.cache import Cache
from dflash_offline.stages.store.codec import NAN
from dflash_offline.stages.store.verify import verify_cache


def hashes(cache: Path) -> dict[str, str]:
    """Return the sha256 of each file of a cache but its records, which hold times."""
    files = [path for path in cache.rglob("*") if path.is_file() and path.parent.name != "commits"]
    return {str(path.relative_to(cache)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_final_is_the_last_hidden_state_where_the_next_token_is_supervised_and_fill_elsewhere(
    cache_with_final: Path, target: Path
) -> None:
    cache = Cache.open(cache_with_final)
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    final = cache.require_final()
    assert final.usable().tolist() == cache.usable().tolist()
    codes = np.asarray(zarr.open_group(cache_with_final / "features.zarr", mode="r")["final"][:])
    assert codes.shape == (cache.layout.num_slots, cache.layout.hidden_size) and codes.dtype == np.uint16
    is_free = np.ones(len(codes), np.bool_)
    for sample in range(len(cache.samples)):
        ids, mask = cache.samples.tokens.of(sample)
        with torch.no_grad():
            states = model.model(torch.from_numpy(ids.astype(np.int64))[None]).last_hidden_state[0]
        read = [p for p in range(len(ids) - 1) if mask[p + 1]]
        assert np.flatnonzero(final.stored(sample)).tolist() == read
        values = torch.from_numpy(final.values(sample)[:, 0])
        torch.testing.assert_close(values[read], states[read], rtol=2**-8, atol=1e-5)
        begin = int(cache.samples.start[sample])
        np.testing.assert_array_equal(codes[begin : begin + len(ids)], final.codes(sample)[:, 0])
        is_free[[begin + p for p in read]] = False
    assert (codes[is_free] == NAN).all() and is_free.any()


def test_final_states_widen_as_features_do_and_survive_pickling(cache_with_final: Path) -> None:
    import pickle

    final = pickle.loads(pickle.dumps(Cache.open(cache_with_final).require_final()))
    codes, kept = final.codes(3), final.stored(3)
    widened = FeatureEncoder(final.codec).widen(torch.from_numpy(codes.view(np.int16)), [0])[:, 0]
    np.testing.assert_array_equal(widened.float().numpy()[kept], final.values(3)[kept, 0])
    assert widened[torch.from_numpy(~kept)].isnan().all()


def test_a_cache_extracted_with_final_is_the_one_without_but_for_that_array(
    cache_with_final: Path, cache: Path
) -> None:
    mine = {name: digest for name, digest in hashes(cache_with_final).items() if "final" not in name}
    assert mine == hashes(cache)


def test_final_states_added_later_are_those_extracted_at_once_and_no_tap_is_written_again(
    extract_config: Settings, cache_with_final: Path, cache: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "cache"
    shutil.copytree(cache, copy)
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*") if path.is_file()}
    with pytest.raises(CacheError, match=r"has no final states.*--final"):
        Cache.open(copy).require_final()
    done = extract(ExtractConfig(**extract_config, out=copy, final=True), Silent())
    assert done.shards_written == done.num_shards
    assert hashes(copy) == hashes(cache_with_final)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    again = extract(ExtractConfig(**extract_config, out=copy, final=True), Silent())
    assert again.shards_written == 0
    without = extract(ExtractConfig(**extract_config, out=copy), Silent())
    assert without.shards_written == 0 and hashes(copy) == hashes(cache_with_final)


@pytest.mark.parametrize(
    ("features", "mantissa_bits", "kept"), [("scaled", 4, 4), ("rounded", 5, 5), ("rounded", 2, 4)]
)
def test_final_states_of_coarse_features_keep_four_mantissa_bits(
    extract_config: Settings, cache_with_final: Path, tmp_path: Path, features: str, mantissa_bits: int, kept: int
) -> None:
    settings = extract_config | {"features": features, "mantissa_bits": mantissa_bits, "limit": 20}
    extract(ExtractConfig(**settings, out=tmp_path / "cache", final=True), Silent())
    made, exact = Cache.open(tmp_path / "cache"), Cache.open(cache_with_final).require_final()
    assert made.layout.features.kind == features and made.require_final().layout.features.mantissa_bits == kept
    for sample in range(len(made.samples)):
        same = next(s for s in range(len(exact.samples)) if exact.samples.row[s] == made.samples.row[sample])
        stored, own = made.stored(sample), made.require_final().stored(sample)
        assert stored.all() and own.any()
        found, wanted = made.require_final().values(sample)[own, 0], exact.values(same)[own, 0]
        np.testing.assert_allclose(found, wanted, rtol=1.01 * 2.0 ** -(kept + 1), atol=1e-30)
        assert ((made.require_final().codes(sample)[own] & ((1 << 7 - kept) - 1)) == 0).all()


@pytest.fixture
def copied(cache_with_final: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(cache_with_final, tmp_path / "cache"))


def test_a_flipped_byte_is_found_and_only_those_final_states_are_done_again(
    extract_config: Settings, cache_with_final: Path, copied: Path
) -> None:
    name = shard_files(1, FINAL)[0]
    path = copied / name
    flipped = bytearray(path.read_bytes())
    flipped[200] ^= 1
    path.write_bytes(flipped)
    (fault,) = verify_cache(copied, Silent())
    assert (fault.place, fault.shard, fault.array) == (name, 1, FINAL)
    assert "another sha256" in fault.what and "Sample" in fault.what
    final = Cache.open(copied).require_final()
    with pytest.raises(CacheError, match=name):
        for sample in final.samples.samples_of_shard(1).tolist():
            final.codes(sample)
    said = dflash("verify", copied, "--repair")
    assert said.exit_code == 1 and "Forgot shards 1" in said.stdout and "with --final" in said.stdout
    assert commit_path(copied, 1).exists() and not commit_path(copied, 1, FINAL).exists()
    Cache.open(copied).require_complete()  # to who asks for hidden states nothing is wrong
    with pytest.raises(CacheError, match=r"1 of .* shards have no final states"):
        Cache.open(copied).require_final()
    assert extract(ExtractConfig(**extract_config, out=copied, final=True), Silent()).shards_written == 1
    assert hashes(copied) == hashes(cache_with_final) and verify_cache(copied, Silent()) == []


@pytest.mark.parametrize("name", [FINAL_MANIFEST, FINAL_METADATA])
def test_damage_of_what_says_that_there_are_final_states_is_mended_without_any_of_them_done_again(
    extract_config: Settings, cache_with_final: Path, copied: Path, name: str
) -> None:
    path = copied / name
    path.write_bytes(path.read_bytes().replace(b"lossless", b"rounded ").replace(b"uint16", b"uint32"))
    (fault,) = verify_cache(copied, Silent())
    assert fault.place == FINAL_MANIFEST and str(path) in fault.what
    shown = dflash("inspect", copied)
    assert shown.exit_code == 0, shown.output
    assert dflash("verify", copied, "--repair").exit_code == 1
    assert extract(ExtractConfig(**extract_config, out=copied, final=True), Silent()).shards_written == 0
    assert hashes(copied) == hashes(cache_with_final) and verify_cache(copied, Silent()) == []


def test_final_states_of_another_layout_or_cache_are_refused(
    extract_config: Settings, copied: Path, tmp_path: Path
) -> None:
    shutil.copy(copied / FINAL_MANIFEST, tmp_path)
    made = Cache.open(copied)
    other = FinalDocument(cache=made.manifest.checksum, identity={"features": {"kind": "rounded"}})
    (copied / FINAL_MANIFEST).write_bytes(other.to_bytes())
    with pytest.raises(MismatchError, match=r"features\.kind"):
        add_final(made)
    extract(ExtractConfig(**extract_config, out=copied), Silent())  # hidden states alone are not concerned
    shutil.copy(copied.parent / FINAL_MANIFEST, copied)
    extract(ExtractConfig(**extract_config | {"limit": 20}, out=tmp_path / "other"), Silent())
    shutil.copy(copied / FINAL_MANIFEST, tmp_path / "other")
    (fault,) = verify_cache(tmp_path / "other", Silent())
    assert "belongs to the cache with manifest" in fault.what


def test_verify_with_the_target_compares_the_final_states_and_finds_those_before_the_norm(
    extract_config: Settings, target: Path, cache_with_final: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = dflash("verify", cache_with_final, "--target", target, "--device", "cpu")
    assert said.exit_code == 0 and "final state: relative error 0.1" in said.stdout, said.output
    right = runner.layer_and_final_states
    monkeypatch.setattr(
        runner,
        "layer_and_final_states",
        lambda model, ids, layers: (right(model, ids, layers)[0], right(model, ids, [5])[0][0]),
    )
    extract(ExtractConfig(**extract_config, out=tmp_path / "cache", final=True), Silent())
    assert verify_cache(tmp_path / "cache", Silent()) == []
    said = dflash("verify", tmp_path / "cache", "--target", target, "--device", "cpu")
    assert said.exit_code == 1 and "the final state differs from the target's" in said.stdout


def test_samples_whose_last_layer_is_bad_are_left_out_of_the_final_states_alone(
    extract_config: Settings, target: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right, spoiled = runner.layer_and_final_states, Cache.open(cache).samples.input_ids(5)

    def one_is_bad(model: Any, ids: torch.Tensor, layers: list[int]) -> tuple[list[torch.Tensor], torch.Tensor]:
        taps, final = right(model, ids, layers)
        for row, tokens in enumerate(ids.tolist()):
            if tokens[: len(spoiled)] == spoiled.tolist():
                final[row, len(spoiled) - 2] = np.inf  # before the last token, which is not supervised
                final[row, len(spoiled) - 3] = np.inf
        return taps, final

    monkeypatch.setattr(runner, "layer_and_final_states", one_is_bad)
    config = ExtractConfig(**extract_config, out=tmp_path / "cache", final=True)
    with pytest.raises(DflashError, match=r"(?s)bad features for 1 samples.*Sample 5 .*at layer 5, position"):
        extract(config, Silent())
    done = extract(replace(config, on_bad_features="skip"), Silent())
    assert done.num_skipped == 1 and done.shards_left == 0
    made = Cache.open(tmp_path / "cache")
    assert len(made.usable()) == len(made.samples) and 5 not in made.require_final().usable()
    assert len(made.require_final().usable()) == len(made.samples) - 1
    (bad,) = (bad for commit in made.require_final().commits.values() for bad in commit.skipped)
    assert bad.position == len(spoiled) - 3 and made.require_final().stored(5)[bad.position]
    assert verify_cache(tmp_path / "cache", Silent()) == []


def test_samples_without_hidden_states_have_no_final_ones_and_are_no_reason_to_refuse(
    extract_config: Settings, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right, spoiled = runner.layer_states, Cache.open(cache).samples.input_ids(5).tolist()

    def one_is_bad(model: Any, ids: torch.Tensor, layers: list[int]) -> list[torch.Tensor]:
        states = right(model, ids, layers)
        for row, tokens in enumerate(ids.tolist()):
            if tokens[: len(spoiled)] == spoiled:
                states[1][row, 3] = np.nan
        return states

    monkeypatch.setattr(runner, "layer_states", one_is_bad)
    config = ExtractConfig(**extract_config, out=tmp_path / "cache", on_bad_features="skip")
    assert extract(config, Silent()).num_skipped == 1
    added = extract(replace(config, on_bad_features="refuse", final=True), Silent())
    assert added.num_skipped == 1 and verify_cache(config.out, Silent()) == []
    made = Cache.open(config.out)
    assert made.require_final().usable().tolist() == made.usable().tolist() and 5 not in made.usable()


def test_inspect_and_the_plan_say_what_final_states_take(
    extract_config: Settings, cache_with_final: Path, cache: Path, tmp_path: Path
) -> None:
    found = json.loads(dflash("inspect", cache_with_final, "--json").stdout)["final"]
    final = Cache.open(cache_with_final).require_final()
    kept = sum(int(final.stored(sample).sum()) for sample in range(len(final.samples)))
    sizes = [path.stat().st_size for path in (cache_with_final / "features.zarr/final/c").glob("*/0")]
    assert found["positions"] == kept and found["stored"] == sum(sizes)
    assert found["kept_share"] == pytest.approx(kept / int(final.samples.num_tokens.sum()))
    values = np.concatenate([final.values(s)[final.stored(s), 0] for s in range(len(final.samples))])
    assert found["statistics"]["mean"] == pytest.approx(values.mean(), abs=1e-4)
    assert found["statistics"]["std"] == pytest.approx(values.std(), rel=1e-4)
    assert f"kept for {found['kept_share']:.0%} of tokens" in dflash("inspect", cache_with_final).stdout
    assert json.loads(dflash("inspect", cache, "--json").stdout)["final"] is None
    planned = dflash(*arguments(extract_config, tmp_path / "new"), "--final", "--plan", "--json")
    forecast = json.loads(planned.stdout)
    assert forecast["final_bytes"] == pytest.approx(sum(sizes), rel=0.2)
    copy = shutil.copytree(cache, tmp_path / "cache")
    planned = dflash(*arguments(extract_config, copy), "--final", "--plan", "--json")
    assert json.loads(planned.stdout)["bytes_left"] == pytest.approx(sum(sizes), rel=0.2)


@pytest.mark.slow
def test_kills_while_final_states_are_added_leave_the_same_bytes_and_no_half_state(
    extract_config: Settings, cache_with_final: Path, cache: Path, tmp_path: Path
) -> None:
    copy, chance, kills = shutil.copytree(cache, tmp_path / "cache"), random.Random(0), 0
    deadline = time.monotonic() + 120
    while kills < 3:
        assert time.monotonic() < deadline
        adding = Command([*arguments(extract_config, copy), "--final"])
        before = len(list((copy / "commits").glob("*.final.json")))
        while adding.poll() is None and len(list((copy / "commits").glob("*.final.json"))) == before:
            Cache.open(copy).require_complete()
            time.sleep(0.002)
        time.sleep(chance.random() * 0.02)
        adding.send_signal(signal.SIGKILL)
        adding.wait()
        kills += 1
        there = sorted((copy / "commits").glob("*.final.json"))
        if len(there) > 2:  # so that there is something to kill in
            there[chance.randrange(len(there))].unlink()
        faults = verify_cache(copy, Silent())
        assert all(fault.missing and fault.array == FINAL for fault in faults), faults
    extract(ExtractConfig(**extract_config, out=copy, final=True), Silent())
    assert hashes(copy) == hashes(cache_with_final)
