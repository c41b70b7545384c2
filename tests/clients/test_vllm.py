"""A real vLLM serves the drafts we export: the same answers as `dflash eval`, and the same rounds, one by one."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
from live_vllm import REPAIRS, SCRIPTS, environment, launch_line, run_script, served
from safetensors.torch import load_file, save_file

from dflash_offline.pipeline.demo import CONVERSATIONS, PROMPTS, TARGET
from dflash_offline.schemas.settings.evaluate import EvalConfig
from dflash_offline.schemas.settings.extract import ExtractConfig
from dflash_offline.schemas.settings.train import TrainConfig
from dflash_offline.stages.conversations.prompts import Prompt, encode_prompt, read_prompts
from dflash_offline.stages.draft.decode import SpeculativeDecoding, plain_decode, speculative_decode
from dflash_offline.stages.draft.weights import load_draft
from dflash_offline.stages.eval_served import evaluate_served
from dflash_offline.stages.evaluate import stop_ids
from dflash_offline.stages.export import export
from dflash_offline.stages.extract import extract
from dflash_offline.stages.progress import Silent
from dflash_offline.stages.target.files import open_target
from dflash_offline.stages.target.model import load_model
from dflash_offline.stages.train import train

pytestmark = pytest.mark.vllm
NUM_PROMPTS = int(os.environ.get("DFLASH_VLLM_PROMPTS", "200"))
FEW = min(NUM_PROMPTS, 20)
NEW_TOKENS = 256
VERSION = "0.32.0"


@dataclass(frozen=True)
class Target:
    """The embedded target in float32, its held-out prompts, and what it answers alone."""

    prompts: list[Prompt]
    ids: list[list[int]]
    plain: list[list[int]]
    decode: Callable[..., SpeculativeDecoding]
    """Of (draft, prompt's ids)."""


@pytest.fixture(scope="module")
def target() -> Target:
    files = open_target(str(TARGET))
    model = load_model(files, dtype=torch.float32, device=torch.device("cpu"))
    prompts = read_prompts(PROMPTS, NUM_PROMPTS)
    ids = [encode_prompt(prompt, files.tokenizer, {}) for prompt in prompts]
    stops = sorted(stop_ids(model, files.tokenizer))
    plain = [plain_decode(model, prompt, NEW_TOKENS, stops).tokens for prompt in ids]
    return Target(
        prompts, ids, plain, lambda draft, prompt: speculative_decode(model, draft, prompt, NEW_TOKENS, stops)
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run on the embedded target that has learned something, of three layers, so that each can go wrong."""
    folder = tmp_path_factory.mktemp("embedded")
    data = folder / "chats.jsonl"
    data.write_text("".join(CONVERSATIONS.read_text().splitlines(keepends=True)[:600]))
    extract(ExtractConfig(data=(data,), target=str(TARGET), out=folder / "cache", block_size=8, shard_mib=64), Silent())
    settings = {"steps": 150, "optimizer": "muon", "learning_rate": 6e-3, "draft_layers": 3, "num_anchors": 16}
    settings |= {"packing": False, "batch_size": 8, "val_samples": 16}
    train(TrainConfig(caches=(folder / "cache",), out=folder / "run", **settings), Silent())
    return folder / "run"


@pytest.fixture(scope="module")
def draft(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(run, tmp_path_factory.mktemp("zlab") / "draft").draft


@pytest.fixture(scope="module")
def own(target: Target, draft: Path) -> list[SpeculativeDecoding]:
    """Return what this project decodes with the draft."""
    loaded = load_draft(draft)
    found = [target.decode(loaded, prompt) for prompt in target.ids]
    produced = [n for one in found for n in one.produced]
    assert sum(produced) / len(produced) > 1.5, "the draft is to have learned something"
    assert [one.tokens for one in found] == target.plain
    return found


@dataclass(frozen=True)
class Client:
    """What vLLM decoded."""

    tokens: list[list[int]]
    accepted: list[list[int]]
    """Drafted tokens that each round took, also those behind the answer's last one."""

    def equal_prompts(self, own: list[SpeculativeDecoding]) -> int:
        """Return how many prompts have the same number of rounds, and the same accepted count in every one."""
        return sum(
            len(theirs) == len(one.produced)
            and [min(pair) for pair in zip(theirs, one.produced, strict=True)] == one.kept
            for theirs, one in zip(self.accepted, own, strict=True)
        )


def offline(folder: Path, draft: Path, prompts: list[list[int]], env: dict[str, str] | None = None) -> Client:
    """Decode prompts in a process of vLLM's own; one with the repairs, unless `env` leaves them out."""
    job = {"draft": str(draft), "target": str(TARGET), "prompts": prompts}
    job |= {"max_new_tokens": NEW_TOKENS, "num_speculative_tokens": 7}
    (folder / "job.json").write_text(json.dumps(job))
    env = env or environment()
    result = run_script(SCRIPTS / "vllm_generate.py", folder / "job.json", folder / "result.json", env=env)
    assert result["version"] == VERSION
    assert result["repaired"] == ("VLLM_PLUGINS" not in env)
    return Client(result["tokens"], result["accepted"])


def changed(draft: Path, folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """Return a copy of a draft whose config is another, without the checksums of what it was."""
    shutil.copytree(draft, folder, ignore=shutil.ignore_patterns("checksums.json"))
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def next_layers(config: dict[str, Any]) -> None:
    """Plant the mistake of reading each target layer's output one layer too late."""
    for place in (config, config["dflash_config"]):
        place["target_layer_ids"] = [i + 1 for i in place["target_layer_ids"]]


def causal(config: dict[str, Any]) -> None:
    """Plant the mistake of a causal block."""
    config["is_causal"] = config["dflash_config"]["causal"] = True


def windows(config: dict[str, Any], *, is_causal: bool) -> None:
    """Let every layer see a window of 16 positions."""
    config["layer_types"] = ["sliding_attention"] * config["num_hidden_layers"]
    config["sliding_window"], config["use_sliding_window"] = 16, True
    config["is_causal"] = config["dflash_config"]["causal"] = is_causal


def test_the_repairs_are_still_needed(tmp_path: Path) -> None:
    env = environment(VLLM_PLUGINS="")
    found = run_script(REPAIRS / "dflash_vllm_repairs.py", tmp_path / "result.json", env=env)
    assert found == {"version": VERSION, "norm": True, "temperature": True}, "a repair that is not needed can go"


def test_offline_every_round_is_that_of_eval(
    draft: Path, target: Target, own: list[SpeculativeDecoding], tmp_path: Path
) -> None:
    found = offline(tmp_path, draft, target.ids)
    assert found.tokens == target.plain
    assert found.equal_prompts(own) == NUM_PROMPTS


@pytest.mark.parametrize("mistake", [next_layers, causal])
def test_a_planted_mistake_leaves_the_answers_and_changes_rounds(
    mistake: Callable[[dict[str, Any]], None],
    draft: Path,
    target: Target,
    own: list[SpeculativeDecoding],
    tmp_path: Path,
) -> None:
    found = offline(tmp_path, changed(draft, tmp_path / "planted", mistake), target.ids)
    assert found.tokens == target.plain
    assert found.equal_prompts(own) < NUM_PROMPTS


@pytest.mark.parametrize("is_repaired", [True, False])
def test_norms_of_each_layer_are_kept_apart_by_the_repairs_alone(
    is_repaired: bool, draft: Path, target: Target, tmp_path: Path
) -> None:
    weights = load_file(draft / "model.safetensors")
    for i in range(3):
        weights[f"layers.{i}.self_attn.k_norm.weight"] *= 0.5 + i
    other = changed(draft, tmp_path / "draft", lambda config: None)
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    loaded = load_draft(other)
    ours = [target.decode(loaded, prompt) for prompt in target.ids[:FEW]]
    found = offline(tmp_path, other, target.ids[:FEW], None if is_repaired else environment(VLLM_PLUGINS=""))
    assert found.tokens == target.plain[:FEW]
    assert (found.equal_prompts(ours) == FEW) is is_repaired


def test_the_speculators_format_gives_the_same_rounds(
    run: Path, target: Target, own: list[SpeculativeDecoding], tmp_path: Path
) -> None:
    found = offline(tmp_path, export(run, tmp_path / "draft", kind="speculators").draft, target.ids[:FEW])
    assert found.tokens == target.plain[:FEW]
    assert found.equal_prompts(own[:FEW]) == FEW


@pytest.mark.parametrize("is_causal", [False, True])
def test_sliding_windows_are_served_as_they_are_evaluated(
    is_causal: bool, draft: Path, target: Target, own: list[SpeculativeDecoding], tmp_path: Path
) -> None:
    sliding = changed(draft, tmp_path / "sliding", partial(windows, is_causal=is_causal))
    loaded = load_draft(sliding)
    ours = [target.decode(loaded, prompt) for prompt in target.ids[:FEW]]
    assert [one.kept for one in ours] != [one.kept for one in own[:FEW]], "the window is to be felt"
    found = offline(tmp_path, sliding, target.ids[:FEW])
    assert found.tokens == target.plain[:FEW]
    assert found.equal_prompts(ours) == FEW


@pytest.fixture(scope="module")
def server(draft: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Serve the draft by its card's own launch line."""
    with served(launch_line(draft), tmp_path_factory.mktemp("server") / "log") as url:
        yield url


def chat(url: str, target: Target, concurrency: int, num: int = NUM_PROMPTS) -> Client:
    """Ask a server for the answers to the first prompts, some at a time."""

    def ask(index: int) -> Any:
        prompt = target.prompts[index]
        request = {"model": str(TARGET), "messages": prompt.messages, "max_tokens": NEW_TOKENS, "temperature": 0}
        request |= {"return_token_ids": True, "skip_special_tokens": False}
        response = httpx2.post(f"{url}/v1/chat/completions", json=request, timeout=300)
        assert response.status_code == 200, response.text
        found = response.json()
        assert found["prompt_token_ids"] == target.ids[index]
        return found

    with ThreadPoolExecutor(concurrency) as pool:
        answers = list(pool.map(ask, range(num)))
    rounds = [answer["metrics"]["speculative_decoding"]["per_step_accepted"] for answer in answers]
    return Client([answer["choices"][0]["token_ids"] for answer in answers], [taken or [] for taken in rounds])


@pytest.mark.parametrize("concurrency", [1, 8])
def test_over_http_every_round_is_that_of_eval(
    concurrency: int, server: str, target: Target, own: list[SpeculativeDecoding]
) -> None:
    found = chat(server, target, concurrency)
    assert found.tokens == target.plain
    assert found.equal_prompts(own) == NUM_PROMPTS


def test_a_live_evaluation_counts_the_rounds_of_the_one_beside_it(
    server: str, draft: Path, target: Target, own: list[SpeculativeDecoding]
) -> None:
    settings = {"target": str(TARGET), "prompts": PROMPTS, "limit": FEW, "max_new_tokens": NEW_TOKENS}
    result = evaluate_served(EvalConfig(draft=draft, server=server, concurrency=(1, 4, 16), **settings))
    assert result.service is not None and result.service.notes == ()
    assert (result.service.kind, result.service.num_speculative_tokens) == ("vLLM", 7)
    assert result.lossless is True
    for one in result.service.passes:
        assert one.counted is not None and not one.counted.is_disturbed
        assert one.counted.rounds == result.acceptance.rounds == sum(len(done.produced) for done in own[:FEW])
        assert one.acceptance_by_kind == result.acceptance_by_kind
        assert (one.identical, one.other_prompts, one.tokens) == (FEW, 0, sum(map(len, target.plain[:FEW])))


def test_the_speculators_launch_line_serves_the_draft(
    run: Path, target: Target, own: list[SpeculativeDecoding], tmp_path: Path
) -> None:
    draft = export(run, tmp_path / "draft", kind="speculators").draft
    with served(launch_line(draft), tmp_path / "log") as url:
        found = chat(url, target, 4, FEW)
    assert found.tokens == target.plain[:FEW]
    assert found.equal_prompts(own[:FEW]) == FEW
