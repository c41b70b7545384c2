"""`dflash diagnose` names what was planted in a server, from the server's counters, and accuses no healthy draft."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from live_server import LiveServer
from planted import PlantedServer
from running import dflash
from tiny_target import save_target

from dflash_offline.schemas.errors import DflashError
from dflash_offline.schemas.settings.diagnose import DiagnoseConfig
from dflash_offline.schemas.settings.evaluate import EvalConfig
from dflash_offline.schemas.settings.extract import ExtractConfig
from dflash_offline.schemas.settings.train import TrainConfig
from dflash_offline.stages.conversations.prompts import Prompt, encode_prompt
from dflash_offline.stages.conversations.reading.public_sets import chosen_rows
from dflash_offline.stages.diagnose import diagnose
from dflash_offline.stages.draft.decode import plain_decode
from dflash_offline.stages.draft.weights import load_draft
from dflash_offline.stages.eval_served import evaluate_served
from dflash_offline.stages.evaluate import evaluate_folder, stop_ids
from dflash_offline.stages.evaluation.diagnosis import changes
from dflash_offline.stages.evaluation.diagnosis.findings import (
    EACH_PROMPT,
    EXPLAINED,
    HEALTHY,
    OTHER_PROMPTS,
    SAME_PROMPTS,
    Diagnosis,
)
from dflash_offline.stages.export import export
from dflash_offline.stages.extract import extract
from dflash_offline.stages.progress import Silent
from dflash_offline.stages.target.files import open_target
from dflash_offline.stages.target.model import load_model
from dflash_offline.stages.train import train

NUM_TEXTS, NEW_TOKENS = 48, 24
IN_FLOAT32: dict[str, Any] = {"dtype": torch.float32, "device": torch.device("cpu")}


@dataclass(frozen=True)
class Setting:
    target: Path
    model: Any
    draft: Path
    cache: Path
    stops: frozenset[int]

    def server(self, fault: str) -> PlantedServer:
        return PlantedServer(self.model, load_draft(self.draft), fault, self.stops)


def texts(model: Any, stops: frozenset[int]) -> list[dict[str, list[int]]]:
    """Return samples whose answers are a target's own."""
    draw, rows = torch.Generator().manual_seed(0), []
    for _ in range(NUM_TEXTS):
        prompt = torch.randint(10, 260, (8,), generator=draw).tolist()
        answer = plain_decode(model, prompt, NEW_TOKENS, stops).tokens
        rows.append({"input_ids": prompt + answer, "loss_mask": [0] * len(prompt) + [1] * len(answer)})
    return rows


@pytest.fixture(scope="module")
def setting(target: Path, tmp_path_factory: pytest.TempPathFactory) -> Setting:
    """A draft that has learned its texts by heart, and a cache of the same texts that did not train it."""
    folder = tmp_path_factory.mktemp("diagnose")
    files = open_target(str(target))
    model = load_model(files, **IN_FLOAT32)
    stops = stop_ids(model, files.tokenizer)
    data = folder / "texts.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in texts(model, stops)))
    for name, chunk_tokens in (("cache", 32), ("trained", 64)):
        settings = {"layers": (1, 2, 3), "block_size": 8, "shard_mib": 1, "chunk_tokens": chunk_tokens}
        extract(ExtractConfig(data=(data,), target=str(target), out=folder / name, **settings), Silent())
    settings = {"steps": 150, "optimizer": "muon", "learning_rate": 1e-2, "draft_layers": 1, "num_anchors": 16}
    settings |= {"packing": False, "batch_size": 8, "val_samples": 0}
    train(TrainConfig(caches=(folder / "trained",), out=folder / "run", **settings), Silent())
    draft = export(folder / "run", folder / "draft").draft
    return Setting(target, model, draft, folder / "cache", stops)


def diagnosed(setting: Setting, **settings: Any) -> Diagnosis:
    settings = {"draft": setting.draft, "cache": setting.cache, "max_new_tokens": NEW_TOKENS} | settings
    return diagnose(DiagnoseConfig(**settings))


def served_with(setting: Setting, fault: str, **settings: Any) -> Diagnosis:
    """Return what is said of a server with a fault, which is asked itself."""
    drafted = 9 if fault == "block of K + 2" else 7
    with LiveServer(decode=setting.server(fault).decode, num_drafted=drafted) as server:
        return diagnosed(setting, server=server.url, **settings)


PLANTED = {
    "ids - 1": (changes.LAYERS, "target layers -1"),
    "causal": (changes.CAUSALITY, "causal blocks"),
    "mask token": (changes.MASK_TOKEN, "mask token 2"),
    "rotary base": (changes.ROTARY, "rotary base 1e+06"),
    "block of K + 2": (changes.BLOCK, "blocks of 10"),
    "anchor": (changes.ANCHOR, "context that includes the anchor"),
}


def test_a_healthy_server_has_the_rounds_of_the_walk_and_is_not_accused(setting: Setting) -> None:
    found = served_with(setting, "healthy", limit=12)
    assert (found.outcome, found.causes, found.scope) == (HEALTHY, (), EACH_PROMPT)
    assert found.tried[0].same_prompts == found.texts == 12
    assert found.served is not None and found.served == found.tried[0].rates
    assert len({one.cause for one in found.tried}) >= 7


def test_layers_that_are_off_by_one_are_named_with_what_to_do(setting: Setting) -> None:
    found = served_with(setting, "ids + 1", limit=32)
    assert found.outcome == EXPLAINED
    assert [(one.cause, one.titles) for one in found.causes] == [(changes.LAYERS, ("target layers +1",))]
    assert {"z-lab", "vLLM", "SGLang"} == found.causes[0].remedies.keys()
    assert all("[1, 2, 3]" in text for text in found.causes[0].remedies.values())


@pytest.mark.slow
@pytest.mark.parametrize("fault", PLANTED)
def test_every_other_mistake_is_named(fault: str, setting: Setting) -> None:
    found = served_with(setting, fault)
    cause, title = PLANTED[fault]
    assert [one.cause for one in found.causes] == [cause]
    assert title in found.causes[0].titles


def test_another_target_shows_in_its_answers(setting: Setting, tmp_path: Path) -> None:
    other = load_model(open_target(str(save_target(tmp_path / "other", seed=1))), **IN_FLOAT32)
    planted = PlantedServer(other, load_draft(setting.draft), "healthy", setting.stops)
    with LiveServer(decode=planted.decode) as server:
        found = diagnosed(setting, server=server.url, limit=4)
    assert changes.TARGET in [one.cause for one in found.causes]
    assert "4 of 4 answers" in next(one.evidence for one in found.causes if one.cause == changes.TARGET)


@pytest.mark.slow
def test_a_saved_evaluation_of_the_same_prompts_suffices(setting: Setting, tmp_path: Path) -> None:
    asked = {"draft": setting.draft, "cache": setting.cache, "max_new_tokens": NEW_TOKENS, "limit": 12}
    outcomes = []
    for fault in ("healthy", "ids + 1"):
        with LiveServer(decode=setting.server(fault).decode) as server:
            result = evaluate_served(EvalConfig(server=server.url, **asked))
        (tmp_path / "eval.json").write_text(json.dumps(result.to_json()))
        found = diagnosed(setting, served=str(tmp_path / "eval.json"), limit=12)
        assert found.scope == SAME_PROMPTS
        outcomes.append((found.outcome, [title for one in found.causes for title in one.titles]))
    assert outcomes == [(HEALTHY, []), (EXPLAINED, ["target layers +1"])]
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "How many?"}\n' * 3)
    fewer = diagnosed(setting, served=str(tmp_path / "eval.json"), prompts=tmp_path / "prompts.jsonl")
    assert fewer.scope == OTHER_PROMPTS, "three prompts cannot be the twelve that were served"


def test_a_saved_evaluation_of_a_public_set_is_of_the_prompts_that_its_seed_drew(
    setting: Setting, tmp_path: Path
) -> None:
    drawn = chosen_rows(6, 2, 5)
    assert set(drawn) != set(chosen_rows(6, 2, 0)), "rows of another draw hold no question, and are refused"
    rows = [{"question": f"How many is {i}?"} if i in drawn else {} for i in range(6)]
    (tmp_path / "copy.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = open_target(str(setting.target)).tokenizer
    planted = setting.server("healthy")
    planted.render = lambda messages: encode_prompt(Prompt(place="asked", messages=messages), tokenizer, {})
    prompts = Path(f"gsm8k:{tmp_path / 'copy.jsonl'}")
    with LiveServer(decode=planted.decode) as server:
        asked = {"draft": setting.draft, "prompts": prompts, "limit": 2, "seed": 5, "max_new_tokens": NEW_TOKENS}
        result = evaluate_served(EvalConfig(server=server.url, **asked))
    (tmp_path / "eval.json").write_text(json.dumps(result.to_json()))
    found = diagnosed(setting, served=str(tmp_path / "eval.json"))
    assert (found.scope, found.texts, found.outcome) == (SAME_PROMPTS, 2, HEALTHY)
    assert found.served == found.tried[0].rates


def test_shares_from_a_log_name_a_mistake_of_large_effect(setting: Setting) -> None:
    rows = {one.title: one.rates for one in diagnosed(setting, rerun=False).tried}
    shares = ",".join(f"{share:.3f}" for share in rows["rotary base 100"].shares)
    found = diagnosed(setting, served=shares, served_rounds=5000, rerun=False)
    assert found.scope == OTHER_PROMPTS and found.outcome == EXPLAINED
    assert any("rotary base 100" in one.titles for one in found.causes)
    healthy = ",".join(f"{share:.3f}" for share in rows["as trained"].shares)
    assert diagnosed(setting, served=healthy, rerun=False).outcome == HEALTHY
    assert any("cache does not hold" in what for what in found.not_tried)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"served": "0.3,0.4"}, "none above the one before"),
        ({"served": "much"}, "expected shares"),
        ({"served": "1.2"}, "from 0 to 1"),
        ({"served": "0.3", "server": "http://127.0.0.1:1"}, "not both"),
        ({"server": "nowhere"}, "expected a URL"),
        ({"served_rounds": 5}, "give them"),
        ({"served": "0.3", "model": "m"}, "give --server URL too"),
        ({"server": "http://127.0.0.1:1", "rerun": False}, "Name the target"),
        ({"server": "http://127.0.0.1:1"}, "the server is up"),
        ({"target": "nowhere"}, "nowhere"),
    ],
)
def test_what_cannot_be_diagnosed_is_refused(settings: dict[str, Any], says: str, setting: Setting) -> None:
    with pytest.raises(DflashError, match=says):
        diagnosed(setting, **settings)


def test_a_result_without_a_servers_counts_is_refused(setting: Setting, tmp_path: Path) -> None:
    result = evaluate_folder(EvalConfig(draft=setting.draft, cache=setting.cache))
    (tmp_path / "eval.json").write_text(json.dumps(result.to_json()))
    with pytest.raises(DflashError, match="no counts of a live server"):
        diagnosed(setting, served=str(tmp_path / "eval.json"))
    with pytest.raises(DflashError, match=r"holds its rounds.* Leave it out"):
        diagnosed(setting, served=str(tmp_path / "eval.json"), served_rounds=5)


def test_the_command_prints_a_table_and_exits_1_for_a_cause(setting: Setting, tmp_path: Path) -> None:
    command = ["diagnose", setting.draft, "--cache", setting.cache, "--no-rerun", "--quiet", "--limit", "6"]
    saved = tmp_path / "diagnosis.json"
    shown = dflash(*command)
    assert shown.exit_code == 0 and "causal blocks" in shown.stdout
    found = dflash(*command, "--served", "0.02,0,0,0,0,0,0", "--served-rounds", "1000", "--save", saved)
    assert found.exit_code == 1 and not found.stderr
    document = json.loads(saved.read_text())
    assert document["served"]["shares"][0] == 0.02 and document["outcome"] in (EXPLAINED, "unexplained")
    assert max(map(len, found.stdout.splitlines())) <= 100
