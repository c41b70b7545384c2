"""A real vLLM serves the drafts we export: the same answers as `dflash eval`, and the same rounds, one by one."""

import json
import os
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
from live_vllm import (
    INTERPRETER,
    REPAIRS,
    VERSION,
    Client,
    decode_live,
    embedded_run,
    environment,
    launch_line,
    packages,
    run_script,
    served,
)
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from dflash_offline.pipeline.demo import PROMPTS, TARGET
from dflash_offline.schemas.settings.evaluate import EvalConfig
from dflash_offline.stages.conversations.prompts import Prompt, encode_prompt, read_prompts
from dflash_offline.stages.draft.decode import SpeculativeDecoding, plain_decode, speculative_decode
from dflash_offline.stages.draft.model import DraftModel
from dflash_offline.stages.draft.sampling import Chooser, Proposal, Sampler, SamplingRule
from dflash_offline.stages.draft.weights import load_draft
from dflash_offline.stages.eval_served import evaluate_served
from dflash_offline.stages.evaluate import stop_ids
from dflash_offline.stages.export import export
from dflash_offline.stages.target.files import open_target
from dflash_offline.stages.target.model import load_model

pytestmark = pytest.mark.vllm
NUM_PROMPTS = int(os.environ.get("DFLASH_VLLM_PROMPTS", "200"))
FEW = min(NUM_PROMPTS, 20)
INTERPRETED = min(NUM_PROMPTS, 6)
"""Prompts for the runner whose kernels are interpreted."""
NEW_TOKENS = 256
TEMPERATURE = 1.0


@dataclass(frozen=True)
class Target:
    """The embedded target in float32, its held-out prompts, and what it answers alone."""

    prompts: list[Prompt]
    ids: list[list[int]]
    plain: list[list[int]]
    decode: Callable[..., SpeculativeDecoding]
    """Of (draft, prompt's ids), and what chooses the tokens where they are drawn."""
    model: PreTrainedModel


@pytest.fixture(scope="module")
def target() -> Target:
    files = open_target(str(TARGET))
    model = load_model(files, dtype=torch.float32, device=torch.device("cpu"))
    prompts = read_prompts(PROMPTS, NUM_PROMPTS)
    ids = [encode_prompt(prompt, files.tokenizer, {}) for prompt in prompts]
    stops = sorted(stop_ids(model, files.tokenizer))
    plain = [plain_decode(model, prompt, NEW_TOKENS, stops).tokens for prompt in ids]

    def decode(draft: DraftModel, prompt: list[int], chooser: Chooser | None = None) -> SpeculativeDecoding:
        return speculative_decode(model, draft, prompt, NEW_TOKENS, stops, chooser)

    return Target(prompts, ids, plain, decode, model)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run that has learned something, of three layers, so that each can go wrong."""
    return embedded_run(tmp_path_factory.mktemp("embedded"), draft_layers=3)


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


def windows(config: dict[str, Any], *, is_causal: bool | None, full_layers: int = 0) -> None:
    """Let all layers but the last `full_layers` see a window of 16 positions; with None those alone are causal."""
    sliding = config["num_hidden_layers"] - full_layers
    config["layer_types"] = ["sliding_attention"] * sliding + ["full_attention"] * full_layers
    config["sliding_window"], config["use_sliding_window"] = 16, True
    for place, name in ((config, "is_causal"), (config["dflash_config"], "causal")):
        place.pop(name, None)
        place |= {} if is_causal is None else {name: is_causal}


def test_the_repairs_are_still_needed(tmp_path: Path) -> None:
    env = environment(VLLM_PLUGINS="")
    found = run_script(REPAIRS / "dflash_vllm_repairs.py", tmp_path / "result.json", env=env)
    assert found == {"version": VERSION, "norm": True, "temperature": True}, "a repair that is not needed can go"


def test_offline_every_round_is_that_of_eval(
    draft: Path, target: Target, own: list[SpeculativeDecoding], tmp_path: Path
) -> None:
    found = decode_live(tmp_path, draft, target.ids)
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
    found = decode_live(tmp_path, changed(draft, tmp_path / "planted", mistake), target.ids)
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
    found = decode_live(tmp_path, other, target.ids[:FEW], is_repaired=is_repaired)
    assert found.tokens == target.plain[:FEW]
    assert (found.equal_prompts(ours) == FEW) is is_repaired


def test_the_speculators_format_gives_the_same_rounds(
    run: Path, target: Target, own: list[SpeculativeDecoding], tmp_path: Path
) -> None:
    found = decode_live(tmp_path, export(run, tmp_path / "draft", kind="speculators").draft, target.ids[:FEW])
    assert found.tokens == target.plain[:FEW]
    assert found.equal_prompts(own[:FEW]) == FEW


@pytest.mark.parametrize("is_causal", [False, True, None])
def test_sliding_windows_are_served_as_they_are_evaluated(
    is_causal: bool | None, draft: Path, target: Target, own: list[SpeculativeDecoding], tmp_path: Path
) -> None:
    sliding = changed(draft, tmp_path / "sliding", partial(windows, is_causal=is_causal))
    loaded = load_draft(sliding)
    ours = [target.decode(loaded, prompt) for prompt in target.ids[:FEW]]
    assert [one.kept for one in ours] != [one.kept for one in own[:FEW]], "the window is to be felt"
    found = decode_live(tmp_path, sliding, target.ids[:FEW])
    assert found.tokens == target.plain[:FEW]
    assert found.equal_prompts(ours) == FEW


def test_the_backend_for_interpreted_kernels_is_still_needed() -> None:
    code = "from vllm.triton_utils import HAS_TRITON; print(HAS_TRITON)"
    found = []
    for more in ([INTERPRETER], []):
        env = environment(packages("DFLASH_TRITON"), *more, TRITON_INTERPRET="1")
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=600)
        found.append(done.stdout.split()[-1:])
    assert found == [["True"], ["False"]], "a backend that is not needed can go"


def test_the_newer_model_runner_gives_the_same_rounds(
    draft: Path, target: Target, own: list[SpeculativeDecoding], tmp_path: Path
) -> None:
    found = decode_live(tmp_path, draft, target.ids[:INTERPRETED], new_runner=True)
    assert found.tokens == target.plain[:INTERPRETED]
    assert found.equal_prompts(own[:INTERPRETED]) == INTERPRETED


@pytest.mark.parametrize("is_causal", [False, True, None])
def test_mixed_sliding_and_full_layers_are_served_as_they_are_evaluated(
    is_causal: bool | None, draft: Path, target: Target, tmp_path: Path
) -> None:
    prompts, ours = target.ids[:INTERPRETED], {}
    for full in (0, 1):
        mixed = changed(draft, tmp_path / f"{full}", partial(windows, is_causal=is_causal, full_layers=full))
        loaded = load_draft(mixed)
        ours[full] = [target.decode(loaded, prompt) for prompt in prompts]
    assert [one.kept for one in ours[0]] != [one.kept for one in ours[1]], "the full layer is to be felt"
    found = decode_live(tmp_path, mixed, prompts, new_runner=True)
    assert found.tokens == target.plain[:INTERPRETED]
    assert found.equal_prompts(ours[1]) == INTERPRETED


def rounds_of_tokens(taken: list[list[int]], tokens: list[list[int]]) -> tuple[float, float]:
    """Return the rounds for each token behind the first, and the standard error of that ratio over prompts."""
    rounds = torch.tensor([len(one) for one in taken], dtype=torch.float64)
    behind = torch.tensor([len(one) - 1 for one in tokens], dtype=torch.float64)
    ratio = rounds.sum() / behind.sum()
    return float(ratio), float((rounds - ratio * behind).square().sum().sqrt() / behind.sum())


@pytest.mark.parametrize(("policy", "proposal"), [("greedy", "greedy"), ("probabilistic", "drawn")])
def test_drawn_answers_take_as_many_rounds_as_in_eval(
    policy: str, proposal: Proposal, draft: Path, target: Target, tmp_path: Path
) -> None:
    rule, cpu, loaded = SamplingRule(temperature=TEMPERATURE), torch.device("cpu"), load_draft(draft)
    choosers = [Sampler(rule, seed, cpu, proposal=proposal) for seed in range(NUM_PROMPTS)]
    ours = [target.decode(loaded, prompt, chooser) for prompt, chooser in zip(target.ids, choosers, strict=True)]
    own_rate, own_error = rounds_of_tokens([one.produced for one in ours], [one.tokens for one in ours])
    settings = {"draft_sample_method": policy}
    found = decode_live(tmp_path, draft, target.ids, temperature=TEMPERATURE, settings=settings)
    rate, error = rounds_of_tokens(found.accepted, found.tokens)
    assert abs(rate - own_rate) < 4 * (error**2 + own_error**2) ** 0.5, (rate, error, own_rate, own_error)


@torch.inference_mode()
def next_token(target: Target, ids: list[int], temperature: float) -> torch.Tensor:
    """Return the target's own distribution of the token behind `ids`, float64 [V]."""
    logits = target.model(torch.tensor([ids])).logits[0, -1].double()
    return (logits / temperature).softmax(-1)


def test_drawn_tokens_are_distributed_as_the_targets_own(draft: Path, target: Target, tmp_path: Path) -> None:
    """Each drawn token's place among the target's own probabilities, likeliest first, is spread evenly over 0 to 1."""
    temperature, draws = 2.0, 40 * NUM_PROMPTS
    prompt = target.ids[2]
    found = decode_live(tmp_path, draft, [prompt] * draws, temperature=temperature, max_new_tokens=4)
    behind = defaultdict[tuple[int, ...], list[int]](list)
    for tokens in found.tokens:  # the first token is drawn from the prompt alone, the others are drafted and verified
        for length, token in enumerate(tokens):
            behind[tuple(tokens[:length])].append(token)
    places, generator = [], torch.Generator().manual_seed(0)
    for before, after in behind.items():
        ordered, order = next_token(target, [*prompt, *before], temperature).sort(descending=True)
        rank = order.argsort()[torch.tensor(after)]
        within = torch.rand(len(after), generator=generator, dtype=torch.float64)
        places.append((ordered.cumsum(0) - ordered)[rank] + within * ordered[rank])
    counts = torch.cat(places).histc(20, 0, 1)
    assert counts.sum() > 3 * draws and max(map(len, found.accepted)) > 0 and sum(map(sum, found.accepted)) > draws / 10
    expected = counts.sum() / 20
    statistic = float(((counts - expected).square() / expected).sum())
    assert statistic < 19 + 5 * 38**0.5, counts  # chi-square of 19 degrees of freedom, five deviations off


def test_in_bfloat16_rounds_and_answers_stay_near_those_of_float32(
    draft: Path, target: Target, own: list[SpeculativeDecoding], tmp_path: Path
) -> None:
    """Near, not equal: bfloat16 keeps 8 bits, so that two tokens of nearly one logit change places.

    What is held: each token's logit in the float32 target, given the tokens before it, lies within 0.5 of the best,
    and the rounds for a token within a tenth of float32's.
    """
    found = decode_live(tmp_path, draft, target.ids, dtype="bfloat16")
    gaps = []
    for prompt, tokens in zip(target.ids, found.tokens, strict=True):
        with torch.inference_mode():
            logits = target.model(torch.tensor([prompt + tokens[:-1]])).logits[0, len(prompt) - 1 :]
        gaps.append(logits.amax(-1) - logits.gather(1, torch.tensor(tokens)[:, None])[:, 0])
    assert torch.cat(gaps).max() < 0.5
    rate, _ = rounds_of_tokens(found.accepted, found.tokens)
    own_rate, _ = rounds_of_tokens([one.produced for one in own], target.plain)
    assert abs(rate / own_rate - 1) < 0.1


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
