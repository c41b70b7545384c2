"""`dflash inspect CACHE`: every planted fault is pointed at on the first screen, and a healthy cache shows none."""

import json
import math
import re
import shlex
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from feature_writer import create, fill_cache
from numpy.typing import NDArray
from tiny_target import save_tokenizer
from typer.testing import CliRunner, Result

from dflash_offline.pipeline.app import app
from dflash_offline.pipeline.inspect import feature_statistics
from dflash_offline.pipeline.inspect.plan_statistics import NUM_BINS, MaskTokenUse, mask_token_use, spread
from dflash_offline.pipeline.inspect.sample import text_runs
from dflash_offline.pipeline.token_text import token_texts
from dflash_offline.schemas.commits import commit_path, read_commits
from dflash_offline.schemas.draft.anchor_rule import AnchorRule
from dflash_offline.schemas.manifest import SAMPLES
from dflash_offline.schemas.samples import SampleTable
from dflash_offline.stages.progress import Silent
from dflash_offline.stages.store.cache import Cache
from dflash_offline.stages.store.verify import verify_cache

FIRST_SCREEN = 24
"""Lines of a terminal."""
Values = NDArray[np.float32]


def dflash(*arguments: object, **settings: Any) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], **settings)


def shown(cache: Path, *flags: object) -> str:
    """Return what inspect prints of a cache, once it came through."""
    result = dflash("inspect", cache, *flags)
    assert result.exit_code == 0, (result.output, result.exception)
    return result.stdout


def document(cache: Path, *flags: object) -> dict[str, Any]:
    return dict(json.loads(shown(cache, *flags, "--json")))


def made(tmp_path: Path, change: Callable[[Values], Values] | None = None, **settings: Any) -> Path:
    """Return a complete cache of six shards and three layers, its features changed."""
    out = tmp_path / "cache"
    create(out, **{"num_shards": 6, "width": 64, **settings})
    fill_cache(out, change=change)
    return out


def test_a_file_in_tmp_of_a_process_number_that_none_can_have_is_shown_as_half_written(tmp_path: Path) -> None:
    create(tmp_path / "cache", num_shards=2)
    (tmp_path / f"cache/tmp/000001.{socket.gethostname()}-99999999999999999999.part").write_bytes(b"some of a shard")
    assert "1 half-written file" in shown(tmp_path / "cache")
    assert document(tmp_path / "cache")["shard_states"] == {"left": 1, "half-written": 1}


def dead_layer(values: Values) -> Values:
    values[:, 1] = 0
    return values


def exploding_channel(values: Values) -> Values:
    values[:, 2, 17] *= 1e5
    return values


def one_layer_twice(values: Values) -> Values:
    values[:, 0] = values[:, 1]
    return values


def half_zeros(values: Values) -> Values:
    values[:, 0, ::2] = 0
    return values


def beyond_float32(values: Values) -> Values:
    return values * np.float32(1e20)


@pytest.mark.parametrize(
    "change, said",
    [
        (dead_layer, "dead layer: layer 2 carries nothing"),
        (exploding_channel, "exploding norms: layer 4 standard deviation"),
        (one_layer_twice, "layers too alike: layers 1 and 2 have the same mean"),
        (half_zeros, "zeros: layer 1 50.0% of its values are exactly zero"),
        (beyond_float32, "exploding norms: layer 1 reaches"),
    ],
)
def test_a_fault_of_a_layer_is_on_the_first_screen_with_what_to_do(
    tmp_path: Path, change: Callable[[Values], Values], said: str
) -> None:
    cache = made(tmp_path, change)
    screen = "\n".join(shown(cache).splitlines()[:FIRST_SCREEN])
    assert said in screen
    assert "Next: dflash" in screen[screen.index(said) :]
    assert said.split(":")[0] in shown(cache, "--layers")


def test_the_features_of_a_few_samples_name_the_channel_and_the_layers_that_are_one(tmp_path: Path) -> None:
    def change(values: Values) -> Values:
        values = exploding_channel(values)
        values[:, 1] = values[:, 0]
        values[:, 0, 3] = 1.5
        return values

    view = document(made(tmp_path, change), "--layers", "--features", 5)
    kinds = {(mark["kind"], mark["where"]): mark["what"] for mark in view["marks"]}
    assert "17 (" in kinds["exploding channel", "layer 4"]
    assert "1 channels hold one value" in kinds["dead channels", "layer 1"]
    assert ("layers too alike", "layers 1 and 2") in kinds
    assert view["features"]["layers"][2]["channels"]["largest"][0]["channel"] == 17
    assert view["features"]["similarity"][0][1] > 0.98 > 0.1 > abs(view["features"]["similarity"][0][2])


def test_samples_that_would_take_too_much_memory_are_said_to_be_left_out(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = document(cache, "--layers", "--features", 4)["features"]
    assert whole["samples_asked"] == len(whole["samples"]) == 4
    text = shown(cache, "--layers", "--features", 4)
    assert "too much memory" not in text and "none\n" in text
    reader, ends = Cache.open(cache), [whole["samples"][0], whole["samples"][-1]]
    room = 2 * reader.manifest.layout.slot_bytes * int(reader.samples.num_tokens[ends].sum())
    monkeypatch.setattr(feature_statistics, "_MOST_BYTES", room)
    assert document(cache, "--layers", "--features", 4)["features"]["samples"] == ends
    monkeypatch.setattr(feature_statistics, "_MOST_BYTES", 1)
    part = document(cache, "--layers", "--features", 4)["features"]
    assert part["samples"] == whole["samples"][:1] and part["samples_asked"] == 4
    assert "the other 3 of 4 would take too much memory" in " ".join(shown(cache, "--layers", "--features", 4).split())


def test_a_layer_that_is_odd_in_some_shards_alone_is_marked_with_them(tmp_path: Path) -> None:
    cache = made(tmp_path)
    for shard, factor in ((2, 1e-3), (4, 1e3)):
        commit_path(cache, shard).unlink()
        fill_cache(cache, change=lambda values, factor=factor: values * np.float32(factor))
    marks = document(cache)["marks"]
    assert {(mark["kind"], tuple(mark["shards"])) for mark in marks} == {
        ("dead layer", (2,)),
        ("exploding norms", (4,)),
    }
    assert len(marks) == 6 and "--shard 2" in marks[0]["next"]


def test_samples_that_train_nothing_are_marked_and_verify_finds_them_as_well(tmp_path: Path) -> None:
    cache = made(tmp_path, supervised=0.0)
    screen = shown(cache).splitlines()[:FIRST_SCREEN]
    assert any(
        re.search(r"all-masked samples: (\d+) of \1 samples, first 0 have no supervised", line) for line in screen
    )
    assert any("have no supervised token" in fault.what for fault in verify_cache(cache, Silent()))


@pytest.mark.parametrize("token, said", [(5, "is an ordinary token"), (1001, "is no row of the embedding table")])
def test_a_wrong_mask_token_is_on_the_first_screen(tmp_path: Path, target: Path, token: int, said: str) -> None:
    cache = made(tmp_path, mask_token_id=token, tokenizer=target / "tokenizer.json")
    screen = " ".join("\n".join(shown(cache).splitlines()[:FIRST_SCREEN]).split())
    assert f"wrong mask token: token {token}" in screen and said in screen and "extract anew" in screen
    holding = [i for i, ids in enumerate(tokens(cache)) if token in ids]
    if holding:
        assert f"occurs in {len(holding)} of" in screen and f"first {holding[0]}" in screen
    assert any(f"hold the mask token {token}" in fault.what for fault in verify_cache(cache, Silent())) == bool(holding)


def tokens(cache: Path) -> list[NDArray[np.uint32]]:
    samples = SampleTable.read(cache / SAMPLES)
    return [samples.input_ids(sample) for sample in range(len(samples))]


def test_a_mask_token_beyond_the_tokens_of_the_plan_is_settled_without_reading_any(tmp_path: Path) -> None:
    cache = made(tmp_path)
    num_samples = len(tokens(cache))
    assert mask_token_use(cache, 1000, 0) == MaskTokenUse(0, None, num_samples)
    assert mask_token_use(cache, 500, 0).samples_checked == 0


def _no_record(cache: Path) -> None:
    commit_path(cache, 3).unlink()


def _no_file(cache: Path) -> None:
    (cache / "features.zarr/loss_mask/c/3").unlink()


def _part_left(cache: Path) -> None:
    commit_path(cache, 3).unlink()
    for array in ("hidden_states", "input_ids", "loss_mask"):
        path = cache / f"features.zarr/{array}/c/3"
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    (cache / f"tmp/000003.{socket.gethostname()}-999999999.part").write_bytes(b"half of a shard")


@pytest.mark.parametrize(
    "harm, said",
    [
        (_no_record, "half-finished shard: shard 3 has files but no record"),
        (_part_left, "half-written shard: shard 3 was being written"),
        (_no_file, "damaged shard: shard 3"),
    ],
)
def test_a_half_finished_shard_is_on_the_first_screen_and_extract_redoes_it(
    tmp_path: Path, harm: Callable[[Path], None], said: str
) -> None:
    cache = made(tmp_path)
    harm(cache)
    screen = " ".join(" ".join(shown(cache).splitlines()[:FIRST_SCREEN]).split())
    assert said in screen and "5 of 6 done" in screen
    assert "extract" in screen[screen.index(said) :]
    assert document(cache)["progress"][1] == {"state": said.split(" shard:")[0], "first": 3, "last": 3}
    assert said.split(" shard:")[0] in shown(cache, "--shard", 3)
    fill_cache(cache)
    assert document(cache)["marks"] == []


def test_a_healthy_cache_has_no_mark(cache: Path, tmp_path: Path) -> None:
    for one in (cache, made(tmp_path)):
        assert document(one)["marks"] == []
        assert document(one, "--layers", "--features", 8)["marks"] == []


def outlier_channels_and_first_tokens(values: Values) -> Values:
    """Channels of 100 to 1,000 times the rest, one in 500, and first tokens of 3,000 times the rest."""
    gain = np.ones(values.shape[1:], np.float32)
    for layer, channels in enumerate(([7, 300], [7, 412], [7, 33])):
        gain[layer, channels] = [1000, 100]
    values *= gain
    values[0] *= 3000
    return values


def massive_activations_from_the_second_layer_on(values: Values) -> Values:
    """As published of language models: four channels of the first token alone, ten thousand times the rest, and none
    in the first layer; which is smaller, too."""
    values[0, 1:, [3, 99, 600, 601]] *= 10_000
    values[:, 0] *= 0.05
    return values


@pytest.mark.parametrize("change", [outlier_channels_and_first_tokens, massive_activations_from_the_second_layer_on])
def test_what_large_models_have_by_nature_is_no_fault(tmp_path: Path, change: Callable[[Values], Values]) -> None:
    cache = made(tmp_path, change, width=1024)
    assert document(cache)["marks"] == []
    assert document(cache, "--layers", "--features", 8)["marks"] == []


def test_an_empty_cache_and_a_broken_one_are_shown(tmp_path: Path) -> None:
    create(tmp_path / "cache", num_shards=3)
    found = document(tmp_path / "cache")
    assert found["shard_states"] == {"left": 3} and found["layers"] == [] and found["compression"] is None
    assert "0 of 3 done" in shown(tmp_path / "cache") and "No shard" in shown(tmp_path / "cache", "--layers")
    assert "no finished shard" in shown_error(tmp_path / "cache", "--layers", "--features", 2)
    (tmp_path / "cache" / SAMPLES).write_bytes(b"no table")
    assert dflash("inspect", tmp_path / "cache").exit_code == 1


def test_a_plan_with_a_flipped_byte_is_shown_or_refused_but_never_a_crash(cache: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(cache, tmp_path / "copy"))
    path = copy / SAMPLES
    content = path.read_bytes()
    refusals = 0
    for position in np.random.default_rng(0).integers(0, len(content), 25).tolist():
        broken = bytearray(content)
        broken[position] ^= 1 << position % 8
        path.write_bytes(broken)
        for flags in ([], ["--top", "rare"]):
            result = dflash("inspect", copy, *flags, "--json")
            assert isinstance(result.exception, SystemExit | None), (position, result.exception)
            refusals += result.exit_code
    assert refusals


def shown_error(cache: Path, *flags: object) -> str:
    result = dflash("inspect", cache, *flags)
    assert result.exit_code == 1 and "Traceback" not in result.stderr
    return result.stderr


def test_the_overview_counts_what_is_there(cache: Path) -> None:
    found, reader = document(cache), Cache.open(cache)
    samples, values = reader.samples, np.concatenate([reader.values(i) for i in reader.usable().tolist()])
    assert found["tokens"] == found["tokens_done"] == samples.num_tokens.sum() == len(values)
    assert found["samples_done"] == len(samples) and found["supervised"] == samples.num_supervised.sum()
    assert sum(found["length"]["histogram"]["counts"]) == len(samples)
    for column, row in enumerate(found["layers"]):
        assert row["mean"] == pytest.approx(values[:, column].mean(dtype=np.float64), abs=1e-5)
        assert row["std"] == pytest.approx(values[:, column].std(dtype=np.float64), rel=1e-5)
        assert row["max_abs"] == np.abs(values[:, column]).max()
    sizes = [path.stat().st_size for path in cache.glob("features.zarr/hidden_states/c/*/0/0")]
    assert found["arrays"]["hidden_states"]["stored"] == sum(sizes)
    by_layer = document(cache, "--layers")["bytes_by_layer"]
    assert 0.95 * sum(sizes) < sum(by_layer["stored"]) < sum(sizes)  # all but the indexes


def test_a_sample_shows_its_tokens_mask_and_norms(cache: Path) -> None:
    view, reader = document(cache, "--sample", 7), Cache.open(cache)
    assert view["token_ids"] == reader.samples.input_ids(7).tolist()
    assert view["loss_mask"] == reader.samples.loss_mask(7).astype(int).tolist()
    assert "".join(view["token_texts"]) == "".join(run["text"] for run in view["runs"])
    rms = np.sqrt(np.square(reader.values(7), dtype=np.float64).mean(axis=2)).T
    np.testing.assert_allclose(view["norms"], rms, atol=1e-5)
    able = [run for run in view["runs"] if run["anchor"]]
    assert sum(run["tokens"] for run in able) == view["anchors"] and all(run["supervised"] for run in able)
    text = shown(cache, "--sample", 7)
    for layer_id in (1, 2, 4):
        assert re.search(rf"^layer {layer_id}    [▁▂▃▄▅▆▇█]+ \S+ to \S+$", text, re.MULTILINE)
    assert all(f"[[{run['text']}]]" in text for run in able)


def test_suggested_commands_hold_for_a_folder_with_a_blank_in_its_name(cache: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(cache, tmp_path / "my cache"))
    for view in ((), ("--sample", 0), ("--shard", 0), ("--layers",), ("--top", "rare")):
        commands = re.findall(r"^(?:Next: | {6})(dflash .*)$", shown(copy, *view), re.MULTILINE)
        assert commands and all(shlex.split(command)[2] == str(copy) for command in commands)


def test_a_file_without_a_target_is_told_from_a_cache(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("{}\n")
    assert "is a file. To see a row of data as it would be extracted, name a --target." in shown_error(
        tmp_path / "a.jsonl"
    )


def test_a_run_that_begins_within_a_character_shows_it_whole(tmp_path: Path) -> None:
    tokenizer = save_tokenizer(tmp_path)
    ids = tokenizer("a dog 🐕 日本 sees")["input_ids"]
    for cut in range(1, len(ids)):
        runs = text_runs(token_texts(ids, tokenizer.decode), np.arange(len(ids)) >= cut, AnchorRule(1))
        assert [run.tokens for run in runs] == [cut, len(ids) - cut]
        assert "".join(run.text for run in runs) == "a dog 🐕 日本 sees"


def test_a_sample_without_features_is_shown_with_the_reason(cache: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(cache, tmp_path / "copy"))
    commit_path(copy, 0).unlink()
    assert document(copy, "--sample", 0)["norms"] is None
    assert "No norms: Shard 0 of" in shown(copy, "--sample", 0)


def test_a_shard_shows_its_record_and_its_samples(cache: Path) -> None:
    view, samples = document(cache, "--shard", 1), Cache.open(cache).samples
    members = samples.samples_of_shard(1)
    assert [row["sample"] for row in view["samples"]] == members.tolist() and view["state"] == "done"
    assert view["tokens"] == samples.num_tokens[members].sum() and len(view["layers"]) == 3
    assert "Worker" in shown(cache, "--shard", 1)
    assert "has shards 0 to" in shown_error(cache, "--shard", 99)


def test_top_lists_the_longest_the_shortest_and_the_rarest(cache: Path) -> None:
    samples = Cache.open(cache).samples
    for kind, order in (("longest", -1), ("shortest", 1)):
        rows = document(cache, "--top", kind)["samples"]
        assert [row["num_tokens"] for row in rows] == sorted(samples.num_tokens.tolist(), key=lambda n: n * order)[:20]
    ids = tokens(cache)
    counts = np.bincount(np.concatenate(ids))
    bits = [sum(-math.log2(counts[i] / counts.sum()) for i in one.tolist()) / len(one) for one in ids]
    rare = document(cache, "--top", "rare")["samples"]
    assert [row["bits"] for row in rare] == pytest.approx(sorted(bits, reverse=True)[:20])
    assert rare[0]["sample"] == int(np.argmax(bits)) and "bits" in shown(cache, "--top", "rare")
    assert "expected one of longest, shortest, rare" in shown_error(cache, "--top", "best")


def test_two_views_at_once_are_refused(cache: Path) -> None:
    assert "--sample and --layers are views of their own" in shown_error(cache, "--sample", 0, "--layers")
    assert "--top shows a part of a cache" in shown_error(cache, "--target", "x", "--top", "rare")
    assert "Name --layers with it" in shown_error(cache, "--features", 3)


@pytest.mark.parametrize("width", [80, 120])
def test_every_view_fits_the_width_and_holds_no_codes_when_redirected(cache: Path, tmp_path: Path, width: int) -> None:
    broken = made(tmp_path, dead_layer)
    for where in (cache, broken):
        for flags in ([], ["--shard", 1], ["--layers", "--features", 4], ["--top", "rare"]):
            result = dflash("inspect", where, *flags, env={"COLUMNS": str(width)})
            short = [line for line in result.stdout.splitlines() if str(where) not in line]
            assert max(map(len, short)) <= width and "\033" not in result.stdout


def test_spreads_have_a_histogram_that_counts_everything() -> None:
    rng = np.random.default_rng(0)
    for values in (rng.integers(3, 5000, 999), np.full(7, 5), rng.random(50), np.ones(4), np.zeros(0)):
        histogram = spread(values).histogram
        assert sum(histogram.counts) == len(values) and len(histogram.counts) <= NUM_BINS
        assert len(histogram.edges) == len(histogram.counts) + bool(len(values))


def test_records_of_shards_that_are_not_of_the_plan_count_for_nothing(cache: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(cache, tmp_path / "copy"))
    manifest = Cache.open(copy).manifest
    shutil.copy(commit_path(copy, 0), commit_path(copy, 999))
    commits, faults = read_commits(copy, manifest)
    assert list(commits) == list(range(manifest.layout.num_shards)) and faults == []
