"""The command line: what bad input is told, and what a script can read."""

import json
import shutil
from pathlib import Path

import pytest
from tiny_target import WITHOUT_TAGS, save_conversations, save_target, save_tokenizer
from typer.testing import CliRunner, Result

from dflash_offline.pipeline.app import app
from dflash_offline.schemas.config import TrainConfig
from dflash_offline.stages.progress import Silent
from dflash_offline.stages.train import train


def dflash(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refused(result: Result, *said: str) -> None:
    """Check for one clear message and exit 1."""
    assert result.exit_code == 1, (result.output, result.exception)
    assert result.stderr.startswith("dflash: ") or "\ndflash: " in result.stderr
    assert "Traceback" not in result.stderr
    for part in said:
        assert part in result.stderr, result.stderr


@pytest.fixture(scope="module")
def run(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "run"
    train(TrainConfig(cache=cache, out=out, steps=4, draft_layers=1, num_anchors=4, device="cpu"), Silent())
    return out


@pytest.fixture(scope="module")
def draft(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("draft") / "draft"
    assert dflash("export", run, "--out", out).exit_code == 0
    return out


def test_a_missing_data_file_is_named(target: Path, tmp_path: Path) -> None:
    missing, out = tmp_path / "none.jsonl", tmp_path / "cache"
    refused(dflash("extract", missing, "--target", target, "--out", out), str(missing), "JSONL")
    assert not out.exists()


@pytest.mark.parametrize("name", ["empty", "nowhere/at/all", "broken"])
def test_a_folder_that_is_no_model_is_refused(data: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/config.json").write_text('{"model_type": "no-such-model"}')
    refused(dflash("extract", data, "--target", tmp_path / name, "--out", tmp_path / "cache"), name.split("/")[0])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "empty"]


def test_a_model_without_weights_is_refused(data: Path, target: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(target, tmp_path / "target")
    (copy / "model.safetensors").unlink()
    refused(dflash("extract", data, "--target", copy, "--out", tmp_path / "cache"), "holds no weights")


def test_broken_json_is_named_with_its_line(data: Path, target: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.jsonl"
    broken.write_text(data.read_text() + '{"messages": [\n')
    result = dflash("extract", broken, "--target", target, "--out", tmp_path / "cache", "--block-size", 8)
    refused(result, f"{broken}:81 is not JSON", "--skip-bad-rows")
    assert [path.name for path in tmp_path.iterdir()] == ["broken.jsonl"]


def test_a_template_without_supervised_tokens_is_refused(data: Path, target: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(target, tmp_path / "target")
    save_tokenizer(copy, WITHOUT_TAGS + "{% generation %}{% endgeneration %}")
    result = dflash("extract", data, "--target", copy, "--out", tmp_path / "cache", "--block-size", 8)
    refused(result, "gives a sample to train on", "80 rows: no supervised token")
    assert not (tmp_path / "cache").exists()


def test_a_cache_of_another_target_is_refused(
    cache: Path, data: Path, tmp_path: Path, extract_config: dict[str, object]
) -> None:
    other = save_target(tmp_path / "other", seed=5)
    flags = ["--layers", "1,2,4", "--block-size", 8, "--shard-mib", 1, "--chunk-tokens", 32]
    result = dflash("extract", data, "--target", other, "--out", cache, *flags)
    refused(result, "target.weights_sha256.model.safetensors", "cache:", "now:")
    assert "layer_ids" not in result.stderr


@pytest.mark.parametrize("command", ["extract", "train", "export"])
def test_an_output_folder_with_something_else_is_refused(
    command: str, data: Path, target: Path, cache: Path, run: Path, tmp_path: Path
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    arguments = {"extract": [data, "--target", target], "train": [cache], "export": [run]}[command]
    refused(dflash(command, *arguments, "--out", tmp_path), str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_draft_that_does_not_fit_the_cache_is_refused(cache: Path, tmp_path: Path) -> None:
    refused(dflash("train", cache, "--out", tmp_path / "run", "--layers", "0,3"), "[1, 2, 4]", "[0, 3]")
    refused(dflash("train", cache, "--out", tmp_path / "run", "--draft-kv-heads", "3"), "num_key_value_heads 3")
    refused(dflash("train", cache, "--out", tmp_path / "run", "--block-size", "16"), "planned for blocks of 8")
    assert not (tmp_path / "run").exists()


def test_folders_that_are_not_what_a_command_reads_are_refused(cache: Path, run: Path, tmp_path: Path) -> None:
    refused(dflash("inspect", tmp_path), "is not a feature cache")
    refused(dflash("inspect", tmp_path / "none"), "is not a feature cache")
    refused(dflash("train", run, "--out", tmp_path / "run"), "is not a feature cache")
    refused(dflash("export", cache, "--out", tmp_path / "draft"), "is not a training run")
    refused(dflash("inspect", cache, "--sample", 80), "samples 0 to 79")


def test_bad_settings_are_named_all_at_once(cache: Path, tmp_path: Path) -> None:
    result = dflash("train", cache, "--out", tmp_path / "run", "--batch-size", 0, "--lr", 0, "--loss", "mse")
    refused(result, "batch_size is 0", "learning_rate is 0", "loss is 'mse'")
    refused(dflash("extract", "a", "--target", "b", "--out", "c", "--layers", "1;2"), "--layers 1,9,17")
    refused(dflash("extract", "a", "--target", "b", "--out", "c", "--chat-template-kwargs", "x"), "is not JSON")


def test_a_draft_that_does_not_fit_the_target_is_refused(draft: Path, data: Path, tmp_path: Path) -> None:
    other = save_target(tmp_path / "other", num_layers=8, hidden_size=48)
    result = dflash("eval", draft, "--target", other, "--prompts", data)
    refused(result, "hidden_size", "num_target_layers")


def test_the_pipeline_runs_end_to_end(target: Path, tmp_path: Path) -> None:
    data = save_conversations(tmp_path / "chats.jsonl", 60)
    prompts = save_conversations(tmp_path / "prompts.jsonl", 6, seed=9)
    cache, run, draft = (tmp_path / name for name in ("cache", "run", "draft"))
    made = dflash("extract", data, "--target", target, "--out", cache, "--block-size", 8, "--shard-mib", 1, "--json")
    assert made.exit_code == 0, made.output
    assert json.loads(made.stdout)["shards_left"] == 0
    seen = json.loads(dflash("inspect", cache, "--json").stdout)
    assert seen["samples"] == 60 and seen["layer_ids"] == [1, 2, 3] and 0 < seen["compression"] < 1
    assert [row["layer_id"] for row in seen["layers"]] == [1, 2, 3]
    trained = dflash("train", cache, "--out", run, "--steps", 12, "--draft-layers", 1, "--num-anchors", 8, "--json")
    assert json.loads(trained.stdout)["step"] == 12
    exported = dflash("export", run, "--out", draft, "--json")
    assert json.loads(exported.stdout)["step"] == 12
    assert dflash("export", run, "--out", draft).exit_code == 0  # the same again changes nothing
    flags = ["--prompts", prompts, "--max-new-tokens", 24, "--save", tmp_path / "eval.json", "--json"]
    result = dflash("eval", draft, "--target", target, *flags)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found == json.loads((tmp_path / "eval.json").read_text())
    assert found["lossless"] and found["identical"] == 6 and found["acceptance"]["pooled"] >= 1


def test_inspect_prints_a_sample_with_its_supervised_part_marked(cache: Path) -> None:
    text = dflash("inspect", cache, "--sample", 0).stdout
    view = json.loads(dflash("inspect", cache, "--sample", 0, "--json").stdout)
    answers = [run["text"] for run in view["runs"] if run["supervised"]]
    assert len(answers) == 2 and all(f"[[{answer}]]" in text and answer.endswith("<|im_end|>") for answer in answers)
    assert sum(run["tokens"] for run in view["runs"] if run["supervised"]) == view["supervised"]


def test_results_fit_eighty_columns_and_hold_no_colour_when_redirected(cache: Path) -> None:
    text = dflash("inspect", cache).stdout
    short = [line for line in text.splitlines() if not line.startswith(("Cache", "Target"))]
    assert max(map(len, short)) <= 80 and "\033" not in text


def test_an_unknown_option_is_a_usage_error() -> None:
    assert dflash("extract", "--no-such-option").exit_code == 2
    assert "dflash-offline" in dflash("--version").stdout
