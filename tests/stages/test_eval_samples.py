"""A cache's chosen-out part, walked without the target and decoded with it."""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from processes import run as run_command
from running import dflash
from safetensors.torch import load_file, save_file
from tiny_target import save_conversations, save_target

from dflash_offline.pipeline.demo import CONVERSATIONS, TARGET
from dflash_offline.schemas.settings.evaluate import EvalConfig
from dflash_offline.schemas.settings.extract import ExtractConfig
from dflash_offline.schemas.settings.train import TrainConfig
from dflash_offline.stages.evaluate import evaluate_folder
from dflash_offline.stages.evaluation.samples import as_prompts, choose_samples, draft_folder
from dflash_offline.stages.export import export
from dflash_offline.stages.extract import extract
from dflash_offline.stages.progress import Silent
from dflash_offline.stages.train import train


@pytest.fixture(scope="module")
def run(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "run"
    settings = {"steps": 4, "draft_layers": 1, "num_anchors": 4, "val_every": 2, "val_samples": 5, "device": "cpu"}
    train(TrainConfig(caches=(cache,), out=out, **settings), Silent())
    return out


@pytest.fixture(scope="module")
def draft(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(run, tmp_path_factory.mktemp("draft") / "draft").draft


def test_the_walk_over_a_run_is_the_one_that_training_measured(run: Path, cache: Path) -> None:
    found = evaluate_folder(EvalConfig(draft=run, cache=cache, device="cpu"))
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    best = max(row["val_serving_walk"] for row in rows if "val_serving_walk" in row)
    assert found.offline and found.held_out and found.acceptance.pooled == pytest.approx(best)
    assert sum(found.rounds_by_tokens) == found.acceptance.rounds
    assert found.accepted_tokens == sum(found.accepted_by_slot)
    assert found.drafted_by_slot == (found.acceptance.rounds,) * 7
    assert (found.nll, found.lossless, found.speedup) == (None, None, None)


def test_a_draft_walks_the_samples_its_training_held_out(run: Path, draft: Path, cache: Path) -> None:
    for folder in (run, draft):
        chosen = choose_samples(cache, draft_folder(folder)[1], None)
        assert chosen.held_out and np.array_equal(chosen.samples, chosen.corpus.split(5)[1])
        assert len(choose_samples(cache, draft_folder(folder)[1], 2).samples) == 2


def test_a_draft_that_another_cache_trained_walks_all_samples(
    draft: Path, extract_config: dict[str, object], tmp_path: Path
) -> None:
    data = save_conversations(tmp_path / "others.jsonl", 9, seed=4)
    extract(ExtractConfig(**{**extract_config, "data": (data,)}, out=tmp_path / "cache"), Silent())
    shown = dflash("eval", draft, "--cache", tmp_path / "cache", "--quiet").stdout
    assert "all samples: another cache trained it" in shown and "12 cached turns" in shown
    weights = load_file(draft / "model.safetensors")
    (tmp_path / "draft").mkdir()
    (tmp_path / "draft/config.json").write_text((draft / "config.json").read_text())
    save_file(weights, tmp_path / "draft/model.safetensors", metadata={"format": "pt"})
    unknown = dflash("eval", tmp_path / "draft", "--cache", tmp_path / "cache", "--json", "--quiet")
    assert json.loads(unknown.stdout)["trained"] is None and not json.loads(unknown.stdout)["held_out"]


def test_a_cache_of_another_target_is_refused(draft: Path, data: Path, tmp_path: Path) -> None:
    other = save_target(tmp_path / "other", num_layers=8)
    extract(
        ExtractConfig(data=(data,), target=str(other), layers=(0, 1), block_size=8, out=tmp_path / "cache"), Silent()
    )
    refused = dflash("eval", draft, "--cache", tmp_path / "cache")
    assert refused.exit_code == 1
    for line in ("num_hidden_layers  draft: 6  cache: 8", "layer_ids          draft: [1, 2, 4]  cache: [0, 1]"):
        assert line in refused.stderr


def test_cached_prompts_end_where_their_answers_begin(draft: Path, cache: Path) -> None:
    chosen = choose_samples(cache, draft_folder(draft)[1], None)
    prompts = as_prompts(chosen)
    table = chosen.cache.samples
    starts = {
        (int(i), first)
        for i in chosen.samples
        for first in range(1, int(table.num_tokens[i]))
        if table.loss_mask(i)[first] and not table.loss_mask(i)[first - 1]
    }
    assert len(prompts) == len(starts) > len(chosen.samples)
    assert {(len(ids), tuple(ids)) for _, ids in prompts} == {(n, tuple(table.input_ids(i)[:n])) for i, n in starts}


def test_held_out_prompts_are_decoded_with_the_target_greedy_and_drawn(
    draft: Path, cache: Path, target: Path, tmp_path: Path
) -> None:
    flags = ["--cache", cache, "--target", target, "--max-new-tokens", 12, "--json", "--quiet", "--device", "cpu"]
    greedy = json.loads(dflash("eval", draft, *flags, "--repeats", 2).stdout)
    assert greedy["held_out"] and greedy["lossless"] and not greedy["offline"]
    assert greedy["identical"] == greedy["acceptance"]["prompts"]
    drawn = [json.loads(dflash("eval", draft, *flags, "--temperature", 1, "--seed", s).stdout) for s in (0, 0, 1)]
    assert [result["lossless"] for result in drawn] == [None] * 3
    for result in drawn:
        result["proposals"] = [
            {name: value for name, value in one.items() if name not in ("tokens_per_s", "speedup")}
            for one in result["proposals"]
        ]
    speeds = ("plain_tokens_per_s", "speculative_tokens_per_s", "speedup", "speedup_median")
    first, again, other = ({k: v for k, v in result.items() if k not in speeds} for result in drawn)
    assert first == again and first["nll"] != other["nll"]


def test_settings_that_contradict_each_other_are_refused(draft: Path, cache: Path, target: Path, data: Path) -> None:
    for flags, said in (
        ([], "either --prompts FILE or --cache CACHE"),
        (["--prompts", data, "--cache", cache], "either --prompts FILE or --cache CACHE"),
        (["--prompts", data], "No target is given"),
        (["--cache", cache, "--temperature", 1, "--repeats", 3], "temperature needs --target"),
        (["--cache", cache, "--target", target, "--temperature", -1, "--top-p", 0], "top_p is 0"),
        (["--cache", cache, "--html", "/nowhere/at/all.html"], "--html"),
    ):
        refused = dflash("eval", draft, *flags)
        assert refused.exit_code == 1 and said in refused.stderr, refused.stderr


def test_matplotlib_is_needed_for_the_page_alone(
    draft: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    assert dflash("eval", draft, "--cache", cache, "--quiet").exit_code == 0
    monkeypatch.setattr("dflash_offline.pipeline.pages.plots.find_spec", lambda name: None)
    refused = dflash("eval", draft, "--cache", cache, "--html", tmp_path / "page.html")
    assert refused.exit_code == 1 and "needs matplotlib" in refused.stderr


@pytest.mark.parametrize("flag", ["--save", "--html"])
def test_a_file_that_was_asked_for_is_replaced_whole_or_kept(
    draft: Path, cache: Path, tmp_path: Path, flag: str
) -> None:
    (tmp_path / "real").mkdir()
    real, name = tmp_path / "real/found", tmp_path / "found"
    real.write_text("what was found before")
    name.symlink_to(real)
    arguments = ["eval", str(draft), "--cache", str(cache), flag, str(name), "--quiet"]
    code, said = run_command(arguments, most_file_bytes=1000)
    assert code != 0 and "found" in said
    assert real.read_text() == "what was found before"
    assert run_command(arguments)[0] == 0
    assert len(real.read_bytes()) > 1000 and name.is_symlink()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["found", "found", "real"]


def test_a_result_may_be_saved_into_a_pipe(draft: Path, cache: Path, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with ThreadPoolExecutor(1) as reader:
        read = reader.submit(pipe.read_text)
        assert dflash("eval", draft, "--cache", cache, "--save", pipe, "--quiet").exit_code == 0
        assert json.loads(read.result())["offline"]
    assert pipe.is_fifo()


@pytest.mark.slow
def test_the_walk_agrees_with_live_decoding_where_the_cached_answers_are_greedy(tmp_path: Path) -> None:
    data = tmp_path / "chats.jsonl"
    data.write_text("".join(CONVERSATIONS.read_text().splitlines(keepends=True)[:180]))
    extract(
        ExtractConfig(data=(data,), target=str(TARGET), out=tmp_path / "cache", block_size=8, device="cpu"), Silent()
    )
    settings = {"steps": 30, "optimizer": "muon", "learning_rate": 6e-3, "draft_layers": 1, "num_anchors": 16}
    train(TrainConfig(caches=(tmp_path / "cache",), out=tmp_path / "run", **settings, device="cpu"), Silent())
    common = {"draft": tmp_path / "run", "cache": tmp_path / "cache", "device": "cpu", "limit": 12}
    walked = evaluate_folder(EvalConfig(**common))
    live = evaluate_folder(EvalConfig(**common, target=str(TARGET)))
    assert walked.acceptance.pooled is not None and live.acceptance.pooled is not None
    assert walked.acceptance.tokens > 300 and walked.acceptance.pooled > 1.2
    assert walked.acceptance.pooled == pytest.approx(live.acceptance.pooled, rel=0.01)
    assert walked.acceptance.mean == pytest.approx(live.acceptance.mean, rel=0.01)
