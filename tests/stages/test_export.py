"""The exported folder against the table of the checkpoint contract, written out here by hand."""

import ast
import json
import shlex
import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dflash_offline.schemas.draft.checksums import checksum_faults
from dflash_offline.schemas.draft.config import DraftConfig
from dflash_offline.schemas.draft.formats import FORMATS, config_json
from dflash_offline.schemas.errors import DflashError, MismatchError
from dflash_offline.schemas.run import RunRecord
from dflash_offline.schemas.settings.train import TrainConfig
from dflash_offline.stages.draft.weights import load_draft
from dflash_offline.stages.export import export, export_draft
from dflash_offline.stages.export_card import card
from dflash_offline.stages.progress import Silent
from dflash_offline.stages.train import train
from dflash_offline.stages.training.checkpoint import choose_checkpoint, read_state, training_record


@pytest.fixture(scope="module")
def run(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "run"
    settings = {"steps": 6, "draft_layers": 2, "num_anchors": 4, "val_every": 2, "save_every": 2, "device": "cpu"}
    train(TrainConfig(caches=(cache,), out=out, **settings), Silent())
    return out


def test_the_weights_are_exactly_the_contracts_table(run: Path, tmp_path: Path) -> None:
    export(run, tmp_path / "draft")
    hidden, width, heads, kv_heads, inner, layers = 32, 8, 4, 2, 64, 3
    table = {"fc.weight": [hidden, layers * hidden], "hidden_norm.weight": [hidden], "norm.weight": [hidden]}
    for i in range(2):
        table |= {
            f"layers.{i}.input_layernorm.weight": [hidden],
            f"layers.{i}.post_attention_layernorm.weight": [hidden],
            f"layers.{i}.self_attn.q_proj.weight": [heads * width, hidden],
            f"layers.{i}.self_attn.k_proj.weight": [kv_heads * width, hidden],
            f"layers.{i}.self_attn.v_proj.weight": [kv_heads * width, hidden],
            f"layers.{i}.self_attn.o_proj.weight": [hidden, heads * width],
            f"layers.{i}.self_attn.q_norm.weight": [width],
            f"layers.{i}.self_attn.k_norm.weight": [width],
            f"layers.{i}.mlp.gate_proj.weight": [inner, hidden],
            f"layers.{i}.mlp.up_proj.weight": [inner, hidden],
            f"layers.{i}.mlp.down_proj.weight": [hidden, inner],
        }
    weights = load_file(tmp_path / "draft/model.safetensors")
    assert {name: list(tensor.shape) for name, tensor in weights.items()} == table
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    with safe_open(tmp_path / "draft/model.safetensors", "pt") as file:
        assert file.metadata()["format"] == "pt"


def test_the_config_has_every_field_some_client_needs_and_no_other(run: Path, tmp_path: Path) -> None:
    export(run, tmp_path / "draft")
    config = json.loads((tmp_path / "draft/config.json").read_text())
    ids, mask = [1, 2, 4], 3
    nested = {"block_size": 8, "mask_token_id": mask, "target_layer_ids": ids, "num_target_layers": 6}
    assert config == {
        "architectures": ["DFlashDraftModel"],
        "model_type": "qwen3",
        **nested,
        "dflash_config": {**nested, "causal": False},
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "intermediate_size": 64,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "vocab_size": 304,
        "max_position_embeddings": 512,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "layer_types": ["full_attention", "full_attention"],
        "sliding_window": None,
        "use_sliding_window": False,
        "max_window_layers": 2,
        "tie_word_embeddings": False,
        "use_cache": True,
        "dtype": "bfloat16",
    }


def test_best_is_the_checkpoint_with_the_best_serving_walk(run: Path) -> None:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    walks = {row["step"]: row["val_serving_walk"] for row in rows if "val_serving_walk" in row}
    best = max(walks, key=lambda step: (walks[step], -step))
    assert choose_checkpoint(run, "best").name == f"step-{best:07d}"
    assert choose_checkpoint(run, "last").name == "step-0000006"


def test_the_card_gives_each_server_the_number_it_counts(run: Path, tmp_path: Path) -> None:
    export(run, tmp_path / "draft")
    card = (tmp_path / "draft/README.md").read_text()
    assert '"num_speculative_tokens": 7' in card and "--speculative-num-draft-tokens 8" in card


@pytest.mark.parametrize("name", ['/my models/it\'s "big" $(x)|y', "plain/name", "back\\slash"])
@pytest.mark.parametrize("kind", FORMATS)
def test_the_cards_commands_run_with_any_name_of_a_target(run: Path, kind: str, name: str) -> None:
    record = RunRecord.read(run)
    record = replace(record, origin=record.origin | {"target": name})
    checkpoint = choose_checkpoint(run, "last")
    text = card(record, DraftConfig.read(checkpoint), read_state(checkpoint), kind, None, [])
    code = "\n".join(line.removeprefix("    ") for line in text.splitlines() if line.startswith("    "))
    if kind == "transformers":
        constants = {node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant)}
        assert name in constants
        return
    commands = [shlex.split(line) for line in code.replace("\\\n", "").splitlines() if line]
    vllm = next(words for words in commands if words[0] == "vllm")
    assert vllm[:4] == ["vllm", "serve", name, "--speculative-config"]
    asked = {
        "method": "dflash",
        "model": "THIS_FOLDER",
        "num_speculative_tokens": 7,
    }  # without a method it takes another
    assert json.loads(vllm[4]) == asked and len(vllm) == 5
    for words in commands:
        if words[0] == "python":
            assert words[3:5] == ["--model-path", name]


def test_weights_that_are_not_finite_are_refused(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    path = choose_checkpoint(copy, "last") / "model.safetensors"
    weights = load_file(path)
    weights["fc.weight"][0, 0] = float("nan")
    save_file(weights, path)
    with pytest.raises(DflashError, match="missing or damaged"):
        export(copy, tmp_path / "draft", "last")
    assert not (tmp_path / "draft").exists()


def test_an_existing_other_draft_is_not_overwritten(run: Path, tmp_path: Path) -> None:
    export(run, tmp_path / "draft")
    export(run, tmp_path / "draft")
    (tmp_path / "draft/config.json").write_text("{}")
    with pytest.raises(DflashError, match="holds something else"):
        export(run, tmp_path / "draft")
    assert [path.name for path in tmp_path.iterdir()] == ["draft"]


def eval_result(run: Path, **changes: object) -> dict[str, object]:
    """Return what the card needs of a result of `dflash eval` for the run's last checkpoint."""
    record = RunRecord.read(run)
    trained = training_record(record, read_state(choose_checkpoint(run, "last")).step)
    return {
        "trained": trained,
        "config": {"temperature": 0.0},
        "acceptance": {"pooled": 3.25, "mean": 3.5, "prompts": 12},
        "acceptance_by_kind": {"short": {"pooled": 2.125, "prompts": 4}},
        "dtype": "float32",
        "device": "cpu",
        "block_size": 8,
        "speedup": 1.75,
        **changes,
    }


def test_the_card_says_what_was_measured_if_it_was_with_this_checkpoint(run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    (tmp_path / "eval.json").write_text(json.dumps(eval_result(copy)))
    export(copy, tmp_path / "draft", "last", evaluation=tmp_path / "eval.json")
    card = (tmp_path / "draft/README.md").read_text()
    assert "3.25 tokens a round (mean of prompts 3.50) of at most 8, 1.75 times the target alone" in card
    assert "- short: 2.12 over 4 prompts" in card
    # Exported again without it, the card changes and the draft does not; a result in the run's folder is found.
    export(copy, tmp_path / "draft", "last")
    assert "3.25" not in (tmp_path / "draft/README.md").read_text()
    (copy / "eval.json").write_text(json.dumps(eval_result(copy)))
    export(copy, tmp_path / "draft", "last")
    assert "3.25" in (tmp_path / "draft/README.md").read_text()


def expected(concurrency: int, number: int) -> dict[str, object]:
    return {"concurrency": concurrency, "num_speculative_tokens": number, "speedup": [1.5, 2.0, 2.5, 2.25, 2, 2, 2]}


@pytest.mark.parametrize("kind", FORMATS)
def test_the_launch_lines_draft_as_many_tokens_as_was_found_fastest(run: Path, tmp_path: Path, kind: str) -> None:
    found = eval_result(run, draft_lengths={"expected": [expected(1, 3), expected(8, 2)]})
    (tmp_path / "eval.json").write_text(json.dumps(found))
    export(run, tmp_path / "draft", "last", kind, evaluation=tmp_path / "eval.json")
    card = (tmp_path / "draft/README.md").read_text()
    assert "With 1 request at a time, drafting 3 should be fastest, 2.50 times plain decoding." in card
    assert "With 8 requests at a time, drafting 2 should be fastest, 2.00 times plain decoding." in card
    if kind == "transformers":
        assert "then 3 speculative tokens in vLLM and 4 draft tokens in SGLang" in card
    else:
        assert '"num_speculative_tokens": 3}' in card
        assert ("--speculative-num-draft-tokens 4" in card) == (kind == "zlab")
    export(run, tmp_path / "plain", "last", kind)
    plain = (tmp_path / "plain/README.md").read_text()
    assert "should be fastest" not in plain and ("7 speculative" in plain or '"num_speculative_tokens": 7}' in plain)


def test_advice_to_draft_more_than_a_block_holds_is_refused(run: Path, tmp_path: Path) -> None:
    for number, error in ((8, DflashError), (7, None)):
        found = eval_result(run, draft_lengths={"expected": [{**expected(1, number), "speedup": None}]})
        (tmp_path / "eval.json").write_text(json.dumps(found))
        with pytest.raises(error, match="expected at most the block's 7") if error else nullcontext():
            export(run, tmp_path / "draft", "last", evaluation=tmp_path / "eval.json")


def test_the_card_names_both_ways_of_drafting(run: Path, tmp_path: Path) -> None:
    both = [
        {"name": name, "acceptance": {"pooled": n, "mean": n, "prompts": 12}}
        for name, n in (("greedy", 2.5), ("drawn", 2.75))
    ]
    found = eval_result(run, config={"temperature": 0.7}, proposals=both)
    (tmp_path / "eval.json").write_text(json.dumps(found))
    export(run, tmp_path / "draft", "last", evaluation=tmp_path / "eval.json")
    card = (tmp_path / "draft/README.md").read_text()
    assert (
        "- with drafted tokens taken greedily, as vLLM does: 2.50" in card
        and "- with drafted tokens drawn from the draft: 2.75" in card
    )


def test_a_result_without_a_round_is_a_dash_on_the_card(run: Path, tmp_path: Path) -> None:
    empty = {"pooled": None, "mean": None, "prompts": 2}
    found = eval_result(run, acceptance=empty, acceptance_by_kind={"short": empty}, speedup=None)
    (tmp_path / "eval.json").write_text(json.dumps(found))
    export(run, tmp_path / "draft", "last", evaluation=tmp_path / "eval.json")
    card = (tmp_path / "draft/README.md").read_text()
    assert "- tokens a round (mean of prompts -) of at most 8." in card and "- short: - over 2 prompts" in card


def test_a_result_of_another_draft_is_refused_when_asked_for_and_passed_over_when_found(
    run: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    for trained in (None, {"run": "0" * 64, "step": 6}):
        (copy / "eval.json").write_text(json.dumps(eval_result(copy, trained=trained)))
        with pytest.raises(MismatchError, match="another draft"):
            export(copy, tmp_path / "draft", "last", evaluation=copy / "eval.json")
        assert not (tmp_path / "draft").exists()
    (copy / "broken.json").write_text("[]")
    with pytest.raises(DflashError, match="Name a result of `dflash eval --save`"):
        export(copy, tmp_path / "draft", "last", evaluation=copy / "broken.json")
    export(copy, tmp_path / "draft", "last")
    assert "3.25" not in (tmp_path / "draft/README.md").read_text()


def test_the_formats_hold_the_same_weights_under_their_own_names(run: Path, tmp_path: Path) -> None:
    for kind in FORMATS:
        export(run, tmp_path / kind, kind=kind)
    plain, spec, own = (load_file(tmp_path / kind / "model.safetensors") for kind in FORMATS)
    renamed = {"fc.weight": "encoder.fc.weight", "hidden_norm.weight": "encoder.output_norm_enc.weight"}
    assert plain.keys() == spec.keys() and own.keys() == {renamed.get(name, name) for name in plain}
    for name, tensor in plain.items():
        assert torch.equal(tensor, spec[name]) and torch.equal(tensor, own[renamed.get(name, name)])
    config = json.loads((tmp_path / "speculators/config.json").read_text())
    assert config["aux_hidden_state_layer_ids"] == [2, 3, 5]
    assert config["speculators_config"]["proposal_methods"][0]["speculative_tokens"] == 7
    assert config["speculators_config"]["verifier"]["architectures"] == ["Qwen3ForCausalLM"]
    config = json.loads((tmp_path / "transformers/config.json").read_text())
    assert (config["target_layer_ids"], config["block_size"], config["mask_token_id"]) == ([1, 2, 4], 8, 3)
    assert config["layer_types"] == ["full_attention"] * 2
    with pytest.raises(DflashError, match="expected zlab, speculators or transformers"):
        export(run, tmp_path / "gguf", kind="gguf")


def test_the_speculators_format_names_the_target_wherever_the_cache_is(
    cache: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(cache.parent)
    settings = {"steps": 1, "draft_layers": 1, "num_anchors": 4, "ema": 0.9, "device": "cpu"}
    train(TrainConfig(caches=(Path(cache.name),), out=tmp_path / "run", **settings), Silent())
    monkeypatch.chdir(tmp_path)
    origin = RunRecord.read(tmp_path / "run").origin
    assert origin["caches"] == [str(cache.resolve())]
    monkeypatch.setattr("dflash_offline.stages.export._target_config", lambda record: None)
    export(tmp_path / "run", tmp_path / "draft", kind="speculators")
    config = json.loads((tmp_path / "draft/config.json").read_text())
    assert config["speculators_config"]["verifier"]["architectures"] == ["Qwen3ForCausalLM"]
    assert "ema 0.9" in (tmp_path / "draft/README.md").read_text()
    with pytest.raises(DflashError, match="names the target's architectures"):
        config_json(DraftConfig.read(choose_checkpoint(run, "last")), "speculators", "target", [])


def test_only_the_plain_format_is_read_back(run: Path, tmp_path: Path) -> None:
    for kind in FORMATS:
        export(run, tmp_path / kind, kind=kind)
    load_draft(tmp_path / "zlab")
    for kind in FORMATS[1:]:
        with pytest.raises(DflashError, match=rf"of the {kind} format; .* `dflash export --format zlab`"):
            load_draft(tmp_path / kind)


def test_each_formats_card_gives_each_server_the_number_it_counts(run: Path, tmp_path: Path) -> None:
    for kind in FORMATS[1:]:
        export(run, tmp_path / kind, kind=kind)
    card = (tmp_path / "speculators/README.md").read_text()
    assert '"num_speculative_tokens": 7' in card and "layer ids are 2, 3, 5" in card
    card = (tmp_path / "transformers/README.md").read_text()
    assert "7 speculative tokens in vLLM and 8 draft tokens in SGLang" in card


def test_the_card_names_target_cache_and_recipe(run: Path, tmp_path: Path) -> None:
    export(run, tmp_path / "draft")
    card, record = (tmp_path / "draft/README.md").read_text(), RunRecord.read(run)
    for text in (*record.identity["caches"], record.origin["target"], "steps 6", "optimizer adamw", "num_anchors 4"):
        assert text in card
    assert record.origin["target_identity"]["config_sha256"] in card and "epochs" not in card
    for text in ("batch_tokens 8192", "row_tokens", "accumulation_times_ranks 1", "clip 1.0", "warmup_ratio 0.04"):
        assert text in card
    for text in ("ema", "init_from", "batch_size"):
        assert text not in card


@pytest.mark.parametrize("kind", FORMATS)
def test_a_draft_folder_becomes_what_its_run_would_be_exported_as(run: Path, tmp_path: Path, kind: str) -> None:
    name = RunRecord.read(run).origin["target"]
    plain = export(run, tmp_path / "plain").draft
    direct, again = export(run, tmp_path / "direct", kind=kind), export_draft(plain, tmp_path / "again", kind, name)
    for file in ("config.json", "model.safetensors"):
        assert (again.draft / file).read_bytes() == (direct.draft / file).read_bytes()
    assert (again.step, again.num_parameters, again.kind) == (direct.step, direct.num_parameters, kind)
    serving = [(one.draft / "README.md").read_text().partition("## Serving")[2] for one in (again, direct)]
    assert serving[0] == serving[1] and checksum_faults(again.draft) == []


def test_anothers_draft_is_written_too_and_its_faults_are_refused(run: Path, tmp_path: Path) -> None:
    name = RunRecord.read(run).origin["target"]
    other = tmp_path / "other"
    other.mkdir()
    plain = export(run, tmp_path / "plain").draft
    weights = {key: w.float() + 1e-4 for key, w in load_file(plain / "model.safetensors").items()}
    save_file(weights, other / "model.safetensors")
    config = json.loads((plain / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"transformers_version": "4.57", "_name_or_path": "x"}))
    done = export_draft(other, tmp_path / "spec", "speculators", name)
    assert done.step is None and "the draft other" in (done.draft / "README.md").read_text()
    stored = load_file(done.draft / "model.safetensors")
    assert all(torch.equal(stored[key], w.bfloat16()) for key, w in weights.items())
    with pytest.raises(DflashError, match="Name it by --target"):
        export_draft(other, tmp_path / "none", "zlab", None)
    with pytest.raises(DflashError, match="expected zlab, speculators or transformers"):
        export_draft(other, tmp_path / "none", "gguf", name)
    weights["fc.weight"][0, 0] = float("nan")
    save_file(weights, other / "model.safetensors")
    with pytest.raises(DflashError, match="not finite"):
        export_draft(other, tmp_path / "none", "zlab", name)
    assert not (tmp_path / "none").exists()
