"""The command line: what bad input is told, and what a script can read."""

import json
import shutil
from pathlib import Path

import pytest
from running import dflash, refused
from safetensors.torch import load_file, save_file
from tiny_target import WITHOUT_TAGS, save_conversations, save_target, save_tokenizer

from dflash_offline.stages.store.cache import Cache


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
    sample = Cache(cache).samples.row.tolist().index(1)  # of two turns
    text = dflash("inspect", cache, "--sample", sample).stdout
    view = json.loads(dflash("inspect", cache, "--sample", sample, "--json").stdout)
    answers = [run["text"] for run in view["runs"] if run["supervised"]]
    *able, tail = answers  # the last answer's end is too short for a block
    assert len(able) == 2 and all(f"[[{answer}]]" in text for answer in able)
    assert f"[[{able[1]}]](({tail}))" in text and all(end.endswith("<|im_end|>") for end in (able[0], tail))
    assert sum(run["tokens"] for run in view["runs"] if run["supervised"]) == view["supervised"]


def test_inspect_shows_a_row_before_anything_is_extracted(
    target: Path, data: Path, cache: Path, tmp_path: Path
) -> None:
    sample = Cache(cache).samples.row.tolist().index(4)  # samples are ordered by length
    planned = json.loads(dflash("inspect", cache, "--sample", sample, "--json").stdout)
    arguments = ("inspect", data, "--target", target, "--block-size", planned["block_size"])
    row = json.loads(dflash(*arguments, "--sample", 3, "--json").stdout)
    assert {name: row[name] for name in ("tokens", "supervised", "anchors", "source", "runs")} == {
        name: planned[name] for name in ("tokens", "supervised", "anchors", "source", "runs")
    }
    assert row["line"] == 4 and row["roles"] == ["user", "assistant"] * 2 and row["left_out"] is None
    text = dflash(*arguments, "--sample", 3).stdout
    assert all(f"[[{run['text']}]]" in text for run in row["runs"] if run["anchor"])
    last = json.loads(dflash(*arguments, "--sample", 3, "--mask", "last-turn", "--json").stdout)
    assert [run["anchor"] for run in last["runs"]].count(True) == 1 and 0 < last["supervised"] < row["supervised"]
    cut = json.loads(dflash(*arguments, "--sample", 3, "--max-length", 30, "--json").stdout)
    assert cut["tokens"] == 30 and cut["truncated_supervised"] > 0
    refused(dflash(*arguments, "--sample", 80), "has no row 80")


def test_inspect_says_why_a_row_would_be_left_out(target: Path, tmp_path: Path) -> None:
    lines = [
        "nonsense",
        '{"messages": [{"role": "user", "content": "a <|im_end|>"}]}',
        '{"messages": [{"role": "user", "content": "a\\u001b[31m"}]}',
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(lines))
    said = [dflash("inspect", path, "--target", target, "--sample", i).stdout for i in range(3)]
    assert "LEFT OUT    bad row: is not JSON" in said[0]
    assert "LEFT OUT    special token in content: messages[0].content spells" in said[1]
    assert "LEFT OUT    no supervised token" in said[2] and "a\\x1b[31m" in said[2] and "\033" not in said[2]


def test_an_unknown_option_is_a_usage_error() -> None:
    assert dflash("extract", "--no-such-option").exit_code == 2
    assert "dflash-offline" in dflash("--version").stdout


def test_outputs_that_cannot_become_a_folder_are_refused_before_any_work(
    data: Path, target: Path, cache: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("mine")
    monkeypatch.chdir(tmp_path)
    commands = {"extract": [data, "--target", target], "train": [cache], "export": [run]}
    for command, arguments in commands.items():
        refused(dflash(command, *arguments, "--out", tmp_path / "file/inside"), "is not a folder")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    for command in ("extract", "export"):
        refused(dflash(command, *commands[command], "--out", "."), "working directory", "--out new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file"]


def test_a_link_to_an_empty_folder_is_a_fine_output(run: Path, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert dflash("export", run, "--out", tmp_path / "link").exit_code == 0
    assert (tmp_path / "real/model.safetensors").is_file()


def test_a_target_with_damaged_or_missing_weights_is_refused(data: Path, target: Path, tmp_path: Path) -> None:
    cut = Path(shutil.copytree(target, tmp_path / "cut"))
    weights = cut / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    refused(dflash("extract", data, "--target", cut, "--out", tmp_path / "cache"), "cannot load the model")
    hole = Path(shutil.copytree(target, tmp_path / "hole"))
    tensors = load_file(hole / "model.safetensors")
    del tensors["model.layers.1.mlp.down_proj.weight"]
    save_file(tensors, hole / "model.safetensors", metadata={"format": "pt"})
    result = dflash("extract", data, "--target", hole, "--out", tmp_path / "cache")
    refused(result, "lacks 1 weights", "model.layers.1.mlp.down_proj.weight")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("text", ["{", "[1]", '{"hidden_size": 32}', None])
def test_a_draft_with_a_broken_config_is_refused(
    draft: Path, target: Path, data: Path, tmp_path: Path, text: str
) -> None:
    copy = Path(shutil.copytree(draft, tmp_path / "draft", ignore=shutil.ignore_patterns("checksums.json")))
    if text is None:
        text = json.dumps(json.loads((copy / "config.json").read_text()) | {"head_dim": "8"})
    (copy / "config.json").write_text(text)
    refused(dflash("eval", copy, "--target", target, "--prompts", data), str(copy / "config.json"))


def test_a_place_where_the_result_cannot_be_saved_is_refused_first(
    draft: Path, target: Path, data: Path, tmp_path: Path
) -> None:
    for place in (tmp_path, tmp_path / "none/eval.json"):
        refused(dflash("eval", draft, "--target", target, "--prompts", data, "--save", place), "--save")


def test_settings_out_of_range_are_refused(cache: Path, data: Path, target: Path, tmp_path: Path) -> None:
    flags = ["--seed", -1, "--weight-decay", -1, "--gamma", 0, "--draft-layers", 0, "--block-size", 0]
    said = ["seed is -1", "weight_decay is -1", "gamma is 0", "draft_layers is 0", "block_size is 0"]
    refused(dflash("train", cache, "--out", tmp_path / "run", *flags), *said)
    refused(dflash("train", cache, "--out", tmp_path / "run", "--device", "foo"), "device is 'foo'")
    template = ["--chat-template-kwargs", '{"tokenize": true}']
    refused(dflash("extract", data, "--target", target, "--out", tmp_path / "cache", *template), "tokenize")
    assert list(tmp_path.iterdir()) == []


def test_repeated_conversations_never_leave_training_empty(target: Path, data: Path, tmp_path: Path) -> None:
    repeated = tmp_path / "chats.jsonl"
    repeated.write_text("".join(data.read_text().splitlines(keepends=True)[:4]) * 10)
    cache = tmp_path / "cache"
    assert dflash("extract", repeated, "--target", target, "--out", cache, "--block-size", 8).exit_code == 0
    trained = dflash("train", cache, "--out", tmp_path / "run", "--steps", 2, "--draft-layers", 1, "--json")
    assert json.loads(trained.stdout)["train_samples"] == 40


def test_a_run_killed_before_its_record_was_in_place_starts_again(cache: Path, tmp_path: Path) -> None:
    (tmp_path / ".run.json").write_text("half of a rec")
    assert dflash("train", cache, "--out", tmp_path, "--steps", 1, "--draft-layers", 1).exit_code == 0


def test_conversations_are_cut_at_the_targets_positions(data: Path, tmp_path: Path) -> None:
    short = save_target(tmp_path / "short", max_position_embeddings=100)
    result = dflash("extract", data, "--target", short, "--out", tmp_path / "cache", "--block-size", 8)
    assert result.exit_code == 0 and "has 100 positions" in result.stderr
    assert json.loads(dflash("inspect", tmp_path / "cache", "--json").stdout)["length"]["most"] == 100


def test_a_draft_folder_is_exported_by_its_target_and_a_run_by_its_own(
    draft: Path, run: Path, target: Path, tmp_path: Path
) -> None:
    told = dflash("export", draft, "--out", tmp_path / "spec", "--format", "speculators", "--target", target)
    assert told.exit_code == 0 and (tmp_path / "spec/config.json").is_file()
    refused(dflash("export", draft, "--out", tmp_path / "none"), "--target")
    refused(dflash("export", draft, "--out", tmp_path / "none", "--checkpoint", "last", "--target", target), "of a run")
    refused(dflash("export", run, "--out", tmp_path / "none", "--target", target), "knows its target")
    assert not (tmp_path / "none").exists()
