"""`dflash diagnose` names each mistake that is planted in a real vLLM, and none in one that serves as it should."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from live_vllm import launch_line, served
from safetensors.torch import load_file, save_file

from dflash_offline.pipeline.demo import CONVERSATIONS, PROMPTS, TARGET
from dflash_offline.schemas.settings.diagnose import DiagnoseConfig
from dflash_offline.schemas.settings.extract import ExtractConfig
from dflash_offline.schemas.settings.train import TrainConfig
from dflash_offline.stages.diagnose import diagnose
from dflash_offline.stages.evaluation.diagnosis import changes
from dflash_offline.stages.evaluation.diagnosis.findings import EACH_PROMPT, EXPLAINED, HEALTHY, Diagnosis
from dflash_offline.stages.export import export
from dflash_offline.stages.extract import extract
from dflash_offline.stages.progress import Silent
from dflash_offline.stages.train import train

pytestmark = pytest.mark.vllm
ENOUGH = 60
NUM_PROMPTS = min(int(os.environ.get("DFLASH_VLLM_PROMPTS", ENOUGH)), ENOUGH)
telling = pytest.mark.skipif(NUM_PROMPTS < ENOUGH, reason="fewer prompts do not tell a mistake from chance")
Config = dict[str, Any]


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded target, with a thinking mode that its template begins an answer with."""
    folder = tmp_path_factory.mktemp("target") / "target"
    shutil.copytree(TARGET, folder)
    path, begins = folder / "chat_template.jinja", "{{- '<|im_start|>assistant\\n' }}{%- endif %}"
    text = path.read_text()
    assert text.endswith(begins)
    thinks = "{%- if enable_thinking is defined and enable_thinking %}{{- '<think>\\n' }}{%- endif %}{%- endif %}"
    path.write_text(text.removesuffix("{%- endif %}") + thinks)
    return folder


@pytest.fixture(scope="module")
def cache(target: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("embedded")
    data = folder / "chats.jsonl"
    data.write_text("".join(CONVERSATIONS.read_text().splitlines(keepends=True)[:800]))
    extract(ExtractConfig(data=(data,), target=str(target), out=folder / "cache", block_size=8, shard_mib=64), Silent())
    return folder / "cache"


@pytest.fixture(scope="module")
def draft(cache: Path) -> Path:
    settings = {"steps": 300, "optimizer": "muon", "learning_rate": 6e-3, "draft_layers": 2, "num_anchors": 16}
    settings |= {"packing": False, "batch_size": 16, "val_samples": NUM_PROMPTS, "loss": "dpace"}
    train(TrainConfig(caches=(cache,), out=cache.parent / "run", **settings), Silent())
    return export(cache.parent / "run", cache.parent / "draft").draft


def layers(shift: int) -> Callable[[Config], None]:
    def change(config: Config) -> None:
        for place in (config, config["dflash_config"]):
            place["target_layer_ids"] = [i + shift for i in place["target_layer_ids"]]

    return change


def causal(config: Config) -> None:
    config["is_causal"] = config["dflash_config"]["causal"] = True


def end_of_turn_as_mask(config: Config) -> None:
    for place in (config, config["dflash_config"]):
        place["mask_token_id"] = 2


def rotary_base(config: Config) -> None:
    config["rope_theta"] = config["rope_parameters"]["rope_theta"] = config["rope_theta"] * 100


IN_CONFIG = {
    "ids + 1": (layers(1), changes.LAYERS, "target layers +1"),
    "ids - 1": (layers(-1), changes.LAYERS, "target layers -1"),
    "causal": (causal, changes.CAUSALITY, "causal blocks"),
    "mask token": (end_of_turn_as_mask, changes.MASK_TOKEN, "mask token 2"),
    "rotary base": (rotary_base, changes.ROTARY, "rotary base 1e+06"),
}


def diagnosed(draft: Path, cache: Path, line: list[str], log: Path, **settings: Any) -> Diagnosis:
    """Serve by a launch line, and return what is said of that server."""
    with served(line, log) as url:
        return diagnose(DiagnoseConfig(draft=draft, cache=cache, server=url, limit=NUM_PROMPTS, **settings))


def found(diagnosis: Diagnosis) -> list[tuple[str, tuple[str, ...]]]:
    assert diagnosis.scope == EACH_PROMPT
    return [(one.cause, one.titles) for one in diagnosis.causes]


def test_a_healthy_server_is_not_accused(draft: Path, cache: Path, tmp_path: Path) -> None:
    diagnosis = diagnosed(draft, cache, launch_line(draft), tmp_path / "log")
    assert (diagnosis.outcome, found(diagnosis)) == (HEALTHY, [])
    assert diagnosis.tried[0].same_prompts == diagnosis.texts, "every prompt's counts are those of the walk"
    assert diagnosis.served is not None and diagnosis.served.length > 2, "the draft is to have learned something"


@telling
@pytest.mark.parametrize("mistake", IN_CONFIG)
def test_a_mistake_in_the_served_config_is_named(mistake: str, draft: Path, cache: Path, tmp_path: Path) -> None:
    change, cause, title = IN_CONFIG[mistake]
    shutil.copytree(draft, tmp_path / "planted", ignore=shutil.ignore_patterns("checksums.json"))
    path = tmp_path / "planted/config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))
    diagnosis = diagnosed(draft, cache, launch_line(tmp_path / "planted"), tmp_path / "log")
    assert (diagnosis.outcome, found(diagnosis)) == (EXPLAINED, [(cause, (title,))])


@telling
def test_a_block_that_is_served_longer_is_named(draft: Path, cache: Path, tmp_path: Path) -> None:
    line = [word.replace('"num_speculative_tokens": 7', '"num_speculative_tokens": 9') for word in launch_line(draft)]
    assert found(diagnosed(draft, cache, line, tmp_path / "log")) == [(changes.BLOCK, ("blocks of 10",))]


@telling
def test_another_target_of_the_same_shape_is_named(draft: Path, cache: Path, target: Path, tmp_path: Path) -> None:
    other = shutil.copytree(target, tmp_path / "other")
    weights, generator = load_file(target / "model.safetensors"), torch.Generator().manual_seed(5)
    for name, weight in weights.items():
        weights[name] = (weight * (1 + 0.05 * torch.randn(weight.shape, generator=generator))).to(weight.dtype)
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    line = [str(other) if word == str(target) else word for word in launch_line(draft)]
    assert str(other) in line
    assert [cause for cause, _ in found(diagnosed(draft, cache, line, tmp_path / "log"))] == [changes.TARGET]


@telling
def test_a_thinking_mode_that_was_not_trained_is_named(draft: Path, cache: Path, tmp_path: Path) -> None:
    line = [*launch_line(draft), "--default-chat-template-kwargs", '{"enable_thinking": true}']
    diagnosis = diagnosed(draft, cache, line, tmp_path / "log", prompts=PROMPTS)
    assert found(diagnosis) == [(changes.TEMPLATE, ("enable_thinking=true",))]
